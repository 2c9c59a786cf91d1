"""Mistral Small 3.1 and 3.2 and Ministral 3: a Mistral with a Pixtral tower, which Megatron-Bridge keeps as it is.

Checked: Mistral Small 3.1 24B, Ministral 3 3B in bfloat16.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.setting import Nested, Setting
from reshard.dialects.table import Config, Copy, Family, under
from reshard.families.blocks import DENSE, copied, decoder, required
from reshard.families.settings import provider, tower, window

_PIXTRAL = (
    "patch_conv.weight",
    "ln_pre.weight",
    *(
        f"transformer.layers.{{block}}.{module}.weight"
        for module in (
            "attention_norm",
            *(f"attention.{name}_proj" for name in "qkvo"),
            "ffn_norm",
            *(f"feed_forward.{name}_proj" for name in ("gate", "up", "down")),
        )
    ),
)
_PROJECTOR = ("norm.weight", "patch_merger.merging_layer.weight", "linear_1.weight", "linear_2.weight")
_VISION = (
    *copied("vision_tower.", "vision_tower.", _PIXTRAL, on=("vision",)),
    *copied("multi_modal_projector.", "multi_modal_projector.", _PROJECTOR, on=("vision",)),
    *copied(
        "multi_modal_projector.",
        "multi_modal_projector.",
        ("linear_1.bias", "linear_2.bias"),
        on=("vision", "projector_bias"),
    ),
)


def _facts(config: Config) -> Facts:
    (blocks,) = required(config.get("vision_config") or {}, "num_hidden_layers")
    tags = ("vision", "projector_bias") if config.get("multimodal_projector_bias") else ("vision",)
    return decoder(config, tags=tags, counts={"block": blocks})


_TOKENS = (("image_token_index", 10),)
_OUTER = ("spatial_merge_size", "multimodal_projector_bias", "projector_hidden_act", "vision_feature_layer")

FAMILIES = (
    Family(
        "mistral3",
        ("mistral3",),
        ("Mistral3ForConditionalGeneration",),
        (*under(DENSE, "language_model.", {"": "language_model."}), *_VISION),
        _facts,
        copies=(Copy("language_model.lm_head.weight", "language_model.model.embed_tokens.weight", on=("tied",)),),
        settings=(
            provider("ministral3.ministral3_provider.Ministral3ModelProvider"),
            window(4096),
            Nested("mistral", outer=(*(name for name, _ in _TOKENS), *_OUTER)),
            *tower("pixtral.configuration_pixtral.PixtralVisionConfig", *_TOKENS),
            *(Setting(name, name) for name in _OUTER),
        ),
        verified="names of Megatron-Bridge only",
    ),
)
