"""Nemotron: LayerNorms of 1 + w with biases, squared ReLU without a gate.

Checked: Minitron 4B, Nemotron-4 340B.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.megatron_config import ACTIVATIONS
from reshard.dialects.setting import Setting
from reshard.dialects.table import Config, Family
from reshard.families.blocks import (
    MODEL,
    NORM_BIASES,
    TIED_HEAD,
    attention,
    bias_tags,
    decoder,
    input_norm,
    mlp_norm,
    plain_mlp,
)
from reshard.families.settings import biases, epsilon, rotary


def _facts(config: Config) -> Facts:
    return decoder(config, tags=bias_tags(config))


FAMILIES = (
    Family(
        "nemotron",
        ("nemotron",),
        ("NemotronForCausalLM",),
        (*MODEL, *input_norm(), *attention(), *mlp_norm(), *plain_mlp(), *NORM_BIASES),
        _facts,
        copies=TIED_HEAD,
        settings=(
            ("normalization", "LayerNorm"),
            ("layernorm_zero_centered_gamma", True),
            ("gated_linear_unit", False),
            epsilon("norm_eps", 1e-5),
            Setting("activation_func", "hidden_act", "relu2", ACTIVATIONS),
            *rotary(10000.0, percent=0.5),
            biases("attention_bias", "mlp_bias"),
        ),
        verified="Megatron-Bridge import, bit for bit",
    ),
)
