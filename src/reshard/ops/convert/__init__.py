"""convert: a model from one format and dialect to another.

    HuggingFace -> hub names -> (family's table) -> Megatron's names -> (layout) -> names on disk -> plan
    Megatron    -> names on disk -> Megatron's names -> (the same table) -> hub names -> plan

`prepare` is all of it up to the plan, from headers; `merge.carry_out` carries the plan out.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from reshard.errors import InputError, Mismatch, NotFound
from reshard.formats.megatron import locate
from reshard.ops.convert.model import of_huggingface, of_megatron
from reshard.ops.convert.options import FORMATS, Format, Options, check, check_mesh, format_named, unheeded
from reshard.ops.convert.to_huggingface import to_huggingface
from reshard.ops.convert.to_megatron import to_megatron
from reshard.ops.merge import Merged, Prepared, carry_out
from reshard.storage import manifest
from reshard.storage.launch import Spread
from reshard.storage.run import Progress
from reshard.version import __version__

_WRITTEN_AS = {"hf": "huggingface", "torch_dist": "torch_dist", "fsdp_dtensor": "fsdp_dtensor", "nemo2": "nemo2"}


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


def prepare(source: Path | str, output: Path, options: Options) -> Prepared:
    """Everything up to the plan, from headers alone. Raises InputError for all that headers can reveal."""
    format_named(options.to)
    check(options)
    check_mesh(options)
    where, from_megatron = Path(source), is_megatron(Path(source))
    said = unheeded(options, is_megatron=from_megatron)
    try:
        model = of_megatron(where, options) if from_megatron else of_huggingface(str(source), options)
        checkpoint, plan = to_huggingface(model, options) if options.to == "hf" else to_megatron(model, options)
    except InputError as error:
        raise _with_path(error, str(source)) from error
    origin = checkpoint.origin
    source_facts = {
        "path": str(origin.path), "format": origin.format, "writer": origin.writer, "step": origin.step,
        "convert": options.record(), "family": model.family.name,
    }  # fmt: skip
    facts = {"source": source_facts, "options": {}, "output": _WRITTEN_AS[options.to]}
    plan = manifest.with_manifest(replace(plan, facts=facts), __version__)
    return Prepared(origin.path, model.checkpoint, checkpoint, plan, (*said, *checkpoint.notices), options.verify)


def _with_path(error: InputError, source: str) -> InputError:
    """The error, with the source before what it says where that names no path, and a next step where it has none."""
    said = str(error) if os.sep in str(error) or source in str(error) else f"{source}: {error}"
    hint = "is the config.json, or the --hf-model, that of these tensors?" if isinstance(error, Mismatch) else None
    return type(error)(said, hint=error.hint or hint)


def is_megatron(source: Path) -> bool:
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


__all__ = ["FORMATS", "Format", "Options", "convert", "format_named", "is_megatron", "prepare"]
