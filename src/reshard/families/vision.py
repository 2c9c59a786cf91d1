"""The vision tower of Qwen3-VL and Qwen3.5.

    Megatron                                         hub
    vision_model.decoder.layers.{block}.             model.visual.blocks.{block}.
      self_attention.linear_qkv                        attn.qkv: per head [q; k; v] for [all q; all k; all v]
    vision_model.merger.patch_norm                   model.visual.merger.norm
    vision_model.decoder.deepstack_merger_list.{j}.  model.visual.deepstack_merger_list.{j}.

Its layers have biases everywhere, norms with biases and an MLP without a gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import SAME, Fuse, HeadQkv
from reshard.dialects.table import Config, Row
from reshard.errors import Mismatch
from reshard.families.blocks import required

_V, _H = "vision_model.", "model.visual."
_BLOCK = f"{_V}decoder.layers.{{block}}."
_STACK = "deepstack_merger_list.{deepstack}."


def _pair(megatron: str, hub: str, fuse: Fuse = SAME) -> tuple[Row, Row]:
    """A weight and its bias; those of a norm fused into a linear are `layer_norm_weight` and `layer_norm_bias`."""
    at = megatron if megatron.endswith("_") else megatron + "."
    return (
        Row(f"{at}weight", f"{_H}{hub}.weight", fuse, on=("vision",)),
        Row(f"{at}bias", f"{_H}{hub}.bias", fuse, on=("vision",)),
    )


def _merger(megatron: str, hub: str) -> tuple[Row, ...]:
    return (
        *_pair(f"{megatron}patch_norm", f"{hub}norm"),
        *_pair(f"{megatron}linear_fc1", f"{hub}linear_fc1"),
        *_pair(f"{megatron}linear_fc2", f"{hub}linear_fc2"),
    )


_TOWER = (
    *_pair(f"{_V}patch_embed.proj", "patch_embed.proj"),
    Row(f"{_V}pos_embed.weight", f"{_H}pos_embed.weight", on=("vision",)),
    *_pair(f"{_BLOCK}self_attention.linear_qkv.layer_norm_", "blocks.{block}.norm1"),
    *_pair(f"{_BLOCK}self_attention.linear_qkv", "blocks.{block}.attn.qkv", HeadQkv("vision_heads")),
    *_pair(f"{_BLOCK}self_attention.linear_proj", "blocks.{block}.attn.proj"),
    *_pair(f"{_BLOCK}mlp.linear_fc1.layer_norm_", "blocks.{block}.norm2"),
    *_pair(f"{_BLOCK}mlp.linear_fc1", "blocks.{block}.mlp.linear_fc1"),
    *_pair(f"{_BLOCK}mlp.linear_fc2", "blocks.{block}.mlp.linear_fc2"),
    *_merger(f"{_V}merger.", "merger."),
    *_merger(f"{_V}decoder.{_STACK}", _STACK),
)
_UNCHANGED = tuple(
    Row(_V + hub.removeprefix(_H), hub, on=("vision",), variant=True)
    for row in _TOWER
    for hub in row.hubs
    if row.name != _V + hub.removeprefix(_H)
)
"""Megatron-Bridge of 2025 took the tower of Qwen3-VL as transformers has it."""

VISION = (*_TOWER, *_UNCHANGED)


def with_tower(text: Facts, config: Config) -> Facts:
    """The facts of a text model together with those of the tower before it.

    Some blocks of Qwen3-VL's tower feed the first layers of the decoder too: `deepstack`.
    """
    tower = _vision_config(config)
    blocks, heads = required(tower, "depth", "num_heads")
    return replace(
        text,
        tags=text.tags | {"vision"},
        sizes={**text.sizes, "vision_heads": heads},
        counts={**text.counts, "block": blocks, "deepstack": len(tower.get("deepstack_visual_indexes") or ())},
    )


def _vision_config(config: Config) -> Mapping[str, Any]:
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise Mismatch(f"config.json of a {config.get('model_type')} model has no vision_config")
    return vision
