"""Qwen's vision-language models before Qwen3.5.

Qwen2-VL and Qwen2.5-VL keep the hub's vision tower as it is, under `visual.`; Qwen3-VL has Megatron's own. The text
models are Qwen2's and Qwen3's, under `language_model.`.

Checked: Qwen2-VL 7B and Qwen2.5-VL 3B and 7B (sizes of the text model at the top of the config or in `text_config`),
Qwen3-VL 8B, Qwen3-VL 30B-A3B (experts packed and turned on the hub).
"""

from __future__ import annotations

from collections.abc import Iterable

from reshard.dialects.facts import Facts
from reshard.dialects.setting import Item, Nested, Setting
from reshard.dialects.table import Config, Copy, Family, Row, under
from reshard.families import qwen3_moe, vision
from reshard.families.blocks import DENSE, TIED_HEAD, bias_tags, decoder, head_norms
from reshard.families.settings import NORMED, QWEN_TOKENS, biases, mrope, provider, qwen_tokens, rotary, tower

_LANGUAGE = "language_model."
_TIED = (Copy("lm_head.weight", "model.language_model.embed_tokens.weight", on=("tied",)),)
_TOKENS = qwen_tokens(151652, 151653, 151655, 151656)
_SECTIONS, _SECTIONS3 = (16, 24, 24), (24, 20, 20)


def _vision(name: str, kind: str, model_type: str) -> tuple[Item, ...]:
    """The tower's settings; the text model's lie in a config of their own."""
    target = f"{name}.configuration_{name}.{kind}VisionConfig"
    return (Nested(model_type, outer=QWEN_TOKENS), *tower(target, *_TOKENS))


_B = "blocks.{block}."
_ENDS = ("merger.mlp.0", "merger.mlp.2")
_QWEN2_LAYERS = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_QWEN2 = (*(_B + name for name in _QWEN2_LAYERS), "merger.ln_q", *_ENDS)
_QWEN2_5_LINEARS = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_QWEN2_5 = (*(_B + name for name in _QWEN2_5_LINEARS), *_ENDS)
_QWEN2_5_NORMS = (_B + "norm1", _B + "norm2", "merger.ln_q")


def _hubs_tower(with_bias: Iterable[str], without: Iterable[str]) -> tuple[Row, ...]:
    """The tower as the hub has it."""
    names = [f"{name}.{kind}" for name in with_bias for kind in ("weight", "bias")]
    names += [f"{name}.weight" for name in without]
    return tuple(Row(f"visual.{name}", f"visual.{name}", on=("vision",)) for name in names)


def _qwen2_vl(config: Config) -> Facts:
    return vision.with_tower(decoder(config, tags=("qkv_bias",)), config)


def _qwen3_vl(config: Config) -> Facts:
    return vision.with_tower(decoder(config, tags=bias_tags(config)), config)


_MOE = next(family for family in qwen3_moe.FAMILIES if family.name == "qwen3_moe")


def _qwen3_vl_moe(config: Config) -> Facts:
    return vision.with_tower(_MOE.facts(config), config)


FAMILIES = (
    Family(
        "qwen2_vl",
        ("qwen2_vl",),
        ("Qwen2VLForConditionalGeneration",),
        (*under(DENSE, _LANGUAGE), *_hubs_tower(_QWEN2, ("patch_embed.proj",))),
        _qwen2_vl,
        copies=TIED_HEAD,
        settings=(
            ("add_qkv_bias", True),
            *rotary(1e6),
            mrope(_SECTIONS),
            *_vision("qwen2_vl", "Qwen2VL", "qwen2_vl_text"),
        ),
        verified="transformers names only",
    ),
    Family(
        "qwen2_5_vl",
        ("qwen2_5_vl",),
        ("Qwen2_5_VLForConditionalGeneration",),
        (*under(DENSE, _LANGUAGE), *_hubs_tower(_QWEN2_5, (*_QWEN2_5_NORMS, "patch_embed.proj"))),
        _qwen2_vl,
        copies=TIED_HEAD,
        settings=(
            provider("qwen_vl.qwen25_vl_provider.Qwen25VLModelProvider"),
            ("add_qkv_bias", True),
            *rotary(1e6),
            mrope(_SECTIONS),
            *_vision("qwen2_5_vl", "Qwen2_5_VL", "qwen2_5_vl_text"),
        ),
        verified="Megatron-Bridge import, bit for bit",
    ),
    Family(
        "qwen3_vl",
        ("qwen3_vl",),
        ("Qwen3VLForConditionalGeneration",),
        (
            *under((*DENSE, *head_norms()), _LANGUAGE, {"model.": "model.language_model."}),
            *vision.VISION,
        ),
        _qwen3_vl,
        copies=_TIED,
        settings=(
            provider("qwen_vl.qwen3_vl_provider.Qwen3VLModelProvider"),
            ("qk_layernorm", True),
            *rotary(5e6),
            mrope(_SECTIONS3, interleaved=True),
            biases(qkv="attention_bias"),
            *_vision("qwen3_vl", "Qwen3VL", "qwen3_vl_text"),
        ),
        verified="transformers names; the tower as in Qwen3.5",
    ),
    Family(
        "qwen3_vl_moe",
        ("qwen3_vl_moe",),
        ("Qwen3VLMoeForConditionalGeneration",),
        (
            *under(_MOE.rows, _LANGUAGE, {"model.": "model.language_model."}),
            *vision.VISION,
        ),
        _qwen3_vl_moe,
        copies=_TIED,
        settings=(
            *_MOE.settings,
            provider("qwen_vl.qwen3_vl_provider.Qwen3VLMoEModelProvider"),
            Setting("moe_router_pre_softmax", "norm_topk_prob", True, values=NORMED.values),
            *rotary(5e6),
            mrope(_SECTIONS3, interleaved=True),
            *_vision("qwen3_vl_moe", "Qwen3VLMoe", "qwen3_vl_moe_text"),
        ),
        verified="transformers names; the tower as in Qwen3.5",
    ),
)
