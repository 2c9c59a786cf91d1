"""OLMoE. Its norms of queries and keys go over all heads of a token together; the weights are as long.

Checked: the config of OLMoE-1B-7B.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.setting import Always
from reshard.dialects.table import Config, Family
from reshard.families.blocks import (
    MODEL,
    TIED_HEAD,
    attention,
    bias_tags,
    decoder,
    expert_count,
    experts,
    head_norms,
    input_norm,
    moe_norm,
    router,
)
from reshard.families.settings import NORMED, biases, epsilon, moe


def _facts(config: Config) -> Facts:
    return decoder(config, tags=bias_tags(config, mlp=""), counts=expert_count(config))


FAMILIES = (
    Family(
        "olmoe",
        ("olmoe",),
        ("OlmoeForCausalLM",),
        (*MODEL, *input_norm(), *attention(), *head_norms(), *moe_norm(), *router(on=()), *experts(on=())),
        _facts,
        copies=TIED_HEAD,
        settings=(
            ("qk_layernorm", True),
            ("transformer_layer_spec", "olmoe_layer_spec"),
            *moe("num_experts", size="intermediate_size"),
            NORMED,
            ("moe_router_dtype", "fp32"),
            ("moe_router_load_balancing_type", "seq_aux_loss"),
            epsilon("rms_norm_eps", 1e-5),
            biases(qkv="attention_bias"),
            Always("clip_qkv", None),
        ),
        verified="the names of Megatron-Bridge and transformers",
    ),
)
