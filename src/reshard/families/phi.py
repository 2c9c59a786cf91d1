"""Phi-3, Phi-3.5 and Phi-4: the hub packs query, key and value, and gate and up.

Checked: Phi-3 mini, Phi-4, Phi-4 mini.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import Glu, PackedQkv
from reshard.dialects.setting import Rule, Setting, Values
from reshard.dialects.table import Config, Family, Row
from reshard.families.blocks import MODEL, TIED_HEAD, A, L, M, decoder, input_norm, mlp_norm
from reshard.families.settings import epsilon, window

_PADDING = 32000
"""The token that transformers' class pads with where a config has none."""


def _no_padding(settings: Values) -> Values:
    return {"pad_token_id": None} if settings["vocab_size"] <= _PADDING else {}


def _facts(config: Config) -> Facts:
    return decoder(config)


FAMILIES = (
    Family(
        "phi3",
        ("phi3",),
        ("Phi3ForCausalLM",),
        (
            *MODEL,
            *input_norm(),
            Row(f"{A}linear_qkv.weight", f"{L}self_attn.qkv_proj.weight", PackedQkv()),
            Row(f"{A}linear_proj.weight", f"{L}self_attn.o_proj.weight"),
            *mlp_norm(),
            Row(f"{M}linear_fc1.weight", f"{L}mlp.gate_up_proj.weight", Glu(packed=True)),
            Row(f"{M}linear_fc2.weight", f"{L}mlp.down_proj.weight"),
        ),
        _facts,
        copies=TIED_HEAD,
        settings=(
            epsilon("rms_norm_eps", 1e-5),
            window(),
            Setting("rotary_percent", "partial_rotary_factor", 1.0),
            Rule("pad_token_id", lambda config, facts: {}, _no_padding),
        ),
        verified="names of NeMo 2; megatron-core computes the same logits",
    ),
)
