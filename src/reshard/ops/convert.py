"""convert: a model from one format and dialect to another.

    HuggingFace -> hub names -> (family's table) -> Megatron's names -> (layout) -> names on disk -> plan
    Megatron    -> names on disk -> Megatron's names -> (the same table) -> hub names -> plan

`prepare` is all of it up to the plan, from headers; `merge.carry_out` carries the plan out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from reshard.core.checkpoint import Checkpoint, same_bytes
from reshard.core.compute import cast
from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Tensor
from reshard.dialects import apply, megatron, packing
from reshard.dialects.apply import Named
from reshard.dialects.fuse import computes
from reshard.dialects.megatron import InMemory
from reshard.dialects.table import Facts, Family, copies, entries
from reshard.errors import Corrupt, Incomplete, InputError, Mismatch, NotFound, Unsupported, listed
from reshard.formats import fsdp_dtensor, huggingface, nemo1, nemo2_context, torch_dist
from reshard.formats.fsdp_dtensor import TARGETS, Target, target_named
from reshard.formats.megatron import MegatronCheckpoint, Settings, locate, open_located
from reshard.ops import nemo2
from reshard.ops import reference as references
from reshard.ops.config import check_complete, reconcile
from reshard.ops.family import by_config, choose
from reshard.ops.merge import Merged, Prepared, carry_out, whole_model
from reshard.ops.merge import Options as MergeOptions
from reshard.ops.reference import SCALES, Reference, is_float8, is_packed
from reshard.ops.tie import says_tied
from reshard.ops.tokens import special_tokens
from reshard.storage import hub, manifest
from reshard.storage.launch import Spread
from reshard.storage.plan import FilePlan, Plan
from reshard.storage.run import Progress
from reshard.version import __version__

Format = Literal["hf", "torch_dist", "fsdp_dtensor", "nemo2"]
FORMATS: tuple[Format, ...] = ("hf", "torch_dist", "fsdp_dtensor", "nemo2")

_WRITTEN_AS = {"hf": "huggingface", "torch_dist": "torch_dist", "fsdp_dtensor": "fsdp_dtensor", "nemo2": "nemo2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a conversion does."""

    to: Format = "hf"
    dtype: str | None = None
    """Of floating-point tensors, but for those that a family keeps in float32."""
    hf_model: str | None = None
    """A HuggingFace directory or hub id: names, dtypes, config and tokenizer. None of its values is read."""
    target: str = next(iter(TARGETS))
    """Whose loader an fsdp_dtensor directory is for."""
    iteration: int | None = None
    """Of a run to be read; the newest complete one by default."""
    tp: int = 1
    cp: int = 1
    ep: int = 1
    pp: int = 1
    vocab_divisor: int | None = None
    """Rows of the vocabulary are padded to a multiple of this times `tp`, on the way into Megatron."""
    strict: bool = True
    """Whether a tensor that is missing is an error."""
    max_shard_size: str | None = None
    save_tokenizer: bool = True
    model_id: str | None = None
    """NVIDIA's name of the model: what a checkpoint does not say of itself."""
    tokenizer_path: str | None = None
    """Of NeMo's tokenizer; the one beside the model by default."""
    tokenizer_library: str | None = None
    """`sentencepiece` or `huggingface`; by its files where it is not said."""
    verify: bool = False

    def record(self) -> dict[str, Any]:
        """What differs from the defaults, for the manifest."""
        default = Options()
        return {n: getattr(self, n) for n in self.__slots__ if n == "to" or getattr(self, n) != getattr(default, n)}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Options:
        """The options that a manifest holds."""
        return msgspec.convert(record, cls)


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


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str,
    force: bool = False,
    threads: int | None = None,
    block_nbytes: int | None = None,
    progress: Progress | None = None,
    spread: Spread | None = None,
    **options: Any,
) -> Merged:
    """Convert the model at `source` (a path, or a hub id) into `output` and prove it.

    `to` is one of FORMATS; `options` are the other fields of `Options`. Raises InputError before anything is written
    when the source is incomplete, damaged or another model than its reference, as far as headers tell.
    """
    prepared = prepare(source, Path(output), Options(to=format_named(to), **options))
    return carry_out(
        prepared, Path(output), force=force, threads=threads, block_nbytes=block_nbytes, progress=progress,
        spread=spread,
    )  # fmt: skip


def format_named(name: str) -> Format:
    """The format of this name. Raises Unsupported, listing all."""
    for known in FORMATS:
        if name == known:
            return known
    raise Unsupported(f"no format {name!r} to convert to", hint=f"one of {listed(FORMATS)}")


def prepare(source: Path | str, output: Path, options: Options) -> Prepared:
    """Everything up to the plan, from headers alone. Raises InputError for all that headers can reveal."""
    format_named(options.to)
    target_named(options.target)
    _check_options(options)
    _check_mesh(options)
    where, is_megatron = Path(source), _is_megatron(Path(source))
    try:
        model = _of_megatron(where, options) if is_megatron else _of_huggingface(str(source), options)
        checkpoint, plan = _to_huggingface(model, options) if options.to == "hf" else _to_megatron(model, options)
    except InputError as error:
        raise _with_path(error, str(source)) from error
    origin = checkpoint.origin
    source_facts = {
        "path": str(origin.path), "format": origin.format, "writer": origin.writer, "step": origin.step,
        "convert": options.record(), "family": model.family.name,
    }  # fmt: skip
    facts = {"source": source_facts, "options": {}, "output": _WRITTEN_AS[options.to]}
    plan = manifest.with_manifest(replace(plan, facts=facts), __version__)
    return Prepared(origin.path, model.checkpoint, checkpoint, plan, checkpoint.notices, options.verify)


def _with_path(error: InputError, source: str) -> InputError:
    """The error, with the source before what it says where that names no path."""
    if os.sep in str(error) or source in str(error):
        return error
    return type(error)(f"{source}: {error}", hint=error.hint)


def _check_options(options: Options) -> None:
    """Raise Unsupported or Mismatch for options that no model can be converted with."""
    if options.dtype is not None and (dtype(options.dtype).kind != "float" or is_float8(dtype(options.dtype))):
        raise Unsupported(
            f"--dtype {options.dtype}: weights are written in float32, bfloat16, float16 or float64",
            hint="quantize the model that was written with the program that will serve it",
        )
    if options.vocab_divisor is not None and options.vocab_divisor < 1:
        raise Mismatch(f"--make-vocab-size-divisible-by {options.vocab_divisor}: it begins at 1")
    if not options.strict and options.to != "hf":
        raise Unsupported(
            f"--not-strict --to {options.to}: no loader of Megatron takes a model that lacks tensors",
            hint="leave --not-strict out, or convert --to hf",
        )


def _is_megatron(source: Path) -> bool:
    """Whether a path holds Megatron's weights; what is damaged there is said when it is opened."""
    if not source.exists():
        return False
    try:
        locate(source)
    except NotFound:
        return False
    except InputError:
        return True
    return True


# -------------------------------------------------------------------------------------------------------- reading


def _of_huggingface(source: str, options: Options) -> Model:
    """A HuggingFace directory or hub id, or a run that merges to one."""
    from reshard.dialects import megatron_config

    path = Path(source) if Path(source).exists() else _on_hub(source)
    _, _, checkpoint = whole_model(path, MergeOptions(base=options.hf_model, verify=options.verify))
    config = checkpoint.config
    if config is None:
        raise NotFound(f"{source} has no config.json", hint="--hf-model DIR_OR_HUB_ID brings it")
    checkpoint = _without_buffers(checkpoint)
    family = by_config(config)
    known = _hub_names(family, family.facts(config)) if family else set()
    tensors = packing.unpacked(checkpoint.tensors, known)
    family, notices = choose(config, tensors) if family is None else (family, ())
    _check_not_quantized(source, tensors)
    facts, absent = apply.present(tensors, family, family.facts(config), on_hub=True)
    notices += tuple(f"the model has no tensors of its {part} part, which its config names" for part in absent)
    facts = _padded(facts, options)
    if options.model_id is not None:
        nemo2.filled(megatron_config.to_megatron(config, family, facts)[0], options.model_id)
    _check_copies(checkpoint, tensors, family, facts)
    named = apply.to_megatron(tensors, family, facts)
    return Model(
        checkpoint, family, facts, config, tensors, named, None, (*checkpoint.notices, *notices),
        options.hf_model or source,
    )  # fmt: skip


def _on_hub(name: str) -> Path:
    """The directory with a hub model's weights. Raises NotFound."""
    try:
        return hub.resolve(name, weights=True)
    except NotFound as error:
        raise NotFound(str(error), hint="SRC is a directory, or a hub id such as Qwen/Qwen3-8B") from error


def _of_megatron(source: Path, options: Options) -> Model:
    """A Megatron checkpoint of any format."""
    opened = open_located(locate(source, options.iteration), verify=options.verify)
    opened = replace(opened, checkpoint=opened.checkpoint.located(), settings=_by_id(opened.settings, options))
    _check_no_adapter(opened)
    memory = megatron.in_memory(opened.checkpoint.tensors)
    _check_twins(opened.checkpoint, memory.twins)
    reference = _reference(opened, options)
    family, config, notices = _understood(opened, memory.tensors, reference)
    facts = family.facts(config)
    memory, config, said = _head(opened.checkpoint, memory, config, facts)
    if said and not says_tied(config):
        facts = family.facts(config)
    facts, absent = apply.present(memory.tensors, family, facts, on_hub=False)
    notices += (*said, *(f"the checkpoint has nothing of the model's {part} part" for part in absent))
    notices += (*opened.settings.notices, *_left_out(opened))
    if options.to != "hf":
        facts, rows = _rows_kept(memory.tensors, facts, options)
        named = apply.canonical(memory.tensors, family, rows)
        hub_tensors: Mapping[str, Tensor] = {}
    else:
        config = config if reference else _with_tokens(config, opened)
        named = {}
        hub_tensors = apply.to_hub(memory.tensors, family, facts, strict=options.strict)
        notices += (*_cut_rows(memory.tensors, facts), *_lacking(hub_tensors, family, facts, reference))
    checkpoint = replace(opened.checkpoint, assets=_assets(opened, reference))
    return Model(
        checkpoint, family, facts, config, hub_tensors, named, reference,
        (*checkpoint.notices, *notices), options.hf_model or opened.settings.hf_model_id, opened.settings.tokenizer,
    )  # fmt: skip


def _by_id(settings: Settings, options: Options) -> Settings:
    """The settings, with what --model-id adds. Raises Mismatch where they contradict it."""
    if options.model_id is None:
        return settings
    named = settings.hf_model_id or options.model_id
    return replace(settings, values=nemo2.filled(settings.values, options.model_id), hf_model_id=named)


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
    """Tokenizer and other files: the reference's, else those that the checkpoint brings."""
    if reference is not None and reference.assets:
        return reference.assets
    context, tokenizer = opened.located.context, opened.located.tokenizer
    if context is not None and (context / nemo2_context.IO).is_file():
        return nemo2.assets_of(context)
    if opened.located.model_config is not None and tokenizer is None:
        return nemo1.assets(opened.located.model_config)
    return huggingface.companions(tokenizer)[1] if tokenizer is not None else opened.checkpoint.assets


def _with_tokens(config: Mapping[str, Any], opened: MegatronCheckpoint) -> Mapping[str, Any]:
    """A config that was made of settings, with the special tokens of the checkpoint's tokenizer."""
    tokenizer = opened.located.tokenizer
    return {**special_tokens(tokenizer), **config} if tokenizer is not None else config


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
    if against:
        raise Mismatch(
            f"{where} is not a checkpoint of {reference.path}: {'; '.join(against)}",
            hint="name the HuggingFace model that was trained with --hf-model",
        )
    _check_vocabulary(opened, reference.config)
    return family, reference.config, (*reference.notices, *notices)


def _check_vocabulary(opened: MegatronCheckpoint, config: Mapping[str, Any]) -> None:
    """Raise Mismatch for a config of fewer tokens than Megatron-Bridge says that the model has: rows would be cut."""
    stated = opened.settings.values.get("vocab_size") if opened.settings.source == "run_config.yaml" else None
    text = config.get("text_config")
    theirs = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, Mapping) else None)
    if type(stated) is int and type(theirs) is int and theirs < stated:
        raise Mismatch(
            f"{opened.located.weights}: the model has {stated} tokens, --hf-model has {theirs}",
            hint="name the HuggingFace model that was trained with --hf-model",
        )


def _without_buffers(checkpoint: Checkpoint) -> Checkpoint:
    """Without the rotary frequencies that old releases of transformers saved: every loader computes them."""
    left = [name for name in checkpoint.tensors if name.endswith(".rotary_emb.inv_freq")]
    if not left:
        return checkpoint
    kept = checkpoint.select(name for name in checkpoint.tensors if name not in set(left))
    return replace(kept, notices=(*kept.notices, f"{len(left)} rotary_emb.inv_freq are not taken: they are computed"))


def _head(
    checkpoint: Checkpoint, memory: InMemory, config: Mapping[str, Any], facts: Facts
) -> tuple[InMemory, Mapping[str, Any], tuple[str, ...]]:
    """Where a model of tied weights was saved with a head: the head left out when it is the embedding, else untied."""
    head = next((name for name in memory.tensors if _HEAD.fullmatch(name)), None)
    if head is None or "tied" not in facts.tags:
        return memory, config, ()
    embedding = head.replace("output_layer", "embedding.word_embeddings")
    if embedding in memory.tensors and same_bytes(memory.tensors[head], memory.tensors[embedding], checkpoint.source):
        rest = {name: tensor for name, tensor in memory.tensors.items() if name != head}
        return replace(memory, tensors=rest), config, (f"{head} is the embedding, to which it is tied: left out",)
    said = f"{head} is not the embedding: the model has a head of its own, tie_word_embeddings becomes false"
    return memory, {**config, "tie_word_embeddings": False}, (said,)


_HEAD = re.compile(r"(?:language_model\.)?output_layer\.weight")


def _check_twins(checkpoint: Checkpoint, twins: tuple[tuple[str, Tensor, Tensor], ...]) -> None:
    """Raise Corrupt where a tensor that is there under two names holds two values."""
    unequal = [name for name, one, other in twins if not same_bytes(one, other, checkpoint.source)]
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


_ADAPTER = re.compile(r"\.(?:adapters?|lora_[abAB])\.")


def _lacking(
    tensors: Mapping[str, Tensor], family: Family, facts: Facts, reference: Reference | None
) -> tuple[str, ...]:
    """A sentence where tensors are missing, as they may where that is no error, and no reference's headers tell."""
    missing = [] if reference and reference.shapes else sorted(_hub_names(family, facts) - tensors.keys())
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


def _hub_names(family: Family, facts: Facts) -> set[str]:
    return {name for entry in entries(family, facts) for name in entry.hub}


def _padded(facts: Facts, options: Options) -> Facts:
    if options.vocab_divisor is None:
        return facts
    unit = options.vocab_divisor * options.tp
    return facts.sized(padded_vocab=-(-facts.sizes["vocab"] // unit) * unit)


# ------------------------------------------------------------------------------------------------- to HuggingFace


def _to_huggingface(model: Model, options: Options) -> tuple[Checkpoint, Plan]:
    reference = model.reference
    tensors = dict(model.hub)
    shapes = dict(reference.shapes) if reference else {}
    for copy in copies(model.family, model.facts):
        if copy.of in tensors and copy.name not in tensors and (copy.always or copy.name in shapes):
            tensors[copy.name] = tensors[copy.of]
    tensors = packing.packed(tensors, shapes or packing.usual(tensors, str(model.config.get("model_type"))))
    notices = list(model.notices)
    if shapes:
        notices += _check_against(model, tensors, options)
    else:
        _check_shapes(model, tensors)
    tensors, said = _in_dtypes(model, tensors, options)
    assets = model.checkpoint.assets if options.save_tokenizer else {}
    config, changes = reconcile(model.config, tensors)
    notices += [*said, *(f"config.json: {change}" for change in changes)]
    checkpoint = replace(
        model.checkpoint, tensors=tensors, config=config, assets=assets, objects={}, paths={}, locate=None,
        dialect="hf", notices=tuple(notices),
    )  # fmt: skip
    return checkpoint, huggingface.plan(
        checkpoint, max_shard_nbytes=_max_nbytes(options) or huggingface.MAX_SHARD_NBYTES
    )


def _check_shapes(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Raise Mismatch where tensors have not the shapes that the config says; those missing were looked for before."""
    with suppress(Incomplete):
        check_complete(model.config, replace(model.checkpoint, tensors=tensors))


def _check_against(model: Model, tensors: Mapping[str, Tensor], options: Options) -> list[str]:
    """Hold what will be written against the reference's names and shapes. Raises Mismatch, listing all."""
    reference = model.reference
    assert reference is not None
    missing = [n for n in reference.shapes if n not in tensors and not n.endswith(".rotary_emb.inv_freq")]
    extra = [n for n in tensors if n not in reference.shapes]
    absent = _of_mtp(model.family, model.family.facts(model.config)) - _of_mtp(model.family, model.facts)
    optional = [n for n in missing if n in absent or n.startswith("mtp.")]
    missing = [n for n in missing if n not in optional]
    wrong = [
        f"{n}: {list(t.shape)}, not {list(reference.shapes[n])}"
        for n, t in tensors.items()
        if n in reference.shapes and t.shape != reference.shapes[n]
    ]
    said = [
        *([f"{len(missing)} of its tensors are not in the checkpoint: {listed(missing)}"] if missing else []),
        *([f"{len(extra)} of the checkpoint's are not in it: {listed(extra)}"] if extra else []),
        *([f"{len(wrong)} have another shape there: {listed(wrong)}"] if wrong else []),
    ]
    if wrong or (said and options.strict):
        raise Mismatch(
            f"the checkpoint is not one of {reference.path}: {'; '.join(said)}",
            hint="name the model that was trained with --hf-model; --not-strict takes other names, never other shapes",
        )
    if optional:
        said.append(f"{len(optional)} tensors of its multi-token prediction are not in the checkpoint")
    return [f"{reference.path}: {sentence}" for sentence in said]


def _of_mtp(family: Family, facts: Facts) -> set[str]:
    """The hub's names of what predicts further tokens, copies of embedding and head among them."""
    with_it, without = (
        _hub_names(family, some) | {copy.name for copy in copies(family, some)}
        for some in (facts, facts.without("mtp"))
    )
    return with_it - without


def _in_dtypes(model: Model, tensors: Mapping[str, Tensor], options: Options) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors in the reference's dtypes, else the config's, else as they are; --dtype goes before all."""
    kept = {
        name: entry.row.dtype for entry in entries(model.family, model.facts) for name in entry.hub if entry.row.dtype
    }
    said = dtype(options.dtype) if options.dtype else None
    by_reference = model.reference.dtypes if model.reference and said is None else {}
    default = said or _config_dtype(model.config)
    result, rounded = {}, 0
    for name, tensor in tensors.items():
        exception = dtype(kept[name]) if name in kept else None
        wanted = by_reference.get(name) or exception or default or tensor.dtype
        result[name] = cast(tensor, wanted) if wanted.kind == "float" else tensor
        rounded += wanted.kind == "float" and tensor.dtype.kind == "float" and wanted.itemsize < tensor.dtype.itemsize
    if rounded and said is None:
        names = sorted({t.dtype.name for n, t in tensors.items() if t.dtype.itemsize > result[n].dtype.itemsize})
        return result, [
            f"{rounded} tensors are rounded from {'/'.join(names)} to the model's dtype: --dtype float32 keeps them"
        ]
    return result, []


def _config_dtype(config: Mapping[str, Any]) -> DType | None:
    """The dtype that a config names, at the top or in its text part."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                return dtype(part[key])
    return None


# --------------------------------------------------------------------------------------------------- to Megatron


def _to_megatron(model: Model, options: Options) -> tuple[Checkpoint, Plan]:
    from reshard.dialects import megatron_config, run_config

    target = target_named(options.target)
    layout = megatron.TORCH_DIST
    if options.to == "fsdp_dtensor":
        layout = megatron.Layout(target.prefixes, False, True, target.split_parts, target.mtp)
        _check_whole(model, target, options)
    named, said = _in_megatron_dtypes(model, options)
    alike = len(set(model.facts.layers)) == 1  # Megatron numbers the layers of a model with dense ones among others
    stacks = model.family.stacked and alike and options.to != "fsdp_dtensor"
    tensors = megatron.on_disk(named, layout, model.facts.sizes, stack_layers=stacks)
    config = nemo2.config_of(model.config, tensors, model.family.name) if options.to == "nemo2" else model.config
    settings, warnings = megatron_config.to_megatron(config, model.family, model.facts)
    _check_divides(settings, options)
    if options.to == "nemo2":
        return _to_nemo2(model, tensors, settings, [*model.notices, *said, *warnings], options)
    text = run_config.run_config(
        settings, ckpt_format=options.to, tp=options.tp, pp=options.pp, cp=options.cp, ep=options.ep,
        hf_model_id=model.made_from,
    )  # fmt: skip
    notices = [*model.notices, *said, *warnings, *_uneven(model.facts, options)]
    assets = {n: t for n, t in model.checkpoint.assets.items() if options.save_tokenizer}
    files: tuple[FilePlan, ...]
    if options.to == "torch_dist":
        files = torch_dist.plan(tensors, run_config=text, tokenizer=assets, max_file_nbytes=_max_nbytes(options))
    else:
        notices.append(f"written for {target.name}: {target.releases}")
        files = fsdp_dtensor.plan(
            tensors, target=target, args=run_config.args(settings) if target.has_args else None,
            run_config=text, tokenizer=assets, max_file_nbytes=_max_nbytes(options),
        )  # fmt: skip
    checkpoint = replace(
        model.checkpoint, tensors=tensors, assets={}, objects={}, paths={}, locate=None, dialect="megatron",
        notices=tuple(notices),
    )  # fmt: skip
    return checkpoint, Plan(files)


def _to_nemo2(
    model: Model, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], notices: list[str], options: Options
) -> tuple[Checkpoint, Plan]:
    assets, tokenizer = model.checkpoint.assets, None
    if options.tokenizer_path is not None:
        tokenizer = nemo2.tokenizer_named(options.tokenizer_path, options.tokenizer_library)
    elif options.save_tokenizer:
        tokenizer = nemo2.tokenizer_among(assets, model.checkpoint.source, options.tokenizer_library)
        if tokenizer is None and model.tokenizer is not None:
            tokenizer = nemo2.tokenizer_on_hub(model.tokenizer)
    planned = nemo2.plan(tensors, settings, model.config, model.family.name, assets, tokenizer, _max_nbytes(options))
    checkpoint = replace(
        model.checkpoint, tensors={nemo2.PREFIX + name: tensor for name, tensor in tensors.items()}, assets={},
        objects={}, paths={}, locate=None, dialect="megatron", notices=(*notices, *planned.notices),
    )  # fmt: skip
    return checkpoint, Plan(planned.files)


def _in_megatron_dtypes(model: Model, options: Options) -> tuple[dict[str, Named], list[str]]:
    """Every tensor in the dtype that it is written in: float32 for fsdp_dtensor, else the model's own."""
    asked = options.dtype or ("float32" if options.to == "fsdp_dtensor" else None)
    result, widened = {}, []
    for name, named in model.megatron.items():
        row, tensor = named.entry.row, named.tensor
        wanted = dtype(row.dtype) if row.dtype else dtype(asked) if asked else tensor.dtype
        if tensor.dtype.kind == "float":
            tensor = cast(tensor, wanted)
            if computes(row.fuse) and model.hub and not _comes_back(model, named, tensor):
                tensor = cast(named.tensor, dtype("F32"))
                widened.append(name)
        result[name] = replace(named, tensor=tensor)
    if not widened:
        return result, []
    said = f"{len(widened)} norms are stored as w - 1, which {asked or 'their dtype'} cannot hold for all their weights"
    return result, [f"{said}: written in float32, which loaders cast ({listed(widened, 3)})"]


def _comes_back(model: Model, named: Named, tensor: Tensor) -> bool:
    """Whether the hub's values can be had again from a tensor that was computed. Reads both: they are small."""
    wanted = model.hub[named.entry.hub[0]]
    again = cast(named.entry.row.fuse.split(tensor, model.facts.sizes)[0], wanted.dtype)
    return same_bytes(wanted, again, model.checkpoint.source)


def _check_whole(model: Model, target: Target, options: Options) -> None:
    """Raise Unsupported for projections of several kinds in one tensor at TP > 1: their rows lie otherwise there."""
    whole = [name for name, named in model.megatron.items() if named.entry.row.parts]
    if whole and options.tp > 1 and True not in target.split_parts:
        raise Unsupported(
            f"--target {target.name} --tp {options.tp}: Megatron-LM reads {len(whole)} tensors whole, with the rows of "
            f"each rank together, and would mix them up: {listed(whole, 3)}",
            hint="--tp 1, or --target bridge",
        )


def _check_mesh(options: Options) -> None:
    """Raise Mismatch for a mesh that cannot be, or that the ranks of this run do not divide into."""
    sizes = {"tp": options.tp, "cp": options.cp, "ep": options.ep, "pp": options.pp}
    wrong = [f"--{name} {size}" for name, size in sizes.items() if size < 1]
    if wrong:
        raise Mismatch(f"{listed(wrong)}: a mesh axis has one rank or more")
    world, ranks = os.environ.get("WORLD_SIZE", "1"), options.tp * options.cp * options.ep
    if world.isdecimal() and int(world) > 1 and ranks > 1 and int(world) % ranks:
        raise Mismatch(f"WORLD_SIZE {world} is not a multiple of tp*cp*ep, {ranks}")


def _check_divides(settings: Mapping[str, Any], options: Options) -> None:
    """Raise Mismatch, listing all, for sizes of the model that the mesh does not divide."""
    asked = (
        ("num_attention_heads", "tp", options.tp),
        ("ffn_hidden_size", "tp", options.tp),
        ("hidden_size", "tp", options.tp),
        ("num_moe_experts", "ep", options.ep),
    )
    wrong = [
        f"{name} {settings[name]} by {axis} {n}" for name, axis, n in asked if settings.get(name) and settings[name] % n
    ]
    groups = settings.get("num_query_groups")
    if groups and groups % options.tp and options.tp % groups:
        wrong.append(f"num_query_groups {groups} by tp {options.tp}")
    if options.ep > 1 and not settings.get("num_moe_experts"):
        wrong.append(f"a model without experts by ep {options.ep}")
    if wrong:
        raise Mismatch(f"the mesh does not divide the model: {listed(wrong)}")


def _uneven(facts: Facts, options: Options) -> list[str]:
    """Sentences about what the mesh does not divide and its run can do something about."""
    rows, layers = facts.sizes.get("padded_vocab", facts.sizes["vocab"]), len(facts.layers)
    said = []
    if rows % options.tp:
        said.append(
            f"a vocabulary of {rows} does not divide by tp {options.tp}, and Megatron-Bridge builds no such model: "
            "--make-vocab-size-divisible-by 128 pads it"
        )
    if layers % options.pp:
        said.append(f"{layers} layers do not divide by pp {options.pp}: the run needs a pipeline layout of its own")
    return said


def _max_nbytes(options: Options) -> int | None:
    return huggingface.parse_size(options.max_shard_size) if options.max_shard_size else None
