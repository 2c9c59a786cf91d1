"""Plans of torch tensors, carried out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from checkpoints import bits
from reshard.core.dtypes import dtype
from reshard.core.tensor import Filled, Literal, Tensor
from reshard.storage.manifest import with_manifest
from reshard.storage.plan import FilePlan, Plan
from reshard.storage.run import run

KEYS = Path(__file__).parent / "data" / "megatron" / "keys"


def literal(tensor: torch.Tensor) -> Tensor:
    """A tensor that needs no file to be read."""
    return Literal(dtype(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape), bits(tensor))


def literals(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    """The same under their names."""
    return {name: literal(tensor) for name, tensor in tensors.items()}


def write(files: Iterable[FilePlan], destination: Path) -> Path:
    """The directory that the engine makes of files, with a manifest in it."""
    facts = {"source": {}, "options": {}, "output": "directory"}
    run(with_manifest(Plan(tuple(files), facts), "0"), destination, threads=2)
    return destination


def keys_of(name: str) -> tuple[dict[str, Tensor], list[str]]:
    """The names of a directory that Megatron wrote: its tensors, here zeros, and its objects."""
    said = json.loads((KEYS / f"{name}.json").read_text())
    zero = {name: Filled(dtype("bfloat16"), tuple(shape), bytes(2)) for name, shape in said["tensors"].items()}
    return dict(zero), said["objects"]
