"""Baichuan 2: Llama with query, key and value packed on the hub, as many key-value heads as heads.

Checked: Baichuan2 7B.
"""

from __future__ import annotations

from reshard.dialects.fuse import PackedQkv
from reshard.dialects.table import Config, Facts, Family, Row
from reshard.families.blocks import MODEL, TIED_HEAD, A, L, decoder, gated_mlp, input_norm, mlp_norm


def _facts(config: Config) -> Facts:
    return decoder(config)


FAMILIES = (
    Family(
        "baichuan",
        ("baichuan",),
        ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        (
            *MODEL,
            *input_norm(),
            Row(f"{A}linear_qkv.weight", f"{L}self_attn.W_pack.weight", PackedQkv()),
            Row(f"{A}linear_proj.weight", f"{L}self_attn.o_proj.weight"),
            *mlp_norm(),
            *gated_mlp(),
        ),
        _facts,
        copies=TIED_HEAD,
        verified="names of NeMo 2 only",
    ),
)
