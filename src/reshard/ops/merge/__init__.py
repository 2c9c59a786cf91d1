"""merge: shards in, a proven whole model out.

    find -> open -> the model's tensors under its own names -> hub names, ties, dtype -> plan -> run -> manifest

`prepare` is all of it up to the plan, which `verify --against` takes too; `merge` carries the plan out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reshard.core.checkpoint import Checkpoint
from reshard.core.compute import cast, lost_by
from reshard.core.dtypes import dtype
from reshard.errors import NotFound
from reshard.formats import open_found
from reshard.formats.detect import EMA, EXTRA, MODEL, OPTIMIZER, Found, find
from reshard.ops.merge import removal, shape
from reshard.ops.merge.options import Merged, Options, Prepared
from reshard.ops.merge.plan import kind_of, plan_of
from reshard.ops.merge.shape import WAYS, Ways
from reshard.storage import manifest
from reshard.storage.launch import Spread
from reshard.storage.plan import Plan
from reshard.storage.run import BLOCK_NBYTES, Progress, Result, run
from reshard.version import __version__


def merge(
    source: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    remove_shards: bool = False,
    threads: int | None = None,
    block_nbytes: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Merged:
    """Merge the checkpoint at `source` into `output` and prove it.

    The suffix of `output` says what is written: `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` a file, anything else
    a HuggingFace directory. `options` are the fields of `Options`. Raises InputError before anything is written when
    the source is incomplete or damaged as far as headers tell; whatever is raised later leaves no output.
    """
    prepared = prepare(Path(source), Path(output), Options(**options))
    return carry_out(
        prepared, Path(output), force=force, remove_shards=remove_shards, threads=threads,
        block_nbytes=block_nbytes, progress=progress,
    )  # fmt: skip


def whole_model(source: Path, options: Options, ways: Ways = WAYS) -> tuple[Found, Checkpoint, Checkpoint]:
    """(what was found, all that was read, the model under the hub's names), from headers alone."""
    found = find(source, step=options.step, state_dict_dirname=options.state_dict_dirname)
    opened = shape.accompanied(open_found(found, (MODEL,), verify=options.verify), found, options, ways)
    model = shape.shaped(shape.chosen(opened, options), keep_names=False, ways=ways)
    return found, opened, shape.as_huggingface(model, whole=True, ways=ways).located()


def prepare(source: Path, output: Path, options: Options) -> Prepared:
    """Everything up to the plan, from headers alone."""
    from reshard.formats import huggingface

    roles = {"model": (MODEL,), "optimizer": (OPTIMIZER, MODEL), "all": (MODEL, OPTIMIZER, EMA, EXTRA)}[options.what]
    found = find(source, step=options.step, state_dict_dirname=options.state_dict_dirname)
    opened = open_found(found, roles, verify=options.verify)
    opened = shape.accompanied(opened, found, options)
    checkpoint = shape.chosen(opened, options)
    kind = kind_of(output)
    if options.what == "model":
        checkpoint = shape.shaped(checkpoint, options.keep_names)
        if not options.keep_names and kind != "torch_save":
            checkpoint = shape.as_huggingface(checkpoint, whole=not (options.include or options.exclude))
    else:
        shape.check_optimizer(checkpoint)
    if options.dtype is not None:
        to = dtype(options.dtype)
        checkpoint = replace(checkpoint, tensors={n: cast(t, to) for n, t in checkpoint.tensors.items()})
    if not checkpoint.tensors:
        raise NotFound(f"{found.root}: no tensor is left to write", hint="see `reshard inspect` for the names")
    is_model = options.what == "model" and not huggingface.is_adapter(checkpoint)
    if kind == "huggingface" and is_model and opened.config is None:
        said = "there is no config.json beside the checkpoint, so the output has none: --base brings it"
        checkpoint = replace(checkpoint, notices=(*checkpoint.notices, said))
    if kind == "huggingface" and options.what != "model":
        said = "a directory of more than a model: loaders will not know the other names; .pt holds them nested"
        checkpoint = replace(checkpoint, notices=(*checkpoint.notices, said))
    return planned(found.root, opened, checkpoint, output, options)


def planned(
    root: Path,
    opened: Checkpoint,
    checkpoint: Checkpoint,
    output: Path,
    options: Options,
    recipe: Mapping[str, Any] | None = None,
) -> Prepared:
    """The plan of a checkpoint that has its final tensors; `recipe` goes into the manifest, under `source`."""
    kind = kind_of(output)
    checkpoint, plan = plan_of(root, checkpoint, output, options)
    origin = checkpoint.origin
    source_facts = {
        "path": str(origin.path), "format": origin.format, "writer": origin.writer, "step": origin.step,
        "files": [str(f.relative_to(origin.path) if f.is_relative_to(origin.path) else f) for f in origin.files],
    }  # fmt: skip
    facts = {"source": source_facts | dict(recipe or {}), "options": options.record(), "output": kind}
    plan = manifest.with_manifest(replace(plan, facts=facts), __version__)
    return Prepared(root, opened, checkpoint, plan, checkpoint.notices, options.verify)


def carry_out(
    prepared: Prepared,
    output: Path,
    *,
    force: bool = False,
    remove_shards: bool = False,
    threads: int | None = None,
    block_nbytes: int | None = None,
    progress: Progress | None = None,
    spread: Spread | None = None,
    tell: Callable[[], Sequence[str]] | None = None,
) -> Merged:
    """Write what was prepared; remove the shards afterwards, when that was asked for and all is proven.

    What `tell` says when all is read follows the notices.
    """
    removal.check_replaceable(output, prepared.plan)
    if remove_shards:
        removal.check_removable(prepared)
    result = run(
        prepared.plan, output, threads=threads, block_nbytes=block_nbytes or BLOCK_NBYTES, force=force,
        progress=progress, spread=spread, tell=lambda: (*(tell() if tell else ()), *_overflows(prepared.plan)),
    )  # fmt: skip
    if result.is_first and (remove_shards or prepared.verify):
        removal.read_again(output, threads)
    removed = removal.remove(prepared) if remove_shards and result.is_first else ()
    return _merged(prepared, result, removed)


def _overflows(plan: Plan) -> Iterator[str]:
    """A sentence for each tensor with numbers that its new dtype has no room for."""
    for _, _, _, fqn, tensor in plan.tensors():
        lost = lost_by(tensor)
        if lost:
            kind = tensor.dtype
            yield f"{fqn}: {lost} numbers are beyond the range of {kind.torch}, and became infinite or NaN in it"


def _merged(prepared: Prepared, result: Result, removed: Sequence[Path]) -> Merged:
    origin = prepared.checkpoint.origin
    return Merged(
        result.destination, origin.path, origin.format, origin.step, result.num_tensors, result.nbytes,
        prepared.plan.read_nbytes(), result.num_checked, result.kept_nbytes, result.seconds,
        prepared.notices + result.told, tuple(removed),
    )  # fmt: skip


def default_output(source: Path) -> Path:
    """Where a merge goes when no output is named: beside the checkpoint, under a name no trainer takes for its own."""
    source = source.resolve()
    return source.parent / f"merged-{source.name}"


__all__ = [
    "Merged",
    "Options",
    "Prepared",
    "Ways",
    "carry_out",
    "default_output",
    "kind_of",
    "merge",
    "planned",
    "prepare",
    "whole_model",
]
