"""ERNIE 4.5 with experts: dense layers by position; on the hub the router is float32, its bias a matrix of one row.

Checked: the config of ERNIE-4.5-21B-A3B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import OneRow
from reshard.dialects.setting import Rule, Setting, Values
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
    input_norm,
    mlp_norm,
    moe_norm,
    shared_experts,
    text_config,
)
from reshard.families.settings import BLOCKS, DENSE_FIRST, SHARED, SIGMOID, biases, epsilon, moe, rotary


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


def _layers_config(settings: Values) -> Values:
    first = DENSE_FIRST.config(settings)["first_k_dense_replace"]
    return {"moe_layer_start_index": first, "moe_layer_end_index": -1, "moe_layer_interval": 1}


def _shared(config: Values, facts: Facts) -> Values:
    count = config.get("moe_num_shared_experts", 2)
    return {"moe_shared_expert_intermediate_size": config["moe_intermediate_size"] * count} if count else {}


def _shared_config(settings: Values) -> Values:
    return {"moe_num_shared_experts": SHARED.config(settings)["n_shared_experts"]}


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
            Row(f"{M}router.weight", f"{L}mlp.gate.weight", on=("moe",), dtype="F32"),
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
            BLOCKS,
            ("rotary_interleaved", True),
            *rotary(500000.0),
            epsilon("rms_norm_eps", 1e-5),
            *moe("moe_num_experts"),
            Setting("moe_router_topk", ("moe_k", "num_experts_per_tok"), 6),
            Rule("moe_layer_freq", DENSE_FIRST.settings, _layers_config),
            Rule("shared_experts", _shared, _shared_config),
            *SIGMOID,
            ("moe_router_load_balancing_type", "aux_loss"),
            biases("use_bias"),
        ),
        verified="the names of Megatron-Bridge and transformers",
    ),
)
