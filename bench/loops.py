"""Conversions by other means, each a process of its own: `python -m bench.loops NAME SRC OUT`.

to_torch_dist, to_fsdp_dtensor, from_torch_dist    what a script of one's own does: safetensors, torch, torch's DCP
mbridge_import, mbridge_export                     mbridge's own code, into and out of Megatron-Core's model on the CPU

The scripts know one model, that of `build_megatron.py`; they check nothing and flush nothing.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HEAD_ROWS = 64
ITERATION = "iter_0000001"
Tensors = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------------------ plain loops


def to_torch_dist(source: Path, output: Path) -> None:
    """Stacked layers in the model's dtype."""
    layers: dict[str, list[torch.Tensor]] = {}
    state: Tensors = {}
    for name, tensor in _megatron(_load(source)):
        number, _, rest = name.removeprefix("decoder.layers.").partition(".")
        if number.isdecimal():
            layers.setdefault(f"decoder.layers.{rest}", []).append(tensor)
        else:
            state[name] = tensor
    state |= {name: torch.stack(tensors) for name, tensors in layers.items()}
    _save(state, output)


def to_fsdp_dtensor(source: Path, output: Path) -> None:
    """Numbered layers, gates cut in two, float32."""
    state: Tensors = {}
    for name, tensor in _megatron(_load(source)):
        key, tensor = f"model.module.{name}", tensor.float()
        if name.endswith("linear_fc1.weight"):
            state[f"{key}_w"], state[f"{key}_v"] = tensor.chunk(2)
        else:
            state[key] = tensor
    _save(state, output)


def from_torch_dist(source: Path, output: Path) -> None:
    """The hub's tensors, in one file."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(source / ITERATION)
    entries = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    output.mkdir()
    save_file(dict(_hub(state)), output / "model.safetensors", {"format": "pt"})


def _load(source: Path) -> Tensors:
    weights: Tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return weights


def _save(state: Tensors, output: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=output / ITERATION, no_dist=True)


_PLAIN = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
    "self_attention.linear_proj.weight": "self_attn.o_proj",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
    "mlp.linear_fc2.weight": "mlp.down_proj",
}


def _megatron(weights: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Megatron's tensors, layer by layer."""
    for ours, theirs in _PLAIN.items():
        yield ours, weights[theirs]
    num_layers = sum(name.endswith("q_proj.weight") for name in weights)
    for layer in range(num_layers):
        at, to = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for ours, theirs in _LAYER.items():
            yield to + ours, weights[f"{at}{theirs}.weight"]
        q, k, v = (weights[f"{at}self_attn.{n}_proj.weight"] for n in "qkv")
        groups, width = len(k) // HEAD_ROWS, q.shape[1]
        parts = [t.view(groups, -1, width) for t in (q, k, v)]
        yield to + "self_attention.linear_qkv.weight", torch.cat(parts, 1).view(-1, width)
        gate, up = (weights[f"{at}mlp.{n}_proj.weight"] for n in ("gate", "up"))
        yield to + "mlp.linear_fc1.weight", torch.cat((gate, up))


def _hub(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The hub's tensors of stacked layers."""
    for ours, theirs in _PLAIN.items():
        yield theirs, state[ours]
    stacks = "decoder.layers."
    for ours, theirs in _LAYER.items():
        for layer, tensor in enumerate(state[stacks + ours]):
            yield f"model.layers.{layer}.{theirs}.weight", tensor.contiguous()
    for layer, qkv in enumerate(state[f"{stacks}self_attention.linear_qkv.weight"]):
        groups = len(qkv) // (6 * HEAD_ROWS)
        parts = qkv.view(groups, 6 * HEAD_ROWS, -1).split((4 * HEAD_ROWS, HEAD_ROWS, HEAD_ROWS), 1)
        for name, part in zip("qkv", parts, strict=True):
            yield f"model.layers.{layer}.self_attn.{name}_proj.weight", part.reshape(-1, qkv.shape[1])
    for layer, fc1 in enumerate(state[f"{stacks}mlp.linear_fc1.weight"]):
        for name, part in zip(("gate", "up"), fc1.chunk(2), strict=True):
            yield f"model.layers.{layer}.mlp.{name}_proj.weight", part.clone()


# ----------------------------------------------------------------------------------------------------------- mbridge


def mbridge_import(source: Path, output: Path) -> None:
    from megatron.core import dist_checkpointing

    bridge, model = _mbridge(source)
    bridge.load_weights([model], str(source))
    (output / ITERATION).mkdir(parents=True)
    if not torch.cuda.is_available():  # Megatron waits for a GPU before it writes, and counts failures on it
        torch.cuda.synchronize, torch.cuda.current_device = (lambda *_: None), (lambda: "cpu")
    dist_checkpointing.save(model.sharded_state_dict(metadata=_METADATA), str(output / ITERATION))


def mbridge_export(reference: Path, source: Path, output: Path) -> None:
    from megatron.core import dist_checkpointing

    bridge, model = _mbridge(reference)
    wanted = model.sharded_state_dict(metadata=_METADATA)
    names = list(wanted)
    found = dist_checkpointing.load(wanted, str(source / ITERATION))
    model.load_state_dict({name: found[name] for name in names})
    bridge.safetensor_io = bridge._get_safetensor_io(str(reference))
    with torch.no_grad():
        bridge.save_weights([model], str(output))


_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def _mbridge(path: Path) -> tuple[Any, Any]:
    """mbridge for a model, and the model on the CPU: local modules, since Transformer Engine is for GPUs alone."""
    from mbridge import AutoBridge
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    store = Path(tempfile.mkdtemp()) / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    bridge = AutoBridge.from_pretrained(str(path))
    bridge.set_extra_args(use_cpu_initialization=True, perform_initialization=False, masked_softmax_fusion=False)
    engine_names = bridge._weight_name_mapping_mcore_to_hf
    bridge._weight_name_mapping_mcore_to_hf = lambda name: engine_names(
        name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight").replace(
            ".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"
        )
    )
    spec = get_gpt_decoder_block_spec(bridge.config, use_transformer_engine=False, normalization="RMSNorm")
    model = GPTModel(
        bridge.config, spec, vocab_size=bridge.hf_config.vocab_size, max_sequence_length=16,
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    )  # fmt: skip
    return bridge, model.bfloat16()


if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    globals()[name](*map(Path, paths))
