"""What Megatron's loaders read of a model beside its tensors.

    run_config.yaml    Megatron-Bridge builds the model from `model:`, an object of the class `_target_`
    args               Megatron-LM holds these fields against its own command line

Classes, functions and dtypes are objects in YAML: {_target_: torch.nn.functional.silu, _call_: false}. Source:
Megatron-Bridge `utils/instantiate_utils.py` and `training/checkpointing.py`, Megatron-LM
`training/checkpointing.py:check_checkpoint_args`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from reshard.dialects.setting import Values
from reshard.errors import Unsupported

_OBJECTS = {
    "activation_func": {
        "silu": "torch.nn.functional.silu",
        "gelu": "torch.nn.functional.gelu",
        "relu": "torch.nn.functional.relu",
        "fast_gelu": "megatron.core.activations.fast_gelu",
        "squared_relu": "megatron.core.activations.squared_relu",
        "quick_gelu": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
    },
    "params_dtype": {name: f"torch.{name}" for name in ("bfloat16", "float16", "float32")},
    "transformer_layer_spec": {
        "gemma2_layer_spec": "megatron.bridge.models.gemma.gemma2_provider.gemma2_layer_spec",
        "gemma3_layer_spec": "megatron.bridge.models.gemma.gemma3_provider.gemma3_layer_spec",
        "exaone4_layer_spec": "megatron.bridge.models.exaone.exaone4.exaone4_provider.exaone4_layer_spec",
        "minimax_m2_layer_spec": "megatron.bridge.models.minimax_m2.minimax_m2_provider.minimax_m2_layer_spec",
        "olmoe_layer_spec": "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec",
        "get_transformer_block_with_experimental_attention_variant_spec": (
            "megatron.core.models.gpt.experimental_attention_variant_module_specs."
            "get_transformer_block_with_experimental_attention_variant_spec"
        ),
    },
}
"""Settings whose values are Python objects, with the path of each."""


def run_config(
    settings: Values, *, ckpt_format: str, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, hf_model_id: str | None
) -> str:
    """The text of a run_config.yaml: all that Megatron-Bridge needs to build, train and resume the model.

    The mesh is that of the run to come; checkpoints load at any other. Raises Unsupported for a value that no object
    of Megatron or torch stands for.
    """
    model = {name: _object(name, value) for name, value in settings.items()}
    if settings.get("should_pad_vocab") is True:
        model["make_vocab_size_divisible_by"] = _unit(settings, tp)
    model |= {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
    }
    if hf_model_id is not None:
        model["hf_model_id"] = hf_model_id
    # without these three Megatron-Bridge looks for an optimizer and random states when it resumes
    checkpoint = {"ckpt_format": ckpt_format, "save_optim": False, "save_rng": False, "fully_parallel_save": True}
    return yaml.dump({"checkpoint": checkpoint, "model": model}, Dumper=_Dumper, default_flow_style=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Lists and mappings are written out wherever they are repeated."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _unit(settings: Values, tp: int) -> Any:
    """What Megatron pads the vocabulary with to these rows: it multiplies it by its tensor-parallel ranks first."""
    rows, unit = _padded(settings), settings.get("make_vocab_size_divisible_by")
    return rows // tp if tp > 1 and isinstance(rows, int) and rows % tp == 0 else unit


def _object(name: str, value: Any) -> Any:
    known = _OBJECTS.get(name)
    if known is None or isinstance(value, Mapping):
        return _plain(value)
    if value not in known:
        raise Unsupported(f"{name} is {value!r:.100}: Megatron has no such object")
    return {"_target_": known[value], "_call_": False}


def _plain(value: Any) -> Any:
    """Values as YAML's safe loader has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


_ARGS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "kv_channels",
    "layernorm_epsilon": "norm_epsilon",
    "normalization": "normalization",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "add_bias_linear": "add_bias_linear",
    "add_qkv_bias": "add_qkv_bias",
    "qk_layernorm": "qk_layernorm",
    "position_embedding_type": "position_embedding_type",
    "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent",
    "rotary_interleaved": "rotary_interleaved",
    "rope_scaling": "use_rope_scaling",
    "rope_scaling_factor": "rope_scaling_factor",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "moe_router_topk",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "moe_layer_freq": "moe_layer_freq",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
    "moe_router_score_function": "moe_router_score_function",
    "moe_router_enable_expert_bias": "moe_router_enable_expert_bias",
    "moe_router_num_groups": "moe_router_num_groups",
    "moe_router_group_topk": "moe_router_group_topk",
    "moe_router_topk_scaling_factor": "moe_router_topk_scaling_factor",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate": "moe_shared_expert_gate",
    "moe_grouped_gemm": "moe_grouped_gemm",
    "multi_latent_attention": "multi_latent_attention",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_head_dim",
    "qk_pos_emb_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
    "rotary_scaling_factor": "rotary_scaling_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "mtp_num_layers": "mtp_num_layers",
    "experimental_attention_variant": "experimental_attention_variant",
    "linear_attention_freq": "linear_attention_freq",
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
    "attention_output_gate": "attention_output_gate",
    "hybrid_layer_pattern": "hybrid_override_pattern",
    "bf16": "bf16",
    "fp16": "fp16",
    "make_vocab_size_divisible_by": "make_vocab_size_divisible_by",
}
"""The setting: Megatron-LM's argument."""


def args(settings: Values) -> dict[str, Any]:
    """Megatron-LM's arguments for such a model: what its loader compares, and what describes the model.

    It compares layers, hidden size, heads, `add_position_embedding` and the mesh, which is that of one rank here. Any
    mesh loads an fsdp_dtensor checkpoint.
    """
    found = {theirs: settings[ours] for ours, theirs in _ARGS.items() if settings.get(ours) is not None}
    function, gated = settings.get("activation_func"), settings.get("gated_linear_unit") is True
    return found | {
        "add_position_embedding": True,
        "group_query_attention": settings.get("num_query_groups") != settings.get("num_attention_heads"),
        "swiglu": gated and function == "silu",
        "quick_geglu": gated and function == "quick_gelu",
        "squared_relu": function == "squared_relu",
        "untie_embeddings_and_output_weights": settings.get("share_embeddings_and_output_weights") is False,
        "max_position_embeddings": settings.get("seq_length"),
        "padded_vocab_size": _padded(settings),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }


def _padded(settings: Values) -> Any:
    """The rows of the embedding."""
    size, unit = settings.get("vocab_size"), settings.get("make_vocab_size_divisible_by")
    if settings.get("should_pad_vocab") is True and isinstance(size, int) and isinstance(unit, int):
        return -(-size // unit) * unit
    return size
