"""Llama-Nemotron Super and Ultra: Llamas from which a search took the attention or the MLP of some layers.

Checked: Llama 3.3 Nemotron Super 49B's kind of config. Layers are numbered one by one, as no two need be alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.setting import Rule, Values
from reshard.dialects.table import Config, Family
from reshard.errors import Mismatch, Unsupported, listed
from reshard.families.blocks import MODEL, TIED_HEAD, attention, decoder, gated_mlp, input_norm, mlp_norm, required
from reshard.families.settings import provider

_ATTENTION, _MLP = ("attention",), ("mlp",)


def _layers(text: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for block in text["block_configs"]:
        kinds = (("attention", "attention"), ("ffn", "mlp"))
        yield tuple(tag for key, tag in kinds if not block[key].get("no_op"))


def _groups(config: Config) -> int:
    """Key-value heads, which must be as many in every layer that has some."""
    (heads,), blocks = required(config, "num_attention_heads"), config.get("block_configs")
    if not isinstance(blocks, list) or not all(_is_block(block) for block in blocks):
        raise Mismatch("config.json of a nemotron-nas model: block_configs of attention and ffn expected")
    if any(block[key].get("replace_with_linear") for block in blocks for key in ("attention", "ffn")):
        raise Unsupported("a nemotron-nas model with layers that are replaced by one linear projection")
    per_group = [b["attention"].get("n_heads_in_group") for b in blocks if not b["attention"].get("no_op")]
    if not per_group or any(type(n) is not int or n <= 0 or n != per_group[0] for n in per_group):
        raise Unsupported(
            f"a nemotron-nas model with {listed(sorted(set(map(str, per_group))))} query heads in a group"
        )
    return heads // int(per_group[0])


def _is_block(block: Any) -> bool:
    return isinstance(block, Mapping) and all(isinstance(block.get(key), Mapping) for key in ("attention", "ffn"))


def _facts(config: Config) -> Facts:
    return decoder(config, layers=_layers, sizes={"groups": _groups(config)})


def _settings(config: Values, facts: Facts) -> Values:
    blocks = json.dumps({"block_configs": config["block_configs"]})
    return {"heterogeneous_layers_config_encoded_json": blocks, "num_query_groups": facts.sizes["groups"]}


def _config(settings: Values) -> Values:
    try:
        said = json.loads(settings.get("heterogeneous_layers_config_encoded_json") or "")
    except ValueError as error:
        raise Unsupported(f"the settings do not tell the layers of a nemotron-nas model apart: {error}") from error
    return {"block_configs": said["block_configs"], "num_key_value_heads": None, "intermediate_size": None}


FAMILIES = (
    Family(
        "nemotron_nas",
        ("nemotron-nas",),
        ("DeciLMForCausalLM",),
        (
            *MODEL,
            *input_norm(on=_ATTENTION),
            *attention(on=_ATTENTION),
            *mlp_norm(on=_MLP),
            *gated_mlp(on=_MLP),
        ),
        _facts,
        copies=TIED_HEAD,
        stacked=False,
        settings=(
            provider("llama_nemotron.llama_nemotron_provider.LlamaNemotronHeterogeneousProvider"),
            Rule("blocks", _settings, _config),
        ),
        verified="names of Megatron-Bridge only",
    ),
)
