"""GLM-4 without experts: norms after the attention and the MLP too, gate and up packed on the hub.

Checked: GLM-4 9B (transformers' layout), GLM-4 0414 9B.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import Glu
from reshard.dialects.setting import Item
from reshard.dialects.table import Config, Family, Row
from reshard.families.blocks import (
    MODEL,
    TIED_HEAD,
    A,
    D,
    L,
    M,
    attention,
    bias_tags,
    decoder,
    input_norm,
    mlp_norm,
)
from reshard.families.settings import biases, epsilon, rotary

_GLM = (
    *MODEL,
    *input_norm(),
    *attention(),
    *mlp_norm(),
    Row(f"{M}linear_fc1.weight", f"{L}mlp.gate_up_proj.weight", Glu(packed=True)),
    Row(f"{M}linear_fc2.weight", f"{L}mlp.down_proj.weight"),
)
_POST_NORMS = (
    Row(f"{D}post_self_attn_layernorm.weight", f"{L}post_self_attn_layernorm.weight"),
    Row(f"{D}post_mlp_layernorm.weight", f"{L}post_mlp_layernorm.weight"),
    # mcore-bridge's modules hold them inside the attention and the MLP
    Row(f"{A}post_self_attn_layernorm.weight", f"{L}post_self_attn_layernorm.weight", variant=True),
    Row(f"{M}post_mlp_layernorm.weight", f"{L}post_mlp_layernorm.weight", variant=True),
)


def _facts(config: Config) -> Facts:
    return decoder(config, tags=bias_tags(config) - {"proj_bias", "mlp_bias"})


_SETTINGS: tuple[Item, ...] = (
    ("rotary_interleaved", True),
    *rotary(10000.0, percent=0.5),
    epsilon("rms_norm_eps", 1.5625e-07),
    biases(qkv="attention_bias"),
)

FAMILIES = (
    Family(
        "glm",
        ("glm",),
        ("GlmForCausalLM",),
        _GLM,
        _facts,
        copies=TIED_HEAD,
        settings=_SETTINGS,
        verified="megatron-core computes the same logits",
    ),
    Family(
        "glm4",
        ("glm4",),
        ("Glm4ForCausalLM",),
        (*_GLM, *_POST_NORMS),
        _facts,
        copies=TIED_HEAD,
        settings=_SETTINGS,
        verified="names of slime and mcore-bridge only",
    ),
)
