"""A model as a Megatron or NeMo run: names on disk, dtypes, settings for the mesh that will load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reshard.core.checkpoint import Checkpoint, same_bytes
from reshard.core.compute import cast
from reshard.core.dtypes import dtype
from reshard.core.tensor import Tensor
from reshard.dialects import megatron
from reshard.dialects.apply import Named
from reshard.dialects.facts import Facts
from reshard.dialects.fuse import computes
from reshard.errors import Mismatch, Unsupported, listed
from reshard.formats import fsdp_dtensor, torch_dist
from reshard.formats.fsdp_dtensor import Target
from reshard.ops import nemo2
from reshard.ops.convert.model import Model, carried
from reshard.ops.convert.options import Options
from reshard.storage.plan import FilePlan, Plan


def to_megatron(model: Model, options: Options) -> tuple[Checkpoint, Plan]:
    from reshard.dialects import megatron_config, run_config

    target = options.loader
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
    assets = carried(model, options)
    files: tuple[FilePlan, ...]
    if options.to == "torch_dist":
        files = torch_dist.plan(tensors, run_config=text, tokenizer=assets, max_file_nbytes=options.max_nbytes)
    else:
        notices.append(f"written for {target.name}: {target.releases}")
        files = fsdp_dtensor.plan(
            tensors, target=target, args=run_config.args(settings) if target.has_args else None,
            run_config=text, tokenizer=assets, max_file_nbytes=options.max_nbytes,
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
    planned = nemo2.plan(tensors, settings, model.config, model.family.name, assets, tokenizer, options.max_nbytes)
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
        raise Mismatch(
            f"the mesh does not divide the model: {listed(wrong)}",
            hint="the files are the same for every mesh: leave the sizes out, or name those of the run that loads them",
        )


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
