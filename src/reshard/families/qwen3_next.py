"""Qwen3-Next: gated delta nets, gated attention every fourth layer, experts with a shared one.

Checked: Qwen3-Next 80B-A3B. Its config does not mention the layer that predicts a second token, which its files hold.
"""

from __future__ import annotations

from reshard.dialects.fuse import Interleaved
from reshard.dialects.setting import Setting
from reshard.dialects.table import Family
from reshard.families.blocks import TIED_HEAD
from reshard.families.gated_delta_net import facts_of_experts, in_proj, model, unfused
from reshard.families.settings import DELTA_NET, GATED_SHARED, NORMED, SOME_DENSE, moe, mtp_count, rotary

_HUB = ("in_proj_qkvz", "in_proj_ba")
_BY_KEY_HEAD = Interleaved(
    "key_heads", (("key_rows", "key_rows", "value_rows", "value_rows"), ("value_heads", "value_heads"))
)

FAMILIES = (
    Family(
        "qwen3_next",
        ("qwen3_next",),
        ("Qwen3NextForCausalLM",),
        model((in_proj(_HUB, _BY_KEY_HEAD), *unfused(*_HUB)), "moe"),
        facts_of_experts,
        copies=TIED_HEAD,
        stacked=False,
        settings=(
            *DELTA_NET,
            *rotary(10000.0, percent=0.25),
            *moe("num_experts"),
            Setting("moe_router_pre_softmax", "norm_topk_prob", True, values=NORMED.values),
            ("moe_router_dtype", "fp32"),
            ("moe_router_load_balancing_type", "global_aux_loss"),
            SOME_DENSE,
            *GATED_SHARED,
            mtp_count("mtp_num_hidden_layers"),
        ),
        verified="Megatron-Bridge import, bit for bit",
    ),
)
