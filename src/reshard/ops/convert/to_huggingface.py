"""A model as a HuggingFace directory: packed as its reference is, in its dtypes, held against its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from reshard.core.checkpoint import Checkpoint
from reshard.core.compute import cast
from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Tensor
from reshard.dialects import packing
from reshard.dialects.facts import Facts
from reshard.dialects.table import Family, copies, entries
from reshard.errors import Incomplete, Mismatch, listed
from reshard.formats import huggingface
from reshard.ops import tie
from reshard.ops.config import check_complete, reconcile
from reshard.ops.convert.model import Model, carried, hub_names
from reshard.ops.convert.options import Options
from reshard.storage.plan import Plan


def to_huggingface(model: Model, options: Options) -> tuple[Checkpoint, Plan]:
    checkpoint = as_huggingface(model, options)
    return checkpoint, huggingface.plan(checkpoint, max_shard_nbytes=options.max_nbytes or huggingface.MAX_SHARD_NBYTES)


def as_huggingface(model: Model, options: Options) -> Checkpoint:
    """What will be written. Raises Mismatch, Incomplete or Unsupported where that is no whole model."""
    reference = model.reference
    tensors = dict(model.hub)
    shapes = dict(reference.shapes) if reference else {}
    for copy in copies(model.family, model.facts):
        if copy.of in tensors and copy.name not in tensors and (copy.always or copy.name in shapes):
            tensors[copy.name] = tensors[copy.of]
    lacking = [] if options.strict else sorted(hub_names(model.family, model.facts) - tensors.keys())
    _check_no_holes(model, tensors, lacking)
    tensors = packing.packed(tensors, shapes or packing.usual(tensors, str(model.config.get("model_type"))))
    heads = [name for name in lacking if name in tie.HEADS]
    notices = [*model.notices, *(f"{name} IS NOT WRITTEN: {_NO_HEAD}" for name in heads)]
    if shapes:
        notices += _check_against(model, tensors, options)
    else:
        _check_shapes(model, tensors)
    tensors, said = _in_dtypes(model, tensors, options)
    assets = carried(model, options)
    config, changes = reconcile(model.config, tensors, headless=bool(heads))
    notices += [*said, *(f"config.json: {change}" for change in changes)]
    return replace(
        model.checkpoint, tensors=tensors, config=config, assets=assets, objects={}, paths={}, locate=None,
        dialect="hf", notices=tuple(notices),
    )  # fmt: skip


_NO_HEAD = "the checkpoint has none, and loaders fill it with random numbers, so that the model predicts nothing"


def _check_no_holes(model: Model, tensors: Mapping[str, Tensor], lacking: Sequence[str]) -> None:
    """Raise Incomplete where experts are missing of a tensor that holds all of a layer: what is not there has bytes."""
    shapes = model.reference.shapes if model.reference else {}
    is_packed = str(model.config.get("model_type")) in packing.TURNED_ON_HUB
    layers = {f"{at[1]}.{at[3]}" for name in tensors if (at := _EXPERT.fullmatch(name))}
    missing = [
        name for name in lacking
        if (at := _EXPERT.fullmatch(name)) and f"{at[1]}.{at[3]}" in layers
        and (is_packed or any(f"{at[1]}.{joint}" in shapes for joint in ("gate_up_proj", "up_proj")))
    ]  # fmt: skip
    if missing:
        raise Incomplete(
            f"{len(missing)} matrices of experts are missing, and the model has all experts of a layer in one tensor, "
            f"of which no part can be left out: {listed(missing)}",
            hint="is every shard there? --not-strict leaves out whole tensors only",
        )


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")


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
            hint="--hf-model names the model that was trained; --not-strict takes other names, never other shapes",
        )
    if optional:
        said.append(f"{len(optional)} tensors of its multi-token prediction are not in the checkpoint")
    return [f"{reference.path}: {sentence}" for sentence in said]


def _of_mtp(family: Family, facts: Facts) -> set[str]:
    """The hub's names of what predicts further tokens, copies of embedding and head among them."""
    with_it, without = (
        hub_names(family, some) | {copy.name for copy in copies(family, some)} for some in (facts, facts.without("mtp"))
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
