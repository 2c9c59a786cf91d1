"""Ling 2.0 (Bailing MoE V2) and Sarvam MoE: query, key and value are one tensor on the hub, and names are their own.

Checked: the configs of Ling-mini-2.0, Ling-flash-2.0 and Ling-1T.
"""

from __future__ import annotations

from dataclasses import replace

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import PackedQkv
from reshard.dialects.setting import Always, Setting
from reshard.dialects.table import Config, Copy, Family, Row
from reshard.families.blocks import (
    MODEL,
    A,
    L,
    decoder,
    dense_first,
    expert_count,
    experts,
    gated_mlp,
    input_norm,
    mlp_norm,
    moe_norm,
    mtp_layer,
    num_mtp,
    router,
    shared_experts,
    text_config,
)
from reshard.families.settings import BLOCKS, DENSE_FIRST, GROUPS, NUM_SHARED, SIGMOID, biases, moe, mtp_count, rotary

_EMBEDDING = "model.word_embeddings.weight"
_MODEL = (replace(MODEL[0], hub=_EMBEDDING), *MODEL[1:])
_LAYER = (
    *input_norm(),
    Row(f"{A}linear_qkv.weight", f"{L}attention.query_key_value.weight", PackedQkv()),
    Row(f"{A}linear_qkv.bias", f"{L}attention.query_key_value.bias", PackedQkv(), on=("qkv_bias",)),
    Row(f"{A}linear_proj.weight", f"{L}attention.dense.weight"),
    Row(f"{A}q_layernorm.weight", f"{L}attention.query_layernorm.weight", on=("qk_norm",)),
    Row(f"{A}k_layernorm.weight", f"{L}attention.key_layernorm.weight", on=("qk_norm",)),
    *mlp_norm(on=("dense",)),
    *gated_mlp(on=("dense",)),
    *moe_norm(on=("moe",)),
    *router(bias="mlp.gate.expert_bias"),
    *experts(),
    *shared_experts(),
)


def _facts(config: Config) -> Facts:
    text = text_config(config)
    switches = (
        ("qkv_bias", "use_qkv_bias", False),
        ("qk_norm", "use_qk_norm", True),
        ("expert_bias", "moe_router_enable_expert_bias", True),
        ("shared", "num_shared_experts", False),
    )
    tags = {tag for tag, key, default in switches if text.get(key, default)} | ({"mtp"} if num_mtp(config) else set())
    return decoder(config, tags=tags, layers=dense_first, counts=expert_count(config) | {"mtp": num_mtp(config)})


FAMILIES = (
    Family(
        "bailing_moe_v2",
        ("bailing_moe_v2", "sarvam_moe"),
        ("BailingMoeV2ForCausalLM", "SarvamMoEForCausalLM"),
        (*_MODEL, *_LAYER, *mtp_layer(_LAYER, norm="final_layernorm")),
        _facts,
        copies=(Copy("lm_head.weight", _EMBEDDING, on=("tied",)),),
        stacked=False,
        settings=(
            BLOCKS,
            *moe("num_experts"),
            *GROUPS,
            DENSE_FIRST,
            NUM_SHARED,
            *SIGMOID,
            ("moe_router_pre_softmax", True),
            ("moe_router_load_balancing_type", "none"),
            Setting("qk_layernorm", "use_qk_norm", True),
            Always("score_function", "sigmoid"),
            *rotary(10000.0),
            Setting("rotary_percent", "partial_rotary_factor", 1.0),
            biases(qkv="use_qkv_bias"),
            mtp_count(),
        ),
        verified="the names of Megatron-Bridge",
    ),
)
