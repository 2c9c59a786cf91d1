"""Qwen3 with experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.dialects.table import Config, Facts, Family
from reshard.families.blocks import (
    MODEL,
    attention,
    bias_tags,
    decoder,
    experts,
    gated_mlp,
    head_norms,
    input_norm,
    mlp_norm,
    moe_norm,
    num_experts,
    router,
)


def _layers(text: Mapping[str, Any]) -> Iterator[tuple[str]]:
    """Dense where `mlp_only_layers` or `decoder_sparse_step` say so."""
    dense, step = text.get("mlp_only_layers") or (), text.get("decoder_sparse_step") or 1
    for layer in range(text["num_hidden_layers"]):
        yield ("dense",) if layer in dense or (layer + 1) % step else ("moe",)


def _facts(config: Config) -> Facts:
    return decoder(config, tags=bias_tags(config), layers=_layers, counts={"expert": num_experts(config)})


FAMILIES = (
    Family(
        "qwen3_moe",
        ("qwen3_moe",),
        ("Qwen3MoeForCausalLM",),
        (
            *MODEL,
            *input_norm(),
            *attention(),
            *head_norms(),
            *mlp_norm(on=("dense",)),
            *gated_mlp(on=("dense",)),
            *moe_norm(on=("moe",)),
            *router(),
            *experts(),
        ),
        _facts,
        settings=(("qk_layernorm", True),),
    ),
)
