"""The Megatron half of a user's directory: tiny models of Qwen3.5, and a run of every system that trains with Megatron.

The models are transformers' own. Runs are what reshard writes for Megatron-Core, laid out as each system lays them out,
but for rank files and zarr, which Megatron-LM wrote itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from reshard.cli.main import main
from workspace import BASE, EXAMPLES, state_of, write_base

DENSE, MIXTURE = "Qwen/Qwen3.5-27B", "Qwen/Qwen3.5-35B-A3B"
"""Directories of these names are taken before the hub is asked."""
REAL = Path(__file__).parent / "data" / "megatron"

_TEXT: dict[str, Any] = {
    "vocab_size": 68,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mtp_num_hidden_layers": 1,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}
_VISION = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "out_hidden_size": 16,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
}


def write_qwen(directory: Path, model_type: str) -> Path:
    """A model directory as the hub has it: pictures, packed experts, and the layer for a second token."""
    text = _TEXT | (_EXPERTS if "moe" in model_type else {})
    config = transformers.AutoConfig.for_model(
        model_type, text_config=text, vision_config=_VISION, tie_word_embeddings=False, dtype="bfloat16"
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 + torch.rand(parameter.shape) if parameter.ndim == 1 else torch.randn(parameter.shape))
    model.save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    save_file(weights | _second_token(weights), directory / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLES / "base" / name, directory / name)
    return directory


def _second_token(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layer that transformers does not know, shaped as the last, which has full attention."""
    last, hidden = "model.language_model.layers.3.", _TEXT["hidden_size"]
    layer = {n.replace(last, "mtp.layers.0."): t.flip(0) for n, t in weights.items() if n.startswith(last)}
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    layer |= {f"mtp.{name}.weight": torch.rand(hidden).bfloat16() for name in norms}
    return layer | {"mtp.fc.weight": torch.randn(hidden, 2 * hidden).bfloat16()}


def write_megatron(directory: Path) -> Path:
    """Everything with Megatron in it that the documentation's commands name."""
    write_qwen(directory / DENSE, "qwen3_5")
    write_qwen(directory / MIXTURE, "qwen3_5_moe")
    _convert(directory / DENSE, directory / "bridge", "--to", "fsdp_dtensor")
    _convert(directory / MIXTURE, directory / "megatron_fsdp", "--to", "fsdp_dtensor", "--target", "megatron-lm")
    shutil.copytree(REAL / "legacy_llama_tp2pp2", directory / "legacy")
    shutil.copytree(REAL / "zarr_llama", directory / "zarr")
    _write_llamas(directory)
    return directory


def _write_llamas(directory: Path) -> None:
    """One model of transformers as Megatron-LM and verl leave it."""
    hub = write_base(directory / "llama")
    save_file(state_of("llama", seed=2), hub / "model.safetensors", {"format": "pt"})
    made = directory / "made"
    _convert(hub, made, "--to", "torch_dist")
    shards = made / "iter_0000000"
    for name in ("train_state.pt", "run_config.yaml"):
        (shards / name).unlink()
    shutil.rmtree(shards / "tokenizer")

    (directory / "megatron_lm").mkdir()
    (directory / "megatron_lm/latest_checkpointed_iteration.txt").write_text("500")
    shutil.copytree(shards, directory / "megatron_lm/iter_0000500")

    actor = directory / "verl_megatron/global_step_500/actor"
    shutil.copytree(shards, actor / "dist_ckpt")
    shutil.copytree(directory / BASE, actor / "huggingface")
    (directory / "verl_megatron/latest_checkpointed_iteration.txt").write_text("500")
    shutil.rmtree(made)
    shutil.rmtree(hub)


def _convert(source: Path, output: Path, *words: str) -> None:
    assert main(["convert", str(source), str(output), *words, "-q"]) == 0
    (output / "reshard.json").unlink()


def truth_of(model: Path) -> dict[str, torch.Tensor]:
    """All tensors of a HuggingFace directory, as the safetensors library reads them."""
    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}
