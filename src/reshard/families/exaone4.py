"""EXAONE 4: norms after the attention and the MLP only, norms of queries and keys.

Checked: EXAONE 4.0 1.2B and 32B.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.table import Config, Family, Row
from reshard.families.blocks import MODEL, TIED_HEAD, A, L, M, attention, decoder, gated_mlp, head_norms
from reshard.families.settings import UNTURNED, epsilon, window


def _facts(config: Config) -> Facts:
    return decoder(config)


FAMILIES = (
    Family(
        "exaone4",
        ("exaone4",),
        ("Exaone4ForCausalLM",),
        (
            *MODEL,
            *attention(),
            *head_norms(),
            Row(f"{A}linear_proj.post_layernorm.weight", f"{L}post_attention_layernorm.weight"),
            *gated_mlp(),
            Row(f"{M}linear_fc2.post_layernorm.weight", f"{L}post_feedforward_layernorm.weight"),
        ),
        _facts,
        copies=TIED_HEAD,
        settings=(
            ("qk_layernorm", True),
            ("transformer_layer_spec", "exaone4_layer_spec"),
            epsilon("rms_norm_eps", 1e-5),
            window(4096, layers=True),
            UNTURNED,
        ),
        verified="names of Megatron-Bridge only",
    ),
)
