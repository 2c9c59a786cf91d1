"""A directory as users have it: a run of every system that shards its checkpoints, made by torch from one tiny model.

Rank files hold DTensors that torch made as rank R of a process group that only pretends; no other process is started.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed._shard.sharded_tensor import utils as sharded_tensor_utils
from torch.distributed._shard.sharding_spec import api as sharding_spec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import tiny_models
from checkpoints import write_dcp

EXAMPLES = Path(__file__).parent.parent / "examples"
BASE = "meta-llama/Llama-3.1-8B"
"""A directory of this name is taken before the hub is asked."""
EVALUATION = f"""
eval_strategy: steps
eval_config:
  backend: command
  base: {BASE}
  poll_interval: 0.05
  tasks: [mmmu_val]
  command: [sh, -c, 'echo "{{\\"mmmu_val\\": {{\\"mmmu_acc\\": 0.$1}}}}" > "$2"', sh, "{{step}}", "{{output}}"]
"""
"""Settings of `reshard watch`; what evaluates likes later steps better."""
Tensors = Mapping[str, torch.Tensor]


def state_of(model_type: str = "llama", seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a tiny model, as training holds it."""
    return {fqn: tensor.clone() for fqn, tensor in tiny_models.make(model_type, seed).state_dict().items()}


def write_base(directory: Path, model_type: str = "llama") -> Path:
    """Config and tokenizer, as a model on the hub has them; no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    model = tiny_models.make(model_type)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.config.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLES / "base" / name, directory / name)
    return directory


def write_rank_files(directory: Path, tensors: Tensors, *, ranks: int = 2, name: str = "", replicas: int = 1) -> Path:
    """A file a rank of DTensors, cut along their first dimension; with `replicas`, on a mesh of two axes."""
    directory.mkdir(parents=True, exist_ok=True)
    name = name or f"model_world_size_{ranks}_rank_{{rank}}.pt"
    for rank in range(ranks):
        torch.save(_as_rank(rank, ranks, replicas, tensors), directory / name.format(rank=rank))
    return directory


def _as_rank(rank: int, ranks: int, replicas: int, tensors: Tensors) -> dict[str, DTensor]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        shape, names = ((ranks,), ("fsdp",)) if replicas == 1 else ((replicas, ranks // replicas), ("ddp", "fsdp"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        placements = [Shard(0)] if replicas == 1 else [Replicate(), Shard(0)]
        num_parts, part = shape[-1], rank % shape[-1]
        held = {}
        for fqn, tensor in tensors.items():
            pieces = torch.chunk(tensor, num_parts)
            piece = pieces[part] if part < len(pieces) else tensor[:0]
            held[fqn] = DTensor.from_local(
                piece.clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        return held
    finally:
        dist.destroy_process_group()


def write_trainer(directory: Path, tensors: Tensors, *, ranks: int = 2, optimizer: bool = True) -> Path:
    """`checkpoint-N/` as the Trainer of transformers leaves it: no config, no tokenizer."""
    write_dcp(directory / "pytorch_model_fsdp_0", tensors, ranks=ranks, prefix=("model",))
    if optimizer:
        moments = {
            f"state.{fqn}.{m}": torch.zeros_like(t) for fqn, t in tensors.items() for m in ("exp_avg", "exp_avg_sq")
        }
        write_dcp(directory / "optimizer_0", moments, ranks=ranks, prefix=("optimizer",))
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 500, "max_steps": 500}))
    torch.save({"last_epoch": 1}, directory / "scheduler.pt")
    return directory


def write_lmms(directory: Path, tensors: Tensors, ema: Tensors | None = None) -> Path:
    """`checkpoint-N/` of LMMs-Engine: a file a rank in directories that are named as accelerate's."""
    write_base(directory)
    write_rank_files(directory / "pytorch_model_fsdp_0", tensors)
    if ema is not None:
        write_rank_files(directory / "pytorch_ema_model_fsdp_0", ema)
    write_rank_files(directory / "optimizer", tensors, name="optimizer_world_size_2_rank_{rank}.pt")
    (directory / "extra_state").mkdir()
    for rank in range(2):
        torch.save(
            {"step": 4, "rng": torch.get_rng_state()},
            directory / f"extra_state/extra_state_world_size_2_rank_{rank}.pt",
        )
    return directory


def write_verl(directory: Path, tensors: Tensors) -> Path:
    """`global_step_N/actor/` of verl, with `huggingface/` inside."""
    write_rank_files(directory, tensors)
    write_rank_files(directory, tensors, name="optim_world_size_2_rank_{rank}.pt")
    (directory / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))
    write_base(directory / "huggingface")
    return directory


def write_lightning(directory: Path, tensors: Tensors, root: str = "state_dict", attribute: str = "llm.") -> Path:
    """`NAME.ckpt/` of Lightning and NeMo 2: a DCP, and `meta.pt` for the rest."""
    everything = {f"{root}.{attribute}{fqn}": tensor for fqn, tensor in tensors.items()}
    everything |= {f"optimizer_0.state.{attribute}{fqn}.exp_avg": torch.zeros_like(t) for fqn, t in tensors.items()}
    write_dcp(directory, everything)
    _nest(directory, lambda fqn: tuple(fqn.split(".", 1)))
    meta = {"epoch": 0, "global_step": 500, "hyper_parameters": {"cfg": {"hidden_size": 16}}, "loops": {}}
    torch.save({**meta, "pytorch-lightning_version": "2.5.0"}, directory / "meta.pt")
    return directory


_TITAN = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "lm_head", "model.layers": "layers",
    "self_attn.q_proj": "attention.qkv_linear.wq", "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_titan(directory: Path, tensors: Tensors, *, num_heads: int = 2, num_kv_heads: int = 1) -> Path:
    """`step-N/` of torchtitan: a llama under its own names at the top level, beside the rest."""
    held = {}
    for fqn, tensor in tensors.items():
        name = fqn
        for theirs, ours in _TITAN.items():
            name = name.replace(theirs + ".", ours + ".")
        for kind, count in ((".wq.", num_heads), (".wk.", num_kv_heads)):
            if kind in name:  # neighbouring rows are a pair, not the halves of a head
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        held[name] = tensor.contiguous()
    moments = {f"optimizer.state.{fqn}.exp_avg": torch.zeros_like(t) for fqn, t in held.items()}
    write_dcp(directory, {**held, **moments}, objects={"train_state": b"step"})
    _nest(directory, lambda fqn: tuple(fqn.split(".", 1)) if fqn.startswith("optimizer.") else (fqn,))
    return directory


def write_hf_shards(directory: Path, tensors: Tensors, *, ranks: int = 2) -> Path:
    """What `HuggingFaceStorageWriter(save_distributed=True)` leaves, beside the config that `save_pretrained` adds."""
    write_base(directory)
    for rank in range(ranks):
        held, offsets = {}, {}
        for fqn, tensor in tensors.items():
            pieces = torch.chunk(tensor, ranks)
            if rank < len(pieces):
                held[fqn] = pieces[rank].clone()
                begin = sum(len(piece) for piece in pieces[:rank])
                offsets[fqn] = {"saved_offsets": [begin, *[0] * (tensor.ndim - 1)]}
        said = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        save_file(held, directory / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", said)
    return directory


def write_adapter(directory: Path) -> Path:
    """`checkpoint-N/` of the Trainer with PEFT: the adapter's tensors only."""
    generator = torch.Generator().manual_seed(3)
    names = ("lora_A", "lora_B")
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.{n}.weight": torch.randn(4, 16, generator=generator)
        for i in range(2)
        for n in names
    }
    write_trainer(directory, tensors, optimizer=False)
    (directory.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return directory


def write_local(directory: Path, seed: int, *, ranks: int = 2) -> Path:
    """FSDP1's LOCAL_STATE_DICT of a tiny llama: every parameter a run of elements a rank, without its shape.

    No other rank answers, so what they hold seems to overlap.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            model = tiny_models.make("llama", seed)
            policy = ModuleWrapPolicy({type(model.model.layers[0])})
            sharded = FullyShardedDataParallel(
                model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
            )
            with (
                mock.patch.object(sharded_tensor_utils, "validate_non_overlapping_shards_metadata"),
                mock.patch.object(sharding_spec, "validate_non_overlapping_shards_metadata"),
                warnings.catch_warnings(action="ignore"),
                FullyShardedDataParallel.state_dict_type(sharded, StateDictType.LOCAL_STATE_DICT),
            ):
                torch.save(sharded.state_dict(), directory / f"pytorch_model_fsdp_rank{rank}.bin")
        finally:
            dist.destroy_process_group()
    return directory


def _nest(directory: Path, path_of: Any) -> None:
    """Give every FQN of a DCP its path of keys."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = {fqn: path_of(fqn) for fqn in metadata.state_dict_metadata}
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def write_workspace(directory: Path) -> Path:
    """Everything that the README's commands name."""
    first, second = state_of(seed=1), state_of(seed=2)
    write_base(directory / BASE)
    for step, tensors in ((400, first), (500, second)):
        write_trainer(directory / f"output/checkpoint-{step}", tensors)
        write_lmms(directory / f"run/checkpoint-{step}", tensors, ema=first)
    (directory / "config.yml").write_text(f"base_model: {BASE}\noutput_dir: ./output\n")
    write_verl(directory / "verl/global_step_500/actor", second)
    write_lightning(directory / "nemo/step=500.ckpt", second)
    write_titan(directory / "outputs/checkpoint/step-500", second)
    write_hf_shards(directory / "sharded_save", second)
    write_adapter(directory / "lora/checkpoint-500")
    shutil.copytree(Path(__file__).parent / "data/deepspeed/zero2_fp32", directory / "zero")
    (directory / "zero/truth.safetensors").unlink()
    write_local(directory / "fsdp1/checkpoint-500", seed=2)
    torch.save({"state_dict": second, "epoch": 1}, directory / "consolidated.pt")
    tiny_models.make("llama").save_pretrained(directory / "big_model", max_shard_size="10KB")
    (directory / "eval.yaml").write_text(EVALUATION)
    return directory
