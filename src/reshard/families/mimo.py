"""MiMo 7B: Qwen2 with a layer that predicts a second token, whose two inputs the hub has in the other order.

Checked: MiMo 7B Base, SFT and RL, of one config.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import HalvesSwapped
from reshard.dialects.table import Config, Family, Row, as_mtp
from reshard.families.blocks import DENSE, TIED_HEAD, decoder
from reshard.families.settings import mtp_count

_OURS, _HUB = "mtp.layers.{mtp}.", "model.mtp_layers.{mtp}."
_MTP = (
    Row(f"{_OURS}enorm.weight", f"{_HUB}token_layernorm.weight", on=("mtp",)),
    Row(f"{_OURS}hnorm.weight", f"{_HUB}hidden_layernorm.weight", on=("mtp",)),
    Row(f"{_OURS}eh_proj.weight", f"{_HUB}input_proj.weight", HalvesSwapped(), on=("mtp",)),
    Row(f"{_OURS}final_layernorm.weight", f"{_HUB}final_layernorm.weight", on=("mtp",)),
    *as_mtp(DENSE, (), hub=_HUB),
)


def _facts(config: Config) -> Facts:
    num_mtp = int(config.get("num_nextn_predict_layers") or 0)
    return decoder(config, tags=("qkv_bias", *(("mtp",) if num_mtp else ())), counts={"mtp": num_mtp})


FAMILIES = (
    Family(
        "mimo",
        ("mimo",),
        ("MiMoForCausalLM",),
        (*DENSE, *_MTP),
        _facts,
        copies=TIED_HEAD,
        settings=(("add_qkv_bias", True), mtp_count()),
        verified="names of Megatron-Bridge and slime only",
    ),
)
