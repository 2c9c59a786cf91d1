"""Qwen3.5, dense and with experts, alone and with its vision tower.

Checked: configs of Qwen3.5 and Qwen3.6 in both forms, with the experts of a layer packed or single. The model that
predicts a second token lies under `mtp.` on the hub, beside the text model and not in it.
"""

from __future__ import annotations

from dataclasses import replace

from reshard.dialects.fuse import Rows
from reshard.dialects.setting import Nested
from reshard.dialects.table import Copy, Family, under
from reshard.families import vision
from reshard.families.blocks import TIED_HEAD
from reshard.families.gated_delta_net import facts, facts_of_experts, in_proj, model, unfused
from reshard.families.settings import (
    DELTA_NET,
    GATED_SHARED,
    NO_DENSE,
    QWEN_TOKENS,
    moe,
    mtp_count,
    provider,
    qwen_tokens,
    rotary,
    text_mrope,
    tower,
)

_HUB = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_FLAT = Rows(("key_rows+key_rows+value_rows", "value_rows", "value_heads", "value_heads"))
_IN_PROJ = (in_proj(_HUB, _FLAT), *unfused(*_HUB))
_DENSE, _MOE = model(_IN_PROJ, "dense"), model(_IN_PROJ, "moe")
_SETTINGS = (*DELTA_NET, *rotary(10000.0, percent=0.25), text_mrope(), mtp_count("mtp_num_hidden_layers"))
_EXPERTS = (*moe("num_experts"), *GATED_SHARED, NO_DENSE, ("moe_router_load_balancing_type", "global_aux_loss"))
_TOKENS = qwen_tokens(248053, 248054, 248056, 248057)


def _family(name: str, architecture: str, mlp: str) -> tuple[Family, Family]:
    rows, read = (_MOE, facts_of_experts) if mlp == "moe" else (_DENSE, facts)
    settings = (*_SETTINGS, *_EXPERTS) if mlp == "moe" else _SETTINGS
    text = Family(
        f"{name}_text",
        (f"{name}_text",),
        (f"{architecture}ForCausalLM",),
        rows,
        read,
        copies=TIED_HEAD,
        stacked=False,
        settings=settings,
        verified="Megatron-Bridge import, bit for bit",
    )
    whole = replace(
        text,
        name=name,
        model_types=(name,),
        architectures=(f"{architecture}ForConditionalGeneration",),
        rows=(*under(rows, "language_model.", {"model.": "model.language_model."}), *vision.VISION),
        facts=lambda config: vision.with_tower(read(config), config),
        copies=(Copy("lm_head.weight", "model.language_model.embed_tokens.weight", on=("tied",)),),
        settings=(
            *settings,
            provider(f"qwen_vl.qwen35_vl_provider.Qwen35VL{'MoE' if mlp == 'moe' else ''}ModelProvider"),
            text_mrope("mrope"),
            Nested(f"{name}_text", outer=QWEN_TOKENS),
            *tower(f"{name}.configuration_{name}.{architecture}VisionConfig", *_TOKENS),
        ),
    )
    return text, whole


FAMILIES = (*_family("qwen3_5", "Qwen3_5", "dense"), *_family("qwen3_5_moe", "Qwen3_5Moe", "moe"))
