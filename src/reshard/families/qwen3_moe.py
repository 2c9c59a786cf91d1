"""Qwen2 and Qwen3 with experts.

Checked: the configs of Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B, Qwen3-30B-A3B and Qwen3-235B-A22B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.table import Config, Family, Row
from reshard.families.blocks import (
    MODEL,
    TIED_HEAD,
    L,
    M,
    attention,
    bias_tags,
    decoder,
    expert_count,
    experts,
    gated_mlp,
    head_norms,
    input_norm,
    mlp_norm,
    moe_norm,
    router,
    shared_experts,
    text_config,
)
from reshard.families.settings import GATED_SHARED, NORMED, SOME_DENSE, biases, moe, window


def _layers(text: Mapping[str, Any]) -> Iterator[tuple[str]]:
    """Dense where `mlp_only_layers` or `decoder_sparse_step` say so."""
    dense, step = text.get("mlp_only_layers") or (), text.get("decoder_sparse_step") or 1
    for layer in range(text["num_hidden_layers"]):
        yield ("dense",) if layer in dense or (layer + 1) % step else ("moe",)


def _qwen2(config: Config) -> Facts:
    biases = ("qkv_bias",) if text_config(config).get("qkv_bias", True) else ()
    return decoder(config, tags=(*biases, "shared"), layers=_layers, counts=expert_count(config))


def _qwen3(config: Config) -> Facts:
    return decoder(config, tags=bias_tags(config, mlp=""), layers=_layers, counts=expert_count(config))


_LAYER = (
    *input_norm(),
    *attention(),
    *mlp_norm(on=("dense",)),
    *gated_mlp(on=("dense",)),
    *moe_norm(on=("moe",)),
    *router(),
    *experts(),
)
_SHARED = (
    *shared_experts("mlp.shared_expert."),
    Row(f"{M}shared_experts.gate_weight", f"{L}mlp.shared_expert_gate.weight", on=("moe",)),
)

FAMILIES = (
    Family(
        "qwen2_moe",
        ("qwen2_moe",),
        ("Qwen2MoeForCausalLM",),
        (*MODEL, *_LAYER, *_SHARED),
        _qwen2,
        copies=TIED_HEAD,
        settings=(
            *moe("num_experts"),
            NORMED,
            SOME_DENSE,
            *GATED_SHARED,
            biases(qkv="qkv_bias"),
            window(4096, layers=True, switch=True),
        ),
        verified="the names of transformers, and of Megatron's modules",
    ),
    Family(
        "qwen3_moe",
        ("qwen3_moe",),
        ("Qwen3MoeForCausalLM",),
        (*MODEL, *_LAYER, *head_norms()),
        _qwen3,
        copies=TIED_HEAD,
        settings=(
            ("qk_layernorm", True),
            *moe("num_experts"),
            NORMED,
            SOME_DENSE,
            biases(qkv="attention_bias"),
            window(4096, switch=True),
        ),
        verified="Megatron-Bridge import, bit for bit",
    ),
)
