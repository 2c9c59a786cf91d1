"""OLMoE. Its norms of queries and keys go over all heads of a token together; the weights are as long.

Checked: the config of OLMoE-1B-7B.
"""

from __future__ import annotations

from reshard.dialects.table import Config, Facts, Family
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
        settings=(("qk_layernorm", True), ("moe_router_pre_softmax", True)),
        verified="the names of Megatron-Bridge and transformers",
    ),
)
