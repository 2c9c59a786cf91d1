"""Gemma 1, 2 and 3, the last one also with its vision tower.

Checked: Gemma 2B, Gemma 2 27B, Gemma 3 1B, 4B and 27B. Norms are w of (1 + w) in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import Transposed
from reshard.dialects.setting import Always, Nested, Rule, Setting
from reshard.dialects.table import Config, Copy, Family, Row, under
from reshard.families.blocks import (
    DENSE,
    MODEL,
    TIED_HEAD,
    A,
    D,
    L,
    M,
    attention,
    bias_tags,
    copied,
    decoder,
    gated_mlp,
    head_norms,
    input_norm,
    mlp_norm,
    required,
    text_config,
)
from reshard.families.settings import EVERY_OTHER, GEMMA, GEMMA3, provider, tower

_POST_NORMS = (
    Row(f"{A}linear_proj.post_layernorm.weight", f"{L}post_attention_layernorm.weight"),
    Row(f"{M}linear_fc2.post_layernorm.weight", f"{L}post_feedforward_layernorm.weight"),
    # mbridge's module keeps them beside the attention and the MLP
    Row(f"{D}post_attention_layernorm.weight", f"{L}post_attention_layernorm.weight", variant=True),
    Row(f"{D}post_feedforward_layernorm.weight", f"{L}post_feedforward_layernorm.weight", variant=True),
)
_GEMMA2 = (*MODEL, *input_norm(), *attention(), *mlp_norm("pre_feedforward_layernorm"), *_POST_NORMS, *gated_mlp())
_GEMMA3 = (*_GEMMA2, *head_norms())

_SIGLIP = (
    "embeddings.patch_embedding.weight",
    "embeddings.patch_embedding.bias",
    "embeddings.position_embedding.weight",
    "post_layernorm.weight",
    "post_layernorm.bias",
    *(
        f"encoder.layers.{{block}}.{module}.{kind}"
        for module in (
            "layer_norm1",
            "layer_norm2",
            *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
            "mlp.fc1",
            "mlp.fc2",
        )
        for kind in ("weight", "bias")
    ),
)
_TOWER, _PROJECTOR = "vision_tower.", "multi_modal_projector."
_VISION = (
    *copied(_TOWER, f"{_TOWER}vision_model.", _SIGLIP, on=("vision",)),
    # with transformers 4 the module has the level that the hub has
    *copied(f"{_TOWER}vision_model.", f"{_TOWER}vision_model.", _SIGLIP, on=("vision",), variant=True),
    Row(f"{_PROJECTOR}mm_soft_embed_norm.weight", f"{_PROJECTOR}mm_soft_emb_norm.weight", on=("vision",)),
    Row(f"{_PROJECTOR}proj.weight", f"{_PROJECTOR}mm_input_projection_weight", Transposed(), on=("vision",)),
)

_TEXT_DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
"""What config.json of Gemma 3 4B leaves to the class that reads it."""


def _gemma(config: Config) -> Facts:
    return decoder(config, tags=bias_tags(config), tied=True)


def _gemma3_vl(config: Config) -> Facts:
    text: Mapping[str, Any] = {**_TEXT_DEFAULTS, **text_config(config)}
    (blocks,) = required(config.get("vision_config") or {}, "num_hidden_layers")
    facts = decoder({**config, "text_config": text}, tags=(*bias_tags(config), "vision"), tied=True)
    return replace(facts, counts={"block": blocks})


_TOKENS = (
    ("mm_tokens_per_image", 256),
    ("boi_token_index", 255999),
    ("eoi_token_index", 256000),
    ("image_token_index", 262144),
)
_GEMMA1 = (
    provider("gemma.gemma_provider.GemmaModelProvider"),
    *GEMMA,
    Always("hidden_act", "gelu_pytorch_tanh"),
    Always("hidden_activation", "gelu_pytorch_tanh"),
)


def _cap(name: str, default: float) -> Rule:
    """What a tanh bounds logits by; null is none."""
    return Rule(
        name,
        lambda config, _: {name: config.get(name, default)},
        lambda settings: {name: settings[name]} if name in settings else {},
    )


_GEMMA2_SETTINGS = (
    provider("gemma.gemma2_provider.Gemma2ModelProvider"),
    *GEMMA,
    ("transformer_layer_spec", "gemma2_layer_spec"),
    Always("hidden_activation", "gelu_pytorch_tanh"),
    Setting("query_pre_attn_scalar", "query_pre_attn_scalar", 256),
    _cap("attn_logit_softcapping", 50.0),
    _cap("final_logit_softcapping", 30.0),
    EVERY_OTHER,
)

FAMILIES = (
    Family(
        "gemma",
        ("gemma",),
        ("GemmaForCausalLM",),
        DENSE,
        _gemma,
        copies=TIED_HEAD,
        settings=_GEMMA1,
        verified="Megatron-Bridge import, bit for bit",
    ),
    Family(
        "gemma2",
        ("gemma2",),
        ("Gemma2ForCausalLM",),
        _GEMMA2,
        _gemma,
        copies=TIED_HEAD,
        settings=_GEMMA2_SETTINGS,
        verified="Megatron-Bridge import, bit for bit",
    ),
    Family(
        "gemma3",
        ("gemma3_text",),
        ("Gemma3ForCausalLM",),
        _GEMMA3,
        _gemma,
        copies=TIED_HEAD,
        settings=(provider("gemma.gemma3_provider.Gemma3ModelProvider"), *GEMMA3),
        verified="names of Megatron-Bridge only",
    ),
    Family(
        "gemma3_vl",
        ("gemma3",),
        ("Gemma3ForConditionalGeneration",),
        (*under(_GEMMA3, "language_model.", {"": "language_model."}), *_VISION),
        _gemma3_vl,
        copies=(
            Copy("language_model.lm_head.weight", "language_model.model.embed_tokens.weight", on=("tied",)),
            Copy("lm_head.weight", "language_model.model.embed_tokens.weight", on=("tied",)),
        ),
        settings=(
            provider("gemma_vl.gemma3_vl_provider.Gemma3VLModelProvider"),
            *GEMMA3,
            Nested("gemma3_text", outer=tuple(name for name, _ in _TOKENS)),
            *tower("siglip.configuration_siglip.SiglipVisionConfig", *_TOKENS),
        ),
        verified="names of Megatron-Bridge only",
    ),
)
