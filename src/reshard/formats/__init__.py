"""Formats: bytes on disk, one module each, both directions where there are two.

`detect.find` says what a path is; `open_part` reads one part of it with the module of its format; `open_found` puts the
parts together. A format's `open` reads headers only. A new format is one new file here and its line in `detect`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from reshard.core.checkpoint import Checkpoint, KeyPath
from reshard.core.tensor import Tensor
from reshard.errors import Corrupt, listed
from reshard.formats.detect import EMA, MODEL, OPTIMIZER, Found, Part, find

FORMATS = (
    "dcp", "rank_files", "dcp_safetensors", "huggingface", "safetensors", "torch_save", "deepspeed", "megatron", "zarr",
)  # fmt: skip


HAVE_REPLICAS = ("dcp", "rank_files", "megatron")
"""Formats in which several ranks may hold copies of the same data."""


def open_part(part: Part, *, verify: bool = False) -> Checkpoint:
    """The checkpoint of one part; with `verify` copies that several ranks hold are read and compared."""
    module = import_module(f"reshard.formats.{part.format}")
    more = {"verify": True} if verify and part.format in HAVE_REPLICAS else {}
    checkpoint: Checkpoint = module.open(part.path, *([part.kind] if part.kind else []), **more)
    return checkpoint


def open_found(found: Found, roles: tuple[str, ...] = (MODEL,), *, verify: bool = False) -> Checkpoint:
    """The parts of these roles as one checkpoint, with the origin of the whole.

    Names of an optimizer part get `optimizer.` in front unless they have it, those of averaged weights `ema.`. Raises
    Corrupt when two parts hold one FQN.
    """
    parts = [(part, open_part(part, verify=verify)) for part in found.parts if part.role in roles]
    first = parts[0][1]
    writer = first.origin.writer if first.origin.writer.startswith(found.writer) else found.writer
    step = first.origin.step if found.step is None else found.step
    origin = replace(first.origin, path=found.root, writer=writer, step=step)
    if len(parts) == 1:
        return replace(first, origin=origin, notices=found.notices + first.notices)
    tensors: dict[str, Tensor] = {}
    objects: dict[str, Any] = {}
    paths: dict[str, KeyPath] = {}
    twice: list[str] = []
    for part, checkpoint in parts:
        located = checkpoint.located()
        container = _container(part, checkpoint)
        prefix = f"{container}." if container else ""
        for fqn, tensor in located.tensors.items():
            if prefix + fqn in tensors:
                raise Corrupt(f"{prefix + fqn} is in two parts of {found.root}: {part.path} and another")
            tensors[prefix + fqn] = tensor
            path = checkpoint.path(fqn)
            paths[prefix + fqn] = (container, *path) if container else path
        for name, value in checkpoint.objects.items():
            twice += [prefix + name] if prefix + name in objects else []
            objects[prefix + name] = value
            paths[prefix + name] = (container, *checkpoint.path(name)) if container else checkpoint.path(name)
    files = tuple(file for _, checkpoint in parts for file in checkpoint.origin.files)
    notices = found.notices + tuple(n for _, checkpoint in parts for n in checkpoint.notices)
    if twice:
        notices += (f"in several parts of {found.root}, of which the last counts: {listed(twice)}",)
    return replace(
        first,
        tensors=tensors,
        objects=objects,
        paths=paths,
        origin=replace(origin, files=files),
        notices=notices,
        locate=None,
    )


def _container(part: Part, checkpoint: Checkpoint) -> str:
    """What is put above the names of a part, which would be the model's otherwise; empty where nothing is."""
    if part.role == OPTIMIZER and not _is_prefixed(checkpoint):
        return "optimizer"
    return "ema" if part.role == EMA else ""


def _is_prefixed(checkpoint: Checkpoint) -> bool:
    names = list(checkpoint) or checkpoint.objects  # one that has not stepped yet has no tensors
    return all(str(checkpoint.path(name)[0]).startswith("optim") for name in names)


def open_path(path: Path, **choices: str | int | None) -> Checkpoint:
    """What is at a path: `detect.find`, then `open_found`."""
    return open_found(find(path, **choices))  # type: ignore[arg-type]
