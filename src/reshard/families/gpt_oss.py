"""gpt-oss: experts packed and transposed on the hub, gate and up by turns, biases everywhere, learnt attention sinks.

Checked: the configs of gpt-oss-20b and gpt-oss-120b in bfloat16. The MXFP4 checkpoints hold `..._blocks` and
`..._scales` for the experts' matrices, which no table of names makes into weights.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import InterleavedGlu, Transposed
from reshard.dialects.setting import Always, Setting
from reshard.dialects.table import Config, Family, Row
from reshard.families.blocks import (
    MODEL,
    TIED_HEAD,
    A,
    L,
    M,
    attention,
    decoder,
    expert_count,
    input_norm,
    moe_norm,
    text_config,
)
from reshard.families.settings import ALTERNATING, PLAIN_ROPE, biases, epsilon, moe, rotary

_EXPERTS = f"{L}mlp.experts."


def _facts(config: Config) -> Facts:
    biases = ("qkv_bias", "proj_bias") if text_config(config).get("attention_bias", True) else ()
    return decoder(config, tags=biases, counts=expert_count(config))


FAMILIES = (
    Family(
        "gpt_oss",
        ("gpt_oss",),
        ("GptOssForCausalLM",),
        (
            *MODEL,
            *input_norm(),
            *attention(),
            Row(f"{A}core_attention.softmax_offset", f"{L}self_attn.sinks"),
            *moe_norm(),
            Row(f"{M}router.weight", f"{L}mlp.router.weight"),
            Row(f"{M}router.bias", f"{L}mlp.router.bias"),
            Row(f"{M}experts.linear_fc1.weight{{expert}}", f"{_EXPERTS}gate_up_proj", InterleavedGlu()),
            Row(f"{M}experts.linear_fc1.bias{{expert}}", f"{_EXPERTS}gate_up_proj_bias", InterleavedGlu()),
            Row(f"{M}experts.linear_fc2.weight{{expert}}", f"{_EXPERTS}down_proj", Transposed()),
            Row(f"{M}experts.linear_fc2.bias{{expert}}", f"{_EXPERTS}down_proj_bias"),
        ),
        _facts,
        copies=TIED_HEAD,
        settings=(
            ("softmax_type", "learnable"),
            ("activation_func", "quick_gelu"),
            Always("hidden_act", "silu"),
            Setting("activation_func_clamp_value", "swiglu_limit", 7.0),
            ("glu_linear_offset", 1.0),
            *moe("num_local_experts", size="intermediate_size"),
            ("moe_router_load_balancing_type", "none"),
            epsilon("rms_norm_eps", 1e-5),
            *rotary(150000.0),
            biases(qkv="attention_bias"),
            ("add_bias_linear", True),
            ALTERNATING,
            PLAIN_ROPE,
        ),
        verified="Megatron-Bridge import, bit for bit",
    ),
)
