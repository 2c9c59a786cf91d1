"""From what is stored to what is written: the model's tensors under its own names, config and tokenizer with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from reshard.core.checkpoint import Checkpoint
from reshard.errors import Corrupt, InputError, Mismatch, NotFound, Unsupported, command, listed
from reshard.formats.detect import Found
from reshard.ops import names
from reshard.ops.merge.options import Options
from reshard.ops.tie import tie
from reshard.ops.tokens import is_of_tokenizer


@dataclass(frozen=True, slots=True)
class Ways:
    """Ways out that hints name, as a verb spells them."""

    base: str
    """The option that names a model for its config and tokenizer."""
    flat: str = ""
    """What else does for flattened parameters, after a comma."""
    partial: str = "is every shard there, and does the config belong to them?"
    """What does where parameters are missing."""
    stored: str = ""
    """What takes a Megatron model as it is stored; empty where the verb takes such models itself."""


WAYS = Ways(
    "--base", ", --keep-names writes them flat", "--keep-names writes what is there",
    "--keep-names merges them as they are stored",
)  # fmt: skip


def accompanied(opened: Checkpoint, found: Found, options: Options, ways: Ways = WAYS) -> Checkpoint:
    """With config and files to carry: from beside the checkpoint first, what is lacking then from --base."""
    from reshard.formats import huggingface
    from reshard.storage import hub

    config, assets = opened.config, dict(opened.assets)
    for place in found.companions:
        other, files = huggingface.companions(place)
        config, assets = config if config is not None else other, files | assets
    if options.base is not None:
        hint = f"{ways.base} DIR names a directory with config.json and the tokenizer files"
        other, files = huggingface.companions(hub.resolve(options.base, hint=hint))
        if other is None and not files:
            raise NotFound(f"{ways.base} {options.base} has neither config.json nor files of a tokenizer", hint=hint)
        if any(map(is_of_tokenizer, assets)):  # a tokenizer is all of its files, from one place
            files = {name: file for name, file in files.items() if not is_of_tokenizer(name)}
        config, assets = config if config is not None else other, files | assets
        if config is None and "adapter_config.json" not in assets:
            raise NotFound(f"{ways.base} {options.base} has no config.json", hint=hint)
    if not options.save_tokenizer:
        assets = {name: tensor for name, tensor in assets.items() if not is_of_tokenizer(name)}
    return replace(opened, config=config, assets=assets)


def chosen(opened: Checkpoint, options: Options) -> Checkpoint:
    """The tensors that were asked for, located, under the names they will be worked on."""
    if options.keep_names or options.what != "model":
        checkpoint = names.optimizer_only(opened) if options.what == "optimizer" else opened
        if options.keep_names and options.what == "model":
            checkpoint = opened.select(names.model_fqns(opened))
        checkpoint = _filtered(checkpoint, options).located()
        try:
            return names.unwrapped(checkpoint)
        except Mismatch:  # names that only the wrappers' segments tell apart
            if options.keep_names:
                return checkpoint
            raise
    return _filtered(names.unwrapped(names.model_only(opened)), options).located()


def _filtered(checkpoint: Checkpoint, options: Options) -> Checkpoint:
    chosen = list(checkpoint)
    for patterns, wanted in ((options.include, True), (options.exclude, False)):
        unused = [p for p in patterns if not any(fnmatchcase(fqn, p) for fqn in checkpoint)]
        if unused:
            raise NotFound(f"no FQN matches {listed(unused)}", hint=f"the first FQNs are {listed(checkpoint, 4)}")
        if patterns:
            chosen = [fqn for fqn in chosen if any(fnmatchcase(fqn, p) for p in patterns) is wanted]
    return checkpoint.select(chosen) if len(chosen) < len(checkpoint) else checkpoint


def shaped(checkpoint: Checkpoint, keep_names: bool, ways: Ways = WAYS) -> Checkpoint:
    """FSDP1's LOCAL_STATE_DICT holds flattened parameters: give them the shapes that the config implies."""
    if checkpoint.origin.format != "rank_files":
        return checkpoint
    from reshard.dialects.shapes import parameter_shapes
    from reshard.formats import rank_files

    flat = rank_files.flat(checkpoint)
    if not flat:
        return checkpoint
    if checkpoint.config is None and keep_names:
        return checkpoint
    if checkpoint.config is None:
        raise NotFound(
            f"{checkpoint.origin.path}: FSDP1 local shards hold {len(flat)} flattened parameters and no shapes",
            hint=f"{ways.base} DIR_OR_HUB_ID names the model whose config.json gives them{ways.flat}",
        )
    return rank_files.shaped(checkpoint, parameter_shapes(checkpoint.config))


def check_optimizer(checkpoint: Checkpoint) -> None:
    """Raise Corrupt where both moments of Adam are one storage: torch 2.13 on CPU writes FSDP1's full state so."""
    tensors = checkpoint.tensors
    alike = [
        fqn for fqn, tensor in tensors.items()
        if fqn.endswith(".exp_avg") and tensor.size and tensors.get(fqn + "_sq") is tensor
    ]  # fmt: skip
    if alike:
        raise Corrupt(
            f"{checkpoint.origin.path}: exp_avg and exp_avg_sq are one storage for {listed(alike)}",
            hint="torch saved the same buffer twice, so exp_avg is lost; the model itself is not affected",
        )


def as_huggingface(checkpoint: Checkpoint, whole: bool, ways: Ways = WAYS) -> Checkpoint:
    """Hub names, ties written once, and the config as training left it."""
    from reshard.dialects import torchtitan, transformers
    from reshard.ops.config import check_complete

    if checkpoint.dialect == "megatron":
        path = checkpoint.origin.path
        converted = f"{command('convert', path, 'OUT', '--to', 'hf')} ({ways.stored})"
        raise Unsupported(
            f"{path} holds a Megatron model: its tensors are named and fused unlike the hub's",
            hint=converted if ways.stored else f"name {path} itself",
        )
    config = checkpoint.config
    checkpoint = names.without_peft(names.without_ddp(checkpoint))
    if whole and config is not None:
        _check_one_model(checkpoint)
    checkpoint = torchtitan.to_hub(names.without_attribute(checkpoint, config), config)
    config = checkpoint.config
    if config is None:
        return checkpoint
    checkpoint = tie(transformers.to_hub(checkpoint, config), config)
    if whole:
        check_complete(config, checkpoint, f"a loader would initialise them anew; {ways.partial}")
    return _with_strangers_said(checkpoint, config)


def _with_strangers_said(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """With a notice where most names are not those of the config's model, so that a loader would find little."""
    from reshard.dialects.shapes import parameter_shapes
    from reshard.formats import huggingface

    if huggingface.is_adapter(checkpoint):
        return checkpoint
    try:
        known = parameter_shapes(config)
    except InputError:
        return checkpoint
    strange = [fqn for fqn in checkpoint.tensors if fqn not in known]
    if 2 * len(strange) < len(checkpoint.tensors) or known.keys() <= checkpoint.tensors.keys():
        return checkpoint
    said = (
        f"{len(strange)} of {len(checkpoint.tensors)} tensors have names that the model of config.json has not, such as"
        f" {listed(strange, 2)}: it will not load from them (--include takes a part of a checkpoint)"
    )
    return replace(checkpoint, notices=(*checkpoint.notices, said))


def _check_one_model(checkpoint: Checkpoint) -> None:
    """Raise Unsupported for a model with an adapter in it: no loader takes both from one set of files."""
    from reshard.formats import huggingface

    adapter = huggingface.trained_with(checkpoint)
    if adapter:
        raise Unsupported(
            f"{checkpoint.origin.path} holds a model and the {len(adapter)} tensors of an adapter that was trained on"
            f" it: {listed(adapter, 2)}",
            hint="--include '*lora_*' writes the adapter, --exclude '*lora_*' the model without it",
        )
