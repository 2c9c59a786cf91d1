"""ERNIE 4.5 with experts: dense layers by position, a bias of one row on the hub.

Checked: the config of ERNIE-4.5-21B-A3B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.dialects.fuse import OneRow
from reshard.dialects.table import Config, Facts, Family, Row
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
    input_norm,
    mlp_norm,
    moe_norm,
    router,
    shared_experts,
    text_config,
)


def _layers(text: Mapping[str, Any]) -> Iterator[tuple[str]]:
    num_layers, step = text["num_hidden_layers"], text.get("moe_layer_interval", 1)
    first, last = text.get("moe_layer_start_index", 1), text.get("moe_layer_end_index", -1)
    last = num_layers - 1 if last == -1 else last
    for layer in range(num_layers):
        yield ("moe",) if first <= layer <= last and (layer + 1) % step == 0 else ("dense",)


def _facts(config: Config) -> Facts:
    shared = {"shared"} if text_config(config).get("moe_num_shared_experts", 2) else set()
    tags = bias_tags(config, "use_bias", "use_bias", "use_bias") | shared
    return decoder(config, tags=tags, layers=_layers, counts=expert_count(config), tied=True)


FAMILIES = (
    Family(
        "ernie4_5_moe",
        ("ernie4_5_moe",),
        ("Ernie4_5_MoeForCausalLM",),
        (
            *MODEL,
            *input_norm(),
            *attention(),
            *mlp_norm(on=("dense",)),
            *gated_mlp(on=("dense",)),
            *moe_norm(on=("moe",)),
            *router(),
            Row(
                f"{M}router.expert_bias",
                f"{L}mlp.moe_statics.e_score_correction_bias",
                OneRow(),
                on=("moe",),
                dtype="F32",
            ),
            *experts(),
            *shared_experts(),
        ),
        _facts,
        copies=TIED_HEAD,
        stacked=False,
        settings=(
            ("rotary_interleaved", True),
            ("moe_router_score_function", "sigmoid"),
            ("moe_router_enable_expert_bias", True),
        ),
        verified="the names of Megatron-Bridge and transformers",
    ),
)
