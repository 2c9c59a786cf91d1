"""GLM-4.5 and what is built like it: attention with groups, dense layers first, experts with a bias and a shared one.

Checked: the configs of GLM-4.5, GLM-4.5-Air and GLM-4.6, dots.llm1, Hy3.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.setting import Setting
from reshard.dialects.table import Config, Family
from reshard.families.blocks import (
    MODEL,
    MTP_COPIES,
    TIED_HEAD,
    attention,
    bias_tags,
    decoder,
    dense_first,
    expert_count,
    experts,
    gated_mlp,
    head_norms,
    input_norm,
    mlp_norm,
    moe_norm,
    mtp_layer,
    num_mtp,
    router,
    shared_experts,
    text_config,
)
from reshard.families.settings import (
    BLOCKS,
    DENSE_FIRST,
    DENSE_LISTED,
    GROUPS,
    NUM_SHARED,
    SHARED,
    SIGMOID,
    biases,
    epsilon,
    moe,
    mtp_count,
    rotary,
    window,
)

_DENSE = (*mlp_norm(on=("dense",)), *gated_mlp(on=("dense",)))
_ATTENTION = (*input_norm(), *attention(), *head_norms(on=("qk_norm",)))
_GLM = (*_ATTENTION, *_DENSE, *moe_norm(on=("moe",)), *router(), *experts(), *shared_experts())
_HY = (
    *_ATTENTION,
    *_DENSE,
    *moe_norm(on=("moe",)),
    *router("mlp.router.gate", bias="mlp.expert_bias"),
    *experts(),
    *shared_experts("mlp.shared_mlp."),
)


def _facts(config: Config, tags: set[str]) -> Facts:
    text = text_config(config)
    tags |= {"expert_bias", *({"mtp"} if num_mtp(config) else set())}
    tags |= {"shared"} if text.get("n_shared_experts") or text.get("num_shared_experts") else set()
    return decoder(config, tags=tags, layers=dense_first, counts=expert_count(config) | {"mtp": num_mtp(config)})


def _glm(config: Config) -> Facts:
    """`attention_bias` is about queries, keys and values alone."""
    text = text_config(config)
    tags = {"qkv_bias"} if text.get("attention_bias") else set()
    return _facts(config, tags | ({"qk_norm"} if text.get("use_qk_norm") else set()))


def _normed(config: Config) -> Facts:
    return _facts(config, bias_tags(config, mlp="") | {"qk_norm"})


_SIGMOID = (BLOCKS, *moe("n_routed_experts"), *GROUPS, DENSE_FIRST, SHARED, *SIGMOID)


FAMILIES = (
    Family(
        "glm4_moe",
        ("glm4_moe",),
        ("Glm4MoeForCausalLM",),
        (*MODEL, *_GLM, *mtp_layer(_GLM)),
        _glm,
        copies=(*TIED_HEAD, *MTP_COPIES),
        stacked=False,
        settings=(
            *_SIGMOID,
            Setting("qk_layernorm", "use_qk_norm", False),
            epsilon("rms_norm_eps", 1e-5),
            *rotary(10000.0, percent=0.5),
            biases(qkv="attention_bias"),
            mtp_count(),
        ),
        verified="the names of Megatron-Bridge and transformers",
    ),
    Family(
        "dots1",
        ("dots1",),
        ("Dots1ForCausalLM",),
        (*MODEL, *_GLM),
        _normed,
        copies=TIED_HEAD,
        stacked=False,
        settings=(("qk_layernorm", True), *_SIGMOID, biases(qkv="attention_bias"), window(4096, layers=True)),
        verified="the names of transformers, and of Megatron's modules",
    ),
    Family(
        "hy_v3",
        ("hy_v3",),
        ("HYV3ForCausalLM",),
        (*MODEL, *_HY, *mtp_layer(_HY, norm="final_layernorm")),
        _normed,
        copies=TIED_HEAD,
        stacked=False,
        settings=(
            ("qk_layernorm", True),
            *_SIGMOID,
            *moe("num_experts"),
            *SIGMOID,
            Setting("moe_router_topk_scaling_factor", "router_scaling_factor", 1.0),
            NUM_SHARED,
            DENSE_LISTED,
            *rotary(11158840.0),
            epsilon("rms_norm_eps", 1e-5),
            mtp_count(),
        ),
        verified="the names of Megatron-Bridge",
    ),
)
