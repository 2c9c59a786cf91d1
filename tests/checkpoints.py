"""Checkpoints of several ranks, written by torch's own DCP writer in one process and without a process group.

Each rank's plan names its chunks as a DTensor would, `FileSystemWriter` writes the files, torch makes the global
metadata. What is in the files is therefore what torch writes, and what should come out is the dict that went in.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

ROOT = Path(__file__).parent.parent


def write_dcp(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    ranks: int = 2,
    dim: int = 0,
    objects: Mapping[str, Any] | None = None,
    replicated: Sequence[str] = (),
    prefix: tuple[str, ...] = (),
    paths: Mapping[str, tuple[str, ...]] | None = None,
    **writer_options: Any,
) -> Path:
    """A DCP of `ranks` ranks, each tensor cut along `dim` as `torch.chunk` does; those named in `replicated`, and
    those of too few dimensions, whole on rank 0. `prefix` is the path of keys above the tensors, `paths` gives single
    ones in full."""
    path.mkdir(parents=True, exist_ok=True)
    writer = FileSystemWriter(path, **writer_options)
    writer.set_up_storage_writer(True)
    data: dict[tuple[int, str], Any] = {}
    plans = [SavePlan([], planner_data={}) for _ in range(ranks)]
    items: list[list[WriteItem]] = [[] for _ in range(ranks)]
    for fqn, tensor in tensors.items():
        name = ".".join((*prefix, fqn))
        whole = fqn in replicated or tensor.ndim <= dim
        pieces = [tensor] if whole else list(torch.chunk(tensor, ranks, dim))
        at = 0
        for rank in range(1 if whole else ranks):
            piece = pieces[rank] if rank < len(pieces) else tensor.narrow(dim, tensor.shape[dim], 0)
            offsets = torch.Size(at if d == dim and not whole else 0 for d in range(tensor.ndim))
            at += 0 if whole else piece.shape[dim]
            items[rank].append(
                WriteItem(
                    MetadataIndex(name, offsets, rank),
                    WriteItemType.TENSOR if whole else WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        ChunkStorageMetadata(offsets, piece.shape), TensorProperties.create_from_tensor(tensor),
                        tensor.shape,
                    ),
                )
            )  # fmt: skip
            data[rank, name] = piece.detach()
    for name, value in (objects or {}).items():
        items[0].append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
        data[0, name] = value
    given = dict(paths or {})
    paths = {".".join((*prefix, fqn)): (*prefix, fqn) for fqn in tensors} | {name: (name,) for name in objects or {}}
    paths |= given
    plans = [writer.prepare_local_plan(SavePlan(rank_items, planner_data=paths)) for rank_items in items]
    plans, metadata = create_default_global_save_plan(plans)
    metadata.planner_data = paths
    plans = writer.prepare_global_plan(plans)
    results = [writer.write_data(plan, _Planner(rank, data)).wait() for rank, plan in enumerate(plans)]
    writer.finish(metadata, results)
    return path


class _Planner:
    """Hands the writer what one rank holds."""

    def __init__(self, rank: int, data: Mapping[tuple[int, str], Any]) -> None:
        self._rank, self._data = rank, data

    def resolve_data(self, item: WriteItem) -> Any:
        value = self._data[self._rank, item.index.fqn]
        if item.type != WriteItemType.BYTE_IO:
            return value
        out = io.BytesIO()
        torch.save(value, out)
        return out


def model(num_layers: int = 2, width: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """The tensors of a small made-up model: matrices, vectors whose size does not divide, a counter."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors: dict[str, torch.Tensor] = {"embed.weight": random(3 * width + 1, width)}
    for i in range(num_layers):
        tensors[f"layers.{i}.up.weight"] = random(2 * width, width)
        tensors[f"layers.{i}.down.weight"] = random(width, 2 * width)
        tensors[f"layers.{i}.norm.weight"] = random(width - 1)
    tensors["steps"] = torch.tensor([2**53 + 1, 7 + seed])
    return tensors


def child(*args: str | Path, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """`reshard ARGS` in a process of its own."""
    command = [sys.executable, "-m", "reshard", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, **options)


def equals(path: Path, wanted: Mapping[str, torch.Tensor]) -> bool:
    """Whether a safetensors file, or the files of a directory, hold exactly these tensors, bit for bit, as the
    safetensors library reads them."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(file)
    return found.keys() == wanted.keys() and all(same(found[fqn], wanted[fqn]) for fqn in wanted)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit are equal."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's elements, row-major."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def left_in(directory: Path) -> list[str]:
    """All names under a directory, sorted: what a failure must not have added to."""
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


PEAK = """
import gc, json, sys
from reshard.cli.main import main
gc.disable()  # as the command does
code = main(sys.argv[1:])
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(json.dumps({"code": code, "peak_nbytes": peak * 1024}))
"""


def peak_nbytes(*args: str | Path) -> int:
    """The peak resident memory of `reshard ARGS`, which must succeed.

    VmHWM, not ru_maxrss: the latter is inherited from the parent over exec.
    """
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["code"] == 0, done.stderr
    return int(said["peak_nbytes"])
