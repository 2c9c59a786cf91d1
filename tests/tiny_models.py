"""Real transformers models, made small: the oracles of the tests about names, ties and configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

_TEXT = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
_SIGLIP = {k: v for k, v in _CLIP.items() if k != "projection_dim"} | {"model_type": "siglip_vision_model"}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _TEXT | {"tie_word_embeddings": False},
    "qwen2": _TEXT | {"tie_word_embeddings": True},
    "qwen3": _TEXT | {"tie_word_embeddings": True},
    "mixtral": _TEXT | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": _TEXT | _EXPERTS | {"shared_expert_intermediate_size": 20},
    "qwen3_moe": _TEXT | _EXPERTS,
    "olmoe": _TEXT | {"num_experts": 3, "num_experts_per_tok": 2},
    "deepseek_v3": {k: v for k, v in _TEXT.items() if k != "head_dim"} | _ROUTED | _GROUPS | _LATENT,
    "glm4_moe": _TEXT | _ROUTED | _GROUPS,
    "phimoe": _TEXT | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "granitemoe": _TEXT | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt_neox": {k: v for k, v in _TEXT.items() if k not in ("num_key_value_heads", "head_dim")},
    "qwen2_5_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROPE},
        "vision_config": _QWEN_VISION | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16},
        "tie_word_embeddings": False,
    },
    "qwen3_vl_moe": {
        "text_config": _TEXT | _EXPERTS | {"rope_parameters": _ROPE},
        "vision_config": _QWEN_VISION
        | {
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "llava": {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _CLIP, "tie_word_embeddings": False},
    "gemma3": {
        "text_config": _TEXT | {"model_type": "gemma3_text"},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "internvl": {
        "text_config": _TEXT | _EXPERTS | {"model_type": "qwen3_moe"},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [8, 8],
            "patch_size": [4, 4],
        },
        "tie_word_embeddings": False,
    },
}
"""By model type. No size equals another that it could be mistaken for."""


def make(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode, its special tokens ordinary."""
    config = transformers.AutoConfig.for_model(model_type, **(CONFIGS[model_type] | changes))
    torch.manual_seed(seed)
    is_composed = "vision_config" in CONFIGS[model_type]
    model = (AutoModelForImageTextToText if is_composed else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def save_modules(model: Any, directory: Path) -> Path:
    """What a sharded training checkpoint holds: every name of the state dict, ties twice, and config.json beside."""
    directory.mkdir(parents=True)
    save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, directory / "model.safetensors")
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.config.save_pretrained(directory)
    return directory


def logits(model: Any) -> torch.Tensor:
    """Of some tokens, without a picture."""
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.tensor([[5, 11, 7, 30, 42]])).logits
    return result


def load(model: Any, directory: Path) -> Any:
    """The model in `directory`, loaded by the class of `model`, with nothing missing, unexpected or made up."""
    loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
    assert {name: value for name, value in info.items() if value} == {}
    return loaded.eval()
