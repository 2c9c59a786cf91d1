"""A whole model, read and understood: from HuggingFace or Megatron, under the names that it goes on with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reshard.core.checkpoint import Checkpoint, same_bytes
from reshard.core.tensor import Source, Tensor
from reshard.dialects import apply, megatron, packing
from reshard.dialects.apply import Named
from reshard.dialects.facts import Facts
from reshard.dialects.megatron import InMemory
from reshard.dialects.table import Family, copies, entries, variants
from reshard.errors import Corrupt, Incomplete, Mismatch, NotFound, Unsupported, listed
from reshard.formats import huggingface, nemo1, nemo2_context
from reshard.formats.megatron import MegatronCheckpoint, Settings, locate, open_located
from reshard.ops import nemo2
from reshard.ops import reference as references
from reshard.ops.config import check_complete
from reshard.ops.convert.options import Options
from reshard.ops.family import by_config, choose
from reshard.ops.merge import Options as MergeOptions
from reshard.ops.merge import Ways, whole_model
from reshard.ops.reference import SCALES, Reference, is_float8, is_packed
from reshard.ops.tie import says_tied
from reshard.ops.tokens import is_of_tokenizer, special_tokens
from reshard.storage import hub


@dataclass(frozen=True, slots=True)
class Model:
    """A whole model, read and understood, whatever it came from."""

    checkpoint: Checkpoint
    """Where it came from; the tensors are those that were read."""
    family: Family
    facts: Facts
    config: Mapping[str, Any]
    """As HuggingFace's config.json."""
    hub: Mapping[str, Tensor]
    """Under the hub's names, experts single. Empty when the model goes from Megatron to Megatron."""
    megatron: Mapping[str, Named]
    """Under Megatron's names. Empty when the model goes to HuggingFace."""
    reference: Reference | None
    notices: tuple[str, ...]
    made_from: str | None = None
    """The HuggingFace model that it is or was made from, as it was named."""
    tokenizer: str | None = None
    """The name on the hub of a tokenizer that the checkpoint names, and has no files of."""


def of_huggingface(source: str, options: Options) -> Model:
    """A HuggingFace directory or hub id, or a run that merges to one."""
    from reshard.dialects import megatron_config

    path = Path(source) if Path(source).exists() else _on_hub(source)
    asked = MergeOptions(base=options.hf_model, step=options.iteration, verify=options.verify)
    found, _, checkpoint = whole_model(path, asked, Ways("--hf-model"))
    checkpoint = replace(checkpoint, notices=(*_no_run(found.step, path, options), *checkpoint.notices))
    config = checkpoint.config
    if config is None:
        raise NotFound(f"{source} has no config.json", hint="--hf-model DIR_OR_HUB_ID brings it")
    checkpoint = _without_buffers(checkpoint)
    family = by_config(config)
    known = hub_names(family, family.facts(config)) if family else set()
    tensors = packing.unpacked(checkpoint.tensors, known)
    family, notices = choose(config, tensors) if family is None else (family, ())
    _check_not_quantized(source, tensors)
    facts, absent = apply.present(tensors, family, family.facts(config), on_hub=True)
    notices += tuple(f"the model has no tensors of its {part} part, which its config names" for part in absent)
    facts = _padded(facts, options)
    if options.model_id is not None:
        nemo2.filled(megatron_config.to_megatron(config, family, facts)[0], options.model_id)
    _check_copies(checkpoint, tensors, family, facts)
    notices += _of_other(source, config, family, facts, options)
    in_megatron = apply.to_megatron(tensors, family, facts)
    return Model(
        checkpoint, family, facts, config, tensors, in_megatron, None, (*checkpoint.notices, *notices),
        options.hf_model or source,
    )  # fmt: skip


def _no_run(step: object, source: Path, options: Options) -> tuple[str, ...]:
    """A sentence where an iteration is asked for of what has none. Raises NotFound, unless lenient."""
    if options.iteration is None or step is not None:
        return ()
    if options.lenient:
        return (f"--iteration {options.iteration} changes nothing: {source} is one model, not a run",)
    raise NotFound(
        f"--iteration {options.iteration}: {source} is one model, not a run of which an iteration could be picked",
        hint="leave --iteration out, or name the run",
    )


def _of_other(
    source: str, config: Mapping[str, Any], family: Family, facts: Facts, options: Options
) -> tuple[str, ...]:
    """A sentence where --hf-model, which is written down as where a model comes from, was trained otherwise.

    Raises Mismatch where it is another model.
    """
    from reshard.dialects import megatron_config

    if options.hf_model is None:
        return ()
    other = references.read(options.hf_model).config
    differing = megatron_config.check_config(other, megatron_config.to_megatron(config, family, facts)[0])
    against = [said for said in differing if not said.startswith(_TRAINED)]
    if by_config(other) not in (None, family):
        against.insert(0, f"model_type: HF {other.get('model_type')}, checkpoint {config.get('model_type')}")
    if against:
        raise Mismatch(
            f"{source} is not {options.hf_model}: {'; '.join(against)}",
            hint="--hf-model names the model that this one was made from; leave it out where config.json is beside it",
        )
    return (f"{source}: its own config.json counts: {'; '.join(differing)}",) if differing else ()


_TRAINED = ("rotary base", "epsilon", "tied embeddings")
"""What may become another in training."""


def _on_hub(name: str) -> Path:
    """The directory with a hub model's weights. Raises NotFound."""
    try:
        return hub.resolve(name, weights=True)
    except NotFound as error:
        raise NotFound(
            str(error), hint="a model is named by its directory, or by a hub id such as Qwen/Qwen3-8B"
        ) from error


def of_megatron(source: Path, options: Options) -> Model:
    """A Megatron checkpoint of any format."""
    located = locate(source, options.iteration)
    said = _no_run(located.iteration, source, options)
    opened = open_located(located, verify=options.verify)
    checkpoint = replace(opened.checkpoint.located(), notices=(*said, *opened.checkpoint.notices))
    settings = _by_tokenizer(_by_id(opened.settings, options), options)
    opened = replace(opened, checkpoint=_without_buffers(checkpoint), settings=settings)
    return named(opened, understood(opened, options), options)


@dataclass(frozen=True, slots=True)
class Understood:
    """The tensors of a Megatron checkpoint under the names of its modules, and the model that they are taken for."""

    tensors: Mapping[str, Tensor]
    family: Family
    facts: Facts
    config: Mapping[str, Any]
    reference: Reference | None
    notices: tuple[str, ...]
    """What is in doubt about it, and what it has nothing of."""
    head: tuple[str, ...] = ()
    """What became of the head of a model of tied weights that was saved with one."""


Same = Callable[[Tensor, Tensor, Source], bool]
"""Whether two tensors hold the same."""


def understood(opened: MegatronCheckpoint, options: Options, same: Same = same_bytes) -> Understood:
    """What a Megatron checkpoint is, from headers but for tensors that are there twice, which `same` compares."""
    _check_no_adapter(opened)
    memory = megatron.in_memory(opened.checkpoint.tensors)
    _check_twins(opened.checkpoint, memory.twins, same)
    reference = _reference(opened, options)
    family, config, notices = _understood(opened, memory.tensors, reference)
    facts = family.facts(config)
    memory, config, said = _head(opened.checkpoint, memory, config, facts, same)
    if said and not says_tied(config):
        facts = family.facts(config)
    facts, absent = apply.present(memory.tensors, family, facts, on_hub=False)
    notices += tuple(f"the checkpoint has nothing of the model's {part} part" for part in absent)
    return Understood(memory.tensors, family, facts, config, reference, notices, said)


def named(opened: MegatronCheckpoint, found: Understood, options: Options) -> Model:
    """The model under the names that it goes on with. Raises Incomplete or Mismatch where it is not a whole one."""
    tensors, family, facts, config, reference = found.tensors, found.family, found.facts, found.config, found.reference
    notices = (*found.notices, *found.head, *opened.settings.notices, *_left_out(opened))
    if options.to != "hf":
        _check_shapes(opened.checkpoint, tensors, family, facts, config)
        facts, rows = _rows_kept(tensors, facts, options)
        in_megatron = apply.canonical(tensors, family, rows)
        hub_tensors: Mapping[str, Tensor] = {}
    else:
        if reference is None:
            _check_turned(config, family)
            config = _with_tokens(config, opened, options)
        in_megatron = {}
        tensors, said = (tensors, ()) if options.strict else _with_names(tensors, family, facts)
        hub_tensors = apply.to_hub(tensors, family, facts, strict=options.strict)
        notices += said
        notices += (*_cut_rows(tensors, facts), *_lacking(hub_tensors, family, facts, reference))
    checkpoint = replace(opened.checkpoint, assets=_assets(opened, reference))
    return Model(
        checkpoint, family, facts, config, hub_tensors, in_megatron, reference,
        (*checkpoint.notices, *notices), options.hf_model or opened.settings.hf_model_id, opened.settings.tokenizer,
    )  # fmt: skip


def _check_shapes(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], family: Family, facts: Facts, config: Mapping[str, Any]
) -> None:
    """Raise Mismatch where tensors have not the shapes that the settings say, which would be written beside them."""
    hub_tensors = apply.to_hub(tensors, family, facts, strict=False)
    with suppress(Incomplete):  # parts of models are converted too
        check_complete(config, replace(checkpoint, tensors=hub_tensors))


def _by_id(settings: Settings, options: Options) -> Settings:
    """The settings, with what --model-id adds. Raises Mismatch where they contradict it."""
    if options.model_id is None:
        return settings
    named = settings.hf_model_id or options.model_id
    return replace(settings, values=nemo2.filled(settings.values, options.model_id), hf_model_id=named)


def _by_tokenizer(settings: Settings, options: Options) -> Settings:
    """The settings, with the number of tokens that --tokenizer-path adds: what HuggingFace keeps of the embedding."""
    if options.tokenizer_path is None or options.to != "hf" or settings.vocab_size is not None or options.hf_model:
        return settings
    return replace(
        settings, vocab_size=nemo2.tokenizer_named(options.tokenizer_path, options.tokenizer_library).num_tokens
    )


def _rows_kept(tensors: Mapping[str, Tensor], facts: Facts, options: Options) -> tuple[Facts, Facts]:
    """(what the model is, what its tensors are taken for): padding stays as it is where no other is asked for."""
    rows = max((t.shape[0] for n, t in tensors.items() if n.endswith(_EMBEDDING) and t.shape), default=0)
    if options.vocab_divisor is not None or rows <= facts.sizes["vocab"]:
        facts = _padded(facts, options)
        return facts, facts
    return facts.sized(padded_vocab=rows), facts.sized(vocab=rows, padded_vocab=rows)


_EMBEDDING = "embedding.word_embeddings.weight"


def _reference(opened: MegatronCheckpoint, options: Options) -> Reference | None:
    """--hf-model, or the directory that verl keeps beside its shards."""
    if options.hf_model is not None:
        return references.read(options.hf_model)
    beside = opened.located.huggingface
    return references.read(str(beside)) if beside is not None else None


def _assets(opened: MegatronCheckpoint, reference: Reference | None) -> Mapping[str, Tensor]:
    """Tokenizer and other files: the reference's, and those that the checkpoint brings where it has no tokenizer."""
    given = reference.assets if reference is not None else {}
    return given if nemo2.has_tokenizer(given) else {**_own_assets(opened), **given}


def _own_assets(opened: MegatronCheckpoint) -> Mapping[str, Tensor]:
    context, tokenizer = opened.located.context, opened.located.tokenizer
    if context is not None and (context / nemo2_context.IO).is_file():
        return nemo2.assets_of(context)
    if opened.located.model_config is not None and tokenizer is None:
        return nemo1.assets(opened.located.model_config)
    return huggingface.companions(tokenizer)[1] if tokenizer is not None else opened.checkpoint.assets


def carried(model: Model, options: Options) -> Mapping[str, Tensor]:
    """The files to be written beside the weights: the model's, with the tokenizer that the options name."""
    assets = model.checkpoint.assets
    if not options.save_tokenizer:
        return {}
    if options.tokenizer_path is None:
        return assets
    others = {name: data for name, data in assets.items() if not is_of_tokenizer(name)}
    return others | nemo2.tokenizer_files(options.tokenizer_path, options.tokenizer_library)


def _with_tokens(config: Mapping[str, Any], opened: MegatronCheckpoint, options: Options) -> Mapping[str, Any]:
    """A config that was made of settings, with the special tokens of the tokenizer that is written beside it."""
    context, archived = opened.located.context, opened.located.model_config
    tokenizer = opened.located.tokenizer
    if options.tokenizer_path is not None:
        tokenizer = nemo2.tokenizer_place(options.tokenizer_path)
    elif tokenizer is None and context is not None and (context / nemo2_context.IO).is_file():
        tokenizer = nemo2_context.tokenizer_path(context, nemo2_context.read(context))
    elif tokenizer is None and archived is not None and (found := nemo1.tokenizer_of(archived)).is_plain:
        tokenizer = found.files.get("tokenizer.model")
    return {**special_tokens(tokenizer), **config} if tokenizer is not None else config


def _check_turned(config: Mapping[str, Any], family: Family) -> None:
    """Raise Unsupported where parts of heads are turned, and the family's models turn whole ones in spite of it."""
    part = config.get("partial_rotary_factor")
    if part in (None, 1) or "rotary_percent" in {i[0] if isinstance(i, tuple) else i.name for i in family.settings}:
        return
    raise Unsupported(
        f"the rotary embedding turns {part} of each head: {family.architectures[0]} of transformers turns whole heads",
        hint="--to torch_dist and --to nemo2 keep it",
    )


def _understood(
    opened: MegatronCheckpoint, tensors: Mapping[str, Tensor], reference: Reference | None
) -> tuple[Family, Mapping[str, Any], tuple[str, ...]]:
    """Family and config: the reference's, held against the checkpoint's settings; else made from these."""
    from reshard.dialects import megatron_config, recognise
    from reshard.families import families

    where, settings = opened.located.weights, opened.settings
    if reference is None:
        if settings.values.get("share_embeddings_and_output_weights") is True:
            tensors = {name: tensor for name, tensor in tensors.items() if not _HEAD.fullmatch(name)}
        found = recognise.recognise(
            settings.values, families(), tensors, vocab_size=settings.vocab_size, hf_model_id=settings.hf_model_id
        )
        return found.family, found.config, found.notices
    family, notices = choose(reference.config, tensors, on_hub=False)
    against = megatron_config.check_config(reference.config, settings.values)
    more, lesser = (
        recognise.contradictions(reference.config, family, settings.values) if _is_nemos(settings) else ([], [])
    )
    if against or more:
        raise Mismatch(
            f"{where} is not a checkpoint of {reference.path}: {'; '.join(against or more)}",
            hint="--hf-model names the HuggingFace model that was trained",
        )
    _check_vocabulary(opened, reference.config)
    said = (f"{reference.path} counts where it says otherwise: {'; '.join(lesser)}",) if lesser else ()
    return family, reference.config, (*reference.notices, *notices, *said)


def _is_nemos(settings: Settings) -> bool:
    """Whether NeMo wrote the settings: they say all that a model computes with."""
    return settings.source in (nemo1.MODEL_CONFIG, "hyper_parameters", nemo2_context.IO, nemo2_context.MODEL)


def _check_vocabulary(opened: MegatronCheckpoint, config: Mapping[str, Any]) -> None:
    """Raise Mismatch for a config of fewer tokens than Megatron-Bridge says that the model has: rows would be cut."""
    stated = opened.settings.values.get("vocab_size") if opened.settings.source == "run_config.yaml" else None
    text = config.get("text_config")
    theirs = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, Mapping) else None)
    if type(stated) is int and type(theirs) is int and theirs < stated:
        raise Mismatch(
            f"{opened.located.weights}: the model has {stated} tokens, --hf-model has {theirs}",
            hint="--hf-model names the HuggingFace model that was trained",
        )


def _without_buffers(checkpoint: Checkpoint) -> Checkpoint:
    """Without the rotary frequencies that old releases of transformers and Megatron saved: loaders compute them."""
    left = [name for name in checkpoint.tensors if name.endswith((".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq"))]
    if not left:
        return checkpoint
    kept = checkpoint.select(name for name in checkpoint.tensors if name not in set(left))
    kind = left[0].rpartition(".inv_freq")[0].rpartition(".")[2]
    return replace(kept, notices=(*kept.notices, f"{len(left)} {kind}.inv_freq are not taken: they are computed"))


def _head(
    checkpoint: Checkpoint, memory: InMemory, config: Mapping[str, Any], facts: Facts, same: Same
) -> tuple[InMemory, Mapping[str, Any], tuple[str, ...]]:
    """Where a model of tied weights was saved with a head: the head left out when it is the embedding, else untied."""
    head = next((name for name in memory.tensors if _HEAD.fullmatch(name)), None)
    if head is None or "tied" not in facts.tags:
        return memory, config, ()
    embedding = head.replace("output_layer", "embedding.word_embeddings")
    if embedding in memory.tensors and same(memory.tensors[head], memory.tensors[embedding], checkpoint.source):
        rest = {name: tensor for name, tensor in memory.tensors.items() if name != head}
        return replace(memory, tensors=rest), config, (f"{head} is the embedding, to which it is tied: left out",)
    said = f"{head} is not the embedding: the model has a head of its own, tie_word_embeddings becomes false"
    return memory, {**config, "tie_word_embeddings": False}, (said,)


_HEAD = re.compile(r"(?:language_model\.)?output_layer\.weight")


def _check_twins(checkpoint: Checkpoint, twins: tuple[tuple[str, Tensor, Tensor], ...], same: Same) -> None:
    """Raise Corrupt where a tensor that is there under two names holds two values."""
    unequal = [name for name, one, other in twins if not same(one, other, checkpoint.source)]
    if unequal:
        raise Corrupt(
            f"{checkpoint.origin.path}: {len(unequal)} tensors are there twice, with different values: "
            f"{listed(unequal)}",
            hint="two saves were mixed in one directory: it is not known which was trained",
        )


def _check_copies(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], family: Family, facts: Facts) -> None:
    """Raise Mismatch where a tensor that Megatron stores once has another value in its copy."""
    unequal = [
        f"{copy.name} and {copy.of}"
        for copy in copies(family, facts)
        if copy.name in tensors and copy.of in tensors
        and not same_bytes(tensors[copy.name], tensors[copy.of], checkpoint.source)
    ]  # fmt: skip
    if unequal:
        raise Mismatch(
            f"{checkpoint.origin.path}: Megatron stores one of these for both, and they differ: {listed(unequal)}",
            hint="set tie_word_embeddings to false in config.json if the head was trained on its own",
        )


def _check_not_quantized(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise Unsupported for weights that are stored with scales beside them."""
    packed = [n for n, t in tensors.items() if n.endswith(SCALES) or is_packed(n, t.dtype) or is_float8(t.dtype)]
    if packed:
        raise Unsupported(
            f"{source}: the weights are quantized: {listed(packed)}",
            hint="convert a copy in bfloat16, as the model's authors publish it or transformers dequantizes it",
        )


def _check_no_adapter(opened: MegatronCheckpoint) -> None:
    """Raise Unsupported where tensors of an adapter lie among the model's: without them it is not what was trained."""
    found = [name for name in opened.checkpoint.tensors if _ADAPTER.search(name)]
    if found:
        raise Unsupported(
            f"{opened.located.weights}: {len(found)} tensors are of an adapter (LoRA), which is not merged into the "
            f"model: {listed(found)}",
            hint="merge it with the program that trained it, and convert what that writes",
        )


_ADAPTER = re.compile(r"\.(?:adapters?|adapter_layer|lora_[abAB])\.")


def _with_names(
    tensors: Mapping[str, Tensor], family: Family, facts: Facts
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The tensors that have a name on the hub, and a sentence about the others, as long as they are the fewer."""
    known = {entry.name for entry in entries(family, facts)} | variants(family, facts).keys()
    unknown = [name for name in tensors if name not in known]
    if not unknown or 2 * len(unknown) >= len(tensors):
        return tensors, ()
    kept = {name: tensor for name, tensor in tensors.items() if name in known}
    return kept, (f"NOT WRITTEN, as a {family.name} model has no such tensors: {len(unknown)}: {listed(unknown)}",)


def _lacking(
    tensors: Mapping[str, Tensor], family: Family, facts: Facts, reference: Reference | None
) -> tuple[str, ...]:
    """A sentence where tensors are missing, as they may where that is no error, and no reference's headers tell."""
    missing = [] if reference and reference.shapes else sorted(hub_names(family, facts) - tensors.keys())
    return (f"{len(missing)} tensors of the model are not in the checkpoint: {listed(missing)}",) if missing else ()


def _left_out(opened: MegatronCheckpoint) -> tuple[str, ...]:
    """What of a checkpoint does not belong to the model."""
    left = [f"{count} {kind.replace('_', ' ')} entries" for kind, count in opened.left_out.items()]
    return (f"not taken: {', '.join(left)}",) if left else ()


def _cut_rows(tensors: Mapping[str, Tensor], facts: Facts) -> tuple[str, ...]:
    """A sentence when rows that only pad the vocabulary are cut off."""
    vocab = facts.sizes["vocab"]
    rows = {t.shape[0] for n, t in tensors.items() if n.endswith(_EMBEDDING) and t.shape}
    return tuple(f"{n - vocab} rows that pad the vocabulary from {vocab} to {n} are cut off" for n in rows if n > vocab)


def hub_names(family: Family, facts: Facts) -> set[str]:
    return {name for entry in entries(family, facts) for name in entry.hub}


def _padded(facts: Facts, options: Options) -> Facts:
    if options.vocab_divisor is None:
        return facts
    unit = options.vocab_divisor * options.tp
    return facts.sized(padded_vocab=-(-facts.sizes["vocab"] // unit) * unit)
