"""One Llama as HuggingFace, Megatron-Core and zarr have it.

    hf          config.json and four files of safetensors
    torch_dist  layers stacked; saved by 8 gloo processes, 4 pipeline stages of 2 tensor-parallel ranks
    zarr        the same tensors, a chunk for each layer and tensor-parallel rank, by hand: zarr has no other bytes
    config      config.json alone, for conversions that only need to know what it is

Heads have 64 rows, and four of them share a key and a value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from bench.ranks import Random, on_ranks

NUM_LAYERS = 32
TENSOR_PARALLEL = 2
HEAD_ROWS = 64
NUM_FILES = 4
ITERATION = "iter_0000001"

Shape = tuple[int, ...]


def width_for(size_gb: float) -> int:
    """The width at which the model has about so many bytes in bfloat16: a multiple of four heads."""
    per_square = NUM_LAYERS * 13 + 2 * 31
    unit = 4 * HEAD_ROWS
    return max(unit, round((size_gb * 1e9 / 2 / per_square) ** 0.5 / unit) * unit)


def hf(path: Path, size_gb: float) -> None:
    """A model directory as the hub has it."""
    shapes = dict(hub_shapes(width_for(size_gb)))
    config(path, size_gb)
    random, names, weight_map = Random(torch.bfloat16, 0), list(shapes), {}
    for number in range(NUM_FILES):
        file = f"model-{number + 1:05d}-of-{NUM_FILES:05d}.safetensors"
        held = names[number * len(names) // NUM_FILES : (number + 1) * len(names) // NUM_FILES]
        save_file({name: _filled(shapes[name], random) for name in held}, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def config(path: Path, size_gb: float) -> None:
    width = width_for(size_gb)
    path.mkdir(parents=True)
    said = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "head_dim": HEAD_ROWS,
        "intermediate_size": width * 7 // 2, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": width // HEAD_ROWS,
        "num_key_value_heads": width // HEAD_ROWS // 4, "vocab_size": 31 * width, "tie_word_embeddings": False,
        "dtype": "bfloat16", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 4096,
        "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(said))


def hub_shapes(width: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the hub."""
    inner = width * 7 // 2
    yield "model.embed_tokens.weight", (31 * width, width)
    for layer in range(NUM_LAYERS):
        for name, shape in (
            ("input_layernorm", (width,)), ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (width // 4, width)), ("self_attn.v_proj", (width // 4, width)),
            ("self_attn.o_proj", (width, width)), ("post_attention_layernorm", (width,)),
            ("mlp.gate_proj", (inner, width)), ("mlp.up_proj", (inner, width)), ("mlp.down_proj", (width, inner)),
        ):  # fmt: skip
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (31 * width, width)


def stacked_shapes(width: int) -> dict[str, tuple[Shape, int | None]]:
    """Megatron's keys: shape, and the dimension that tensor-parallel ranks cut."""
    inner, layers = width * 7 // 2, "decoder.layers"
    return {
        "embedding.word_embeddings.weight": ((31 * width, width), 0),
        f"{layers}.self_attention.linear_qkv.layer_norm_weight": ((NUM_LAYERS, width), None),
        f"{layers}.self_attention.linear_qkv.weight": ((NUM_LAYERS, width * 3 // 2, width), 1),
        f"{layers}.self_attention.linear_proj.weight": ((NUM_LAYERS, width, width), 2),
        f"{layers}.mlp.linear_fc1.layer_norm_weight": ((NUM_LAYERS, width), None),
        f"{layers}.mlp.linear_fc1.weight": ((NUM_LAYERS, 2 * inner, width), 1),
        f"{layers}.mlp.linear_fc2.weight": ((NUM_LAYERS, width, inner), 2),
        "decoder.final_layernorm.weight": ((width,), None),
        "output_layer.weight": ((31 * width, width), 0),
    }


def torch_dist(path: Path, size_gb: float) -> None:
    """A run directory of Megatron-LM with one iteration, weights only."""
    shards = path / ITERATION

    def save(mesh: DeviceMesh) -> None:
        state: dict[str, object] = {}
        for name, (shape, cut) in stacked_shapes(width_for(size_gb)).items():
            stages: Placement = Shard(0) if ".layers." in name else Replicate()
            state[name] = _distributed(shape, (stages, Replicate() if cut is None else Shard(cut)), mesh)
        dcp.save(state | _extra_states(), checkpoint_id=shards, planner=DefaultSavePlanner(flatten_state_dict=False))

    on_ranks(save, (4, TENSOR_PARALLEL))
    _finish(path, "torch_dist")


def _distributed(shape: Shape, placements: tuple[Placement, Placement], mesh: DeviceMesh) -> DTensor:
    empty = distribute_tensor(torch.empty(shape, dtype=torch.bfloat16, device="meta"), mesh, placements)
    local = _filled(tuple(empty.to_local().shape), Random(torch.bfloat16, sum(mesh.get_coordinate() or ())))
    return DTensor.from_local(local, mesh, placements, run_check=False)


def _extra_states() -> dict[str, object]:
    """What loaders demand of each module of Transformer Engine."""
    modules = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    places = [(f"decoder.layers.{m}", i, NUM_LAYERS) for m, i in product(modules, range(NUM_LAYERS))]
    places.append(("decoder.final_layernorm", 0, 1))
    return {f"{m}._extra_state/shard_{i}_{n}": [torch.empty(0, dtype=torch.uint8)] for m, i, n in places}


def zarr(path: Path, size_gb: float) -> None:
    """A run directory of Megatron-LM up to core 0.15."""
    random = Random(torch.bfloat16, 0)
    for name, (shape, cut) in stacked_shapes(width_for(size_gb)).items():
        chunk = list(shape)
        if ".layers." in name:
            chunk[0] = 1
        if cut is not None:
            chunk[cut] //= TENSOR_PARALLEL
        _write_array(path / ITERATION / name, shape, tuple(chunk), random)
    _finish(path, "zarr")


def _write_array(path: Path, shape: Shape, chunk: Shape, random: Random) -> None:
    said = {
        "zarr_format": 2, "shape": shape, "chunks": chunk, "dtype": "bfloat16", "compressor": None, "filters": None,
        "fill_value": None, "order": "C",
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / ".zarray").write_text(json.dumps(said))
    for at in product(*(range(size // step) for size, step in zip(shape, chunk, strict=True))):
        data = _filled(chunk, random).view(torch.uint8).numpy()
        (path / ".".join(map(str, at))).write_bytes(data)


def _finish(path: Path, backend: str) -> None:
    """What Megatron wants beside the tensors."""
    kinds = {"sharded_backend": backend, "common_backend": "torch"}
    versions = {f"{name}_version": 1 for name in kinds}
    (path / ITERATION / "metadata.json").write_text(json.dumps(kinds | versions))
    torch.save({"checkpoint_version": 3.0, "iteration": 1}, path / ITERATION / "common.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("1")


def _filled(shape: Shape, random: Random) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    random.fill(tensor)
    return tensor


KINDS: Mapping[str, Callable[[Path, float], None]] = {
    "hf": hf, "torch_dist": torch_dist, "zarr": zarr, "config": config,
}  # fmt: skip
"""What `bench.build` builds for conversions."""
