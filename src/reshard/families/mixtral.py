"""Mixtral and MiniMax-M2: experts named w1, w2, w3 in a `block_sparse_moe`.

Checked: the configs of Mixtral 8x7B and 8x22B, MiniMax-M2.

MiniMax-M2 normalises all queries of a token together, and all keys; the weights are as long, the same in both dialects.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.setting import Always, Rule, Values
from reshard.dialects.table import Config, Family
from reshard.families.blocks import (
    MODEL,
    TIED_HEAD,
    attention,
    decoder,
    expert_count,
    experts,
    head_norms,
    input_norm,
    moe_norm,
    router,
)
from reshard.families.settings import SIGMOID, epsilon, moe, rotary, window

_LAYER = (
    *input_norm(),
    *attention(),
    *moe_norm(),
    *router("block_sparse_moe.gate", on=(), bias="block_sparse_moe.e_score_correction_bias"),
    *experts("block_sparse_moe.experts.{expert}.", ("w1", "w3", "w2"), on=()),
)


def _mixtral(config: Config) -> Facts:
    return decoder(config, counts=expert_count(config))


def _minimax(config: Config) -> Facts:
    return decoder(config, tags=("expert_bias",), counts=expert_count(config))


def _rotary_dim(config: Values, facts: Facts) -> Values:
    """MiniMax-M2 counts the numbers of a head that are turned."""
    size = facts.sizes["head_dim"]
    return {"rotary_percent": config.get("rotary_dim", size) / size}


def _rotary_dim_config(settings: Values) -> Values:
    head = settings.get("kv_channels") or settings["hidden_size"] // settings["num_attention_heads"]
    return {"rotary_dim": round(head * settings["rotary_percent"])}


FAMILIES = (
    Family(
        "mixtral",
        ("mixtral",),
        ("MixtralForCausalLM",),
        (*MODEL, *_LAYER),
        _mixtral,
        copies=TIED_HEAD,
        settings=(
            *moe("num_local_experts", size="intermediate_size"),
            *rotary(1e6),
            epsilon("rms_norm_eps", 1e-5),
            window(),
        ),
        verified="Megatron-LM 0.8 to 0.20, bit for bit",
    ),
    Family(
        "minimax_m2",
        ("minimax_m2",),
        ("MiniMaxM2ForCausalLM",),
        (*MODEL, *_LAYER, *head_norms()),
        _minimax,
        copies=TIED_HEAD,
        settings=(
            ("qk_layernorm", True),
            *moe("num_local_experts", size="intermediate_size"),
            *SIGMOID,
            Always("use_routing_bias", True),
            Always("scoring_func", "sigmoid"),
            *rotary(5e6),
            Rule("rotary_percent", _rotary_dim, _rotary_dim_config),
            ("transformer_layer_spec", "minimax_m2_layer_spec"),
        ),
        verified="the names of Megatron-Bridge and transformers",
    ),
)
