"""Checkpoints to measure on: `python -m bench.build KIND DIR [...]`.

    dense    Llama's layers at a width that gives the size asked for: fully_shard on 8 ranks; with --tp a 2-D mesh,
             whose row-parallel weights are cut in both dimensions
    moe      20,000 and more expert weights, each in 8 chunks of about 20 KB
    table    288,000 chunks in `.metadata`, and shard files of the right size that hold nothing
    sparse   Llama 3.1 405B on 128 ranks: every entry is framed by torch.save, and holes stand for the zeros within
    hf, torch_dist, zarr, config    a Llama as HuggingFace and Megatron have it: see build_megatron.py

dense and moe are saved by gloo processes through `torch.distributed.checkpoint.save`. The metadata of table and
sparse is assembled from torch's classes and written by its FileSystemWriter.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from bench import build_megatron
from bench.ranks import NUM_RANKS, Random, on_ranks

Shape = tuple[int, ...]


class Llama(nn.Module):
    """The parameters of a Llama, under their names on the hub."""

    def __init__(self, hidden: int, num_layers: int = 32) -> None:
        super().__init__()
        vocabulary = 31 * hidden
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.model.layers = nn.ModuleList(_layer(hidden) for _ in range(num_layers))
        self.model.norm = nn.RMSNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)


def _layer(hidden: int) -> nn.Module:
    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    layer = nn.Module()
    layer.self_attn, layer.mlp = nn.Module(), nn.Module()
    layer.self_attn.q_proj, layer.self_attn.o_proj = linear(hidden, hidden), linear(hidden, hidden)
    layer.self_attn.k_proj, layer.self_attn.v_proj = linear(hidden, hidden // 4), linear(hidden, hidden // 4)
    layer.mlp.gate_proj, layer.mlp.up_proj = linear(hidden, hidden * 7 // 2), linear(hidden, hidden * 7 // 2)
    layer.mlp.down_proj = linear(hidden * 7 // 2, hidden)
    layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
    return layer


def hidden_for(nbytes: float, itemsize: int) -> int:
    """The width at which a Llama of 32 layers has about so many bytes."""
    per_square = 32 * (2 + 2 / 4 + 3 * 7 / 2) + 2 * 31
    return max(64, round((nbytes / itemsize / per_square) ** 0.5 / 32) * 32)


def dense(path: Path, size_gb: float, dtype: torch.dtype, tp: int, seed: int) -> None:
    """A Llama as fully_shard leaves it; over tensor parallelism when `tp` is more than 1."""
    hidden = hidden_for(size_gb * 1e9, dtype.itemsize)

    def save(mesh: DeviceMesh) -> None:
        with torch.device("meta"):
            model = Llama(hidden).to(dtype)
        if tp > 1:
            parallelize_module(model, mesh["tp"], _tensor_parallel_plan())
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        model.to_empty(device="cpu")
        random = Random(dtype, seed + dist.get_rank())
        for parameter in model.parameters():
            random.fill(parameter.to_local())
        dcp.save({"model": model.state_dict()}, checkpoint_id=path)

    on_ranks(save, (NUM_RANKS // tp, tp))


def _tensor_parallel_plan() -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(),
        "lm_head": ColwiseParallel(),
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    return plan


def expert_names(num_layers: int) -> Iterator[str]:
    for layer in range(num_layers):
        for expert in range(128):
            for name in ("gate_proj", "up_proj", "down_proj"):
                yield f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"


def moe(path: Path, size_gb: float, seed: int) -> None:
    """20,736 expert weights and their routers, cut by rows."""
    hidden, intermediate, num_layers = max(8, round(size_gb * 160)), 256, 54
    shapes: dict[str, Shape] = dict.fromkeys(expert_names(num_layers), (intermediate, hidden))
    shapes |= {f"model.layers.{layer}.mlp.gate.weight": (128, hidden) for layer in range(num_layers)}

    def save(mesh: DeviceMesh) -> None:
        random = Random(torch.bfloat16, seed + dist.get_rank())
        weights = {}
        for name, (rows, columns) in shapes.items():
            local = torch.empty(rows // NUM_RANKS, columns, dtype=torch.bfloat16)
            random.fill(local)
            weights[name] = DTensor.from_local(local, mesh["dp"], [Shard(0)], run_check=False)
        dcp.save({"model": weights}, checkpoint_id=path)

    on_ranks(save, (NUM_RANKS, 1))


def table(path: Path) -> None:
    """36,000 tensors of 8 chunks; nobody who only inspects reads the shard files."""
    names = list(expert_names(94))[:36_000]
    _assemble(path, dict.fromkeys(names, (256, 320)), NUM_RANKS, framed=False)


def sparse(path: Path) -> None:
    """Llama 3.1 405B in bfloat16 on 128 ranks: 810 GB that take about 1 GB of disk."""
    hidden, intermediate, vocabulary, kv = 16384, 53248, 128256, 1024
    layer: dict[str, Shape] = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(126) for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    _assemble(path, shapes, 128, framed=True)


def _assemble(path: Path, shapes: dict[str, Shape], num_ranks: int, *, framed: bool) -> None:
    """A checkpoint of zeros, cut by rows, of which only what lies around the data is written."""
    path.mkdir(parents=True)
    properties = TensorProperties(dtype=torch.bfloat16)
    metadata = Metadata(
        {f"model.{name}": TensorStorageMetadata(properties, torch.Size(shape), []) for name, shape in shapes.items()},
        planner_data={f"model.{name}": ("model", name) for name in shapes},
    )
    results = [_write_rank(path, rank, num_ranks, shapes, metadata, framed) for rank in range(num_ranks)]
    writer = FileSystemWriter(path)
    writer.reset(path)
    writer.finish(metadata, results)


def _write_rank(
    path: Path, rank: int, num_ranks: int, shapes: dict[str, Shape], metadata: Metadata, framed: bool
) -> list[WriteResult]:
    file, offset, results = f"__{rank}_0.distcp", 0, []
    with open(path / file, "wb") as stream:
        for name, (rows, *rest) in shapes.items():
            sizes = torch.Size((rows // num_ranks, *rest))
            chunk = ChunkStorageMetadata(torch.Size((rank * sizes[0], *(0 for _ in rest))), sizes)
            metadata.state_dict_metadata[f"model.{name}"].chunks.append(chunk)
            head, nbytes, tail = _frame(sizes)
            length = len(head) + nbytes + len(tail)
            if framed:
                os.pwrite(stream.fileno(), head, offset)
                os.pwrite(stream.fileno(), tail, offset + length - len(tail))
            index = MetadataIndex(f"model.{name}", chunk.offsets)
            results.append(WriteResult(index, length, _StorageInfo(file, offset, length)))
            offset += length
        stream.truncate(offset)
    return results


@cache
def _frame(shape: torch.Size) -> tuple[bytes, int, bytes]:
    """What torch.save writes before the bytes of a tensor of zeros, how many those are, and what it writes behind."""
    buffer, zeros = BytesIO(), torch.zeros(shape, dtype=torch.bfloat16)
    torch.save(zeros, buffer)
    entry = buffer.getvalue()
    start = torch._C.PyTorchFileReader(BytesIO(entry)).get_record_offset("data/0")
    return entry[:start], zeros.nbytes, entry[start + zeros.nbytes :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("dense", "moe", "table", "sparse", *build_megatron.KINDS))
    parser.add_argument("path", type=Path)
    parser.add_argument("--size-gb", type=float, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    match args.kind:
        case "dense":
            dense(args.path, args.size_gb, getattr(torch, args.dtype), args.tp, args.seed)
        case "moe":
            moe(args.path, args.size_gb, args.seed)
        case "table":
            table(args.path)
        case "sparse":
            sparse(args.path)
        case kind:
            build_megatron.KINDS[kind](args.path, args.size_gb)


if __name__ == "__main__":
    main()
