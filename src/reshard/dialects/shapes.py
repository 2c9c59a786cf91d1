"""Shapes of a model's parameters from its config.json, for files that do not say them.

Decoders of the llama family, as transformers 5.23 builds them: llama, mistral, qwen2, qwen3, mixtral, qwen3_moe. Names
are the modules' own, as training saves them: experts are fused in transformers 5 (`mlp.experts.gate_up_proj`) and
separate before it (`block_sparse_moe.experts.N.w1.weight`), so both are given. A name too many does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reshard.core.box import Shape
from reshard.errors import Mismatch, Unsupported, listed

Named = Iterator[tuple[str, Shape]]


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """FQN to shape of every parameter of the model that a config.json describes.

    Raises Unsupported for model types that are not listed here, Mismatch for a config that lacks a size.
    """
    model_type = str(config.get("model_type"))
    if model_type not in _MODEL_TYPES:
        raise Unsupported(
            f"the shapes of a {model_type} model are not known from its config",
            hint=f"known: {listed(sorted(_MODEL_TYPES))}; for others save with SHARDED_STATE_DICT or FULL_STATE_DICT",
        )
    try:
        return dict(_decoder(config, _MODEL_TYPES[model_type]))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise Mismatch(f"the config of this {model_type} model lacks a size: {error}") from error


def _decoder(config: Mapping[str, Any], parts: tuple[Callable[[Mapping[str, Any], str], Named], ...]) -> Named:
    """A causal language model: embedding, layers, norm, head."""
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        for part in parts:
            yield from part(config, prefix)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(query heads, key-value heads, size of a head)."""
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def _attention(config: Mapping[str, Any], prefix: str, has_qkv_bias: bool, has_output_bias: bool) -> Named:
    hidden, (heads, kv_heads, size) = config["hidden_size"], _heads(config)
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        yield f"{prefix}self_attn.{name}_proj.weight", (count * size, hidden)
        if has_qkv_bias:
            yield f"{prefix}self_attn.{name}_proj.bias", (count * size,)
    yield f"{prefix}self_attn.o_proj.weight", (hidden, heads * size)
    if has_output_bias:
        yield f"{prefix}self_attn.o_proj.bias", (hidden,)


def _attention_as_configured(config: Mapping[str, Any], prefix: str) -> Named:
    bias = bool(config.get("attention_bias"))
    return _attention(config, prefix, bias, bias)


def _attention_of_qwen2(config: Mapping[str, Any], prefix: str) -> Named:
    return _attention(config, prefix, True, False)


def _attention_of_mistral(config: Mapping[str, Any], prefix: str) -> Named:
    return _attention(config, prefix, False, False)


def _head_norms(config: Mapping[str, Any], prefix: str) -> Named:
    _, _, size = _heads(config)
    yield f"{prefix}self_attn.q_norm.weight", (size,)
    yield f"{prefix}self_attn.k_norm.weight", (size,)


def _mlp(config: Mapping[str, Any], prefix: str) -> Named:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield f"{prefix}mlp.{name}_proj.weight", shape
        if config.get("mlp_bias"):
            yield f"{prefix}mlp.{name}_proj.bias", shape[:1]


def _mixtral_experts(config: Mapping[str, Any], prefix: str) -> Named:
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield f"{prefix}mlp.gate.weight", (experts, hidden)
    yield f"{prefix}mlp.experts.gate_up_proj", (experts, 2 * inner, hidden)
    yield f"{prefix}mlp.experts.down_proj", (experts, hidden, inner)
    yield f"{prefix}block_sparse_moe.gate.weight", (experts, hidden)
    for expert in range(experts):
        for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
            yield f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight", shape


def _qwen3_experts(config: Mapping[str, Any], prefix: str) -> Named:
    layer = int(prefix.split(".")[2])
    if layer in (config.get("mlp_only_layers") or ()) or (layer + 1) % (config.get("decoder_sparse_step") or 1):
        yield from _mlp(config, prefix)
        return
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    experts = config["num_experts"] if "num_experts" in config else config["num_local_experts"]  # transformers 4 and 5
    yield f"{prefix}mlp.gate.weight", (experts, hidden)
    yield f"{prefix}mlp.experts.gate_up_proj", (experts, 2 * inner, hidden)
    yield f"{prefix}mlp.experts.down_proj", (experts, hidden, inner)
    for expert in range(experts):
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            yield f"{prefix}mlp.experts.{expert}.{name}_proj.weight", shape


_MODEL_TYPES: Mapping[str, tuple[Callable[[Mapping[str, Any], str], Named], ...]] = {
    "llama": (_attention_as_configured, _mlp),
    "mistral": (_attention_of_mistral, _mlp),
    "qwen2": (_attention_of_qwen2, _mlp),
    "qwen3": (_attention_as_configured, _head_norms, _mlp),
    "mixtral": (_attention_of_mistral, _mixtral_experts),
    "qwen3_moe": (_attention_as_configured, _head_norms, _qwen3_experts),
}
