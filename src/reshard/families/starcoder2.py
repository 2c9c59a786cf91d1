"""StarCoder2: LayerNorms and biases everywhere, an MLP without a gate.

Checked: StarCoder2 3B and 15B.
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
from reshard.families.settings import biases, epsilon, window


def _facts(config: Config) -> Facts:
    biased = {"use_bias": True, **config}
    return decoder(config, tags=bias_tags(biased, "use_bias", "use_bias", "use_bias"), tied=True)


FAMILIES = (
    Family(
        "starcoder2",
        ("starcoder2",),
        ("Starcoder2ForCausalLM",),
        (*MODEL, *input_norm(), *attention(), *mlp_norm(), *plain_mlp("c_fc", "c_proj"), *NORM_BIASES),
        _facts,
        copies=TIED_HEAD,
        settings=(
            ("normalization", "LayerNorm"),
            ("gated_linear_unit", False),
            epsilon("norm_epsilon", 1e-5),
            Setting("activation_func", "hidden_act", "gelu_pytorch_tanh", ACTIVATIONS),
            biases("use_bias"),
            window(),
        ),
        verified="names of NeMo 2; megatron-core computes the same logits",
    ),
)
