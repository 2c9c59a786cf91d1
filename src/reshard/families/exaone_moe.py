"""K-EXAONE: the layer that predicts a second token is dense, and lies under `mtp.` on the hub.

Checked: the config of K-EXAONE-236B-A23B as published, and as transformers 5 writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.table import Config, Family
from reshard.families.blocks import (
    MODEL,
    TIED_HEAD,
    attention,
    decoder,
    dense_first,
    expert_count,
    experts,
    gated_mlp,
    head_norms,
    input_norm,
    mlp_norm,
    moe_norm,
    num_mtp,
    router,
    shared_experts,
    text_config,
)
from reshard.families.gated_delta_net import mtp
from reshard.families.settings import (
    DENSE_LISTED,
    GROUPS,
    NUM_SHARED,
    SIGMOID,
    UNTURNED,
    epsilon,
    moe,
    mtp_count,
    provider,
    rotary,
    window,
)

_LAYER = (
    *input_norm(),
    *attention(),
    *head_norms(),
    *mlp_norm(on=("dense",)),
    *gated_mlp(on=("dense",)),
    *moe_norm(on=("moe",)),
    *router(bias="mlp.e_score_correction_bias"),
    *experts(),
    *shared_experts(),
)


def _layers(text: Mapping[str, Any]) -> Iterable[tuple[str]]:
    """The published config has a list of switches."""
    switches = text.get("is_moe_layer")
    return dense_first(text) if switches is None else (("moe",) if on else ("dense",) for on in switches)


def _facts(config: Config) -> Facts:
    tags = {"expert_bias", *({"mtp"} if num_mtp(config) else ())}
    tags |= {"shared"} if text_config(config).get("num_shared_experts", 1) else set()
    return decoder(config, tags=tags, layers=_layers, counts=expert_count(config) | {"mtp": num_mtp(config)})


FAMILIES = (
    Family(
        "exaone_moe",
        ("exaone_moe",),
        ("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
        (*MODEL, *_LAYER, *mtp(_LAYER, "dense")),
        _facts,
        copies=TIED_HEAD,
        stacked=False,
        settings=(
            provider("exaone.exaone_moe.exaone_moe_provider.ExaoneMoeModelProvider"),
            ("qk_layernorm", True),
            *moe("num_experts"),
            *GROUPS,
            DENSE_LISTED,
            NUM_SHARED,
            *SIGMOID,
            *rotary(1e6),
            epsilon("rms_norm_eps", 1e-5),
            window(4096, layers=True),
            UNTURNED,
            mtp_count(),
        ),
        verified="the names of Megatron-Bridge and transformers",
    ),
)
