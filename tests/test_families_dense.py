"""Dense families: transformers' models to Megatron's files and back, bit for bit; megatron-core's own modules as oracle."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from reshard.core.checkpoint import Checkpoint
from reshard.core.tensor import Tensor
from reshard.dialects import apply, megatron
from reshard.dialects.table import Facts, Family, copies, entries, variants
from reshard.dialects.transformers import to_hub as from_modules
from reshard.errors import Incomplete, Mismatch
from reshard.families import baichuan, exaone4, gemma, glm4, llama, mistral3, nemotron, phi, starcoder2
from reshard.formats import open_path

FAMILIES = {
    model_type: family
    for module in (baichuan, exaone4, gemma, glm4, llama, mistral3, nemotron, phi, starcoder2)
    for family in module.FAMILIES
    for model_type in family.model_types
}
FSDP = megatron.Layout(prefixes=("model.module.",), stacked=False, halves=True)
D, L = "decoder.layers.{}.", "model.layers.{}."


# ------------------------------------------------------------------------------------------------- models to be tried


def text(draw: random.Random, **changes: Any) -> dict[str, Any]:
    """Sizes that all models have; no size equals another that it could be mistaken for."""
    groups = draw.choice((1, 2, 3))
    return {
        "vocab_size": draw.choice((67, 128, 130)),
        "hidden_size": 36,
        "intermediate_size": 20,
        "num_hidden_layers": draw.choice((1, 3)),
        "num_attention_heads": groups * draw.choice((1, 2)),
        "num_key_value_heads": groups,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": draw.choice((False, True)),
    } | changes


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 8,
    "patch_size": 4,
    "vision_use_head": False,
}
PIXTRAL = {k: v for k, v in SIGLIP.items() if k != "vision_use_head"} | {"model_type": "pixtral", "head_dim": 8}


def config(model_type: str, draw: random.Random) -> dict[str, Any]:
    yes_or_no = {key: draw.choice((False, True)) for key in SWITCHES.get(model_type, ())}
    match model_type:
        case "gemma3":
            language = text(draw, model_type="gemma3_text", tie_word_embeddings=True)
            return {"text_config": language, "vision_config": SIGLIP, "mm_tokens_per_image": 4}
        case "mistral3":
            language = text(draw, model_type=draw.choice(("mistral", "ministral3")))
            return {
                "text_config": language,
                "vision_config": PIXTRAL,
                "tie_word_embeddings": language["tie_word_embeddings"],
            } | yes_or_no
        case "gemma" | "gemma2" | "gemma3_text":
            return text(draw, tie_word_embeddings=True) | yes_or_no
        case "phi3" | "starcoder2":
            sizes = text(draw, num_attention_heads=4, num_key_value_heads=draw.choice((1, 2, 4))) | yes_or_no
            del sizes["head_dim"]
            return sizes
    return text(draw) | yes_or_no


SWITCHES = {
    "llama": ("attention_bias", "mlp_bias"),
    "qwen3": ("attention_bias",),
    "seed_oss": ("attention_bias", "attention_out_bias", "mlp_bias"),
    "ernie4_5": ("use_bias",),
    "gemma": ("attention_bias",),
    "gemma2": ("attention_bias",),
    "gemma3_text": ("attention_bias",),
    "nemotron": ("attention_bias", "mlp_bias"),
    "starcoder2": ("use_bias",),
    "glm": ("attention_bias",),
    "glm4": ("attention_bias",),
    "mistral3": ("multimodal_projector_bias",),
}
BY_TRANSFORMERS = tuple(model_type for model_type in FAMILIES if model_type != "baichuan")


def built(model_type: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model of random weights, norms and biases included."""
    made = transformers.AutoConfig.for_model(model_type, **config(model_type, random.Random(f"{model_type}{seed}")))
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if model_type in ("gemma3", "mistral3") else AutoModelForCausalLM
    model = kind.from_config(made, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def saved(model_type: str, directory: Path, seed: int = 0) -> Path:
    built(model_type, seed).save_pretrained(directory)
    return with_tower_level(directory) if model_type == "gemma3" else directory


def with_tower_level(directory: Path) -> Path:
    """transformers leaves `vision_model.` out when it saves a model that was not loaded; the hub has it."""
    tensors = load_file(directory / "model.safetensors")
    named = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): t for name, t in tensors.items()}
    save_file(named, directory / "model.safetensors", {"format": "pt"})
    return directory


def as_baichuan(directory: Path) -> Path:
    """A Llama whose query, key and value lie in one tensor, as Baichuan's on the hub."""
    sizes = {"num_key_value_heads": 4, "num_attention_heads": 4, "tie_word_embeddings": False}
    made = transformers.AutoConfig.for_model("llama", **text(random.Random(0), **sizes))
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    tensors = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    for layer in range(made.num_hidden_layers):
        at = L.format(layer) + "self_attn."
        tensors[f"{at}W_pack.weight"] = torch.cat([tensors.pop(f"{at}{x}_proj.weight") for x in "qkv"])
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    published = {key: value for key, value in made.to_dict().items() if key != "num_key_value_heads"}
    (directory / "config.json").write_text(json.dumps(published | {"model_type": "baichuan"}))
    return directory


# ------------------------------------------------------------------------------------------------------------ walking


def opened(directory: Path) -> tuple[Checkpoint, Family, Facts]:
    checkpoint = open_path(directory)
    assert checkpoint.config is not None
    family = FAMILIES[checkpoint.config["model_type"]]
    return from_modules(checkpoint, checkpoint.config), family, family.facts(checkpoint.config)


def on_disk(checkpoint: Checkpoint, family: Family, facts: Facts, layout: megatron.Layout) -> dict[str, Tensor]:
    named = apply.to_megatron(checkpoint.tensors, family, facts)
    return megatron.on_disk(named, layout, facts.sizes, stack_layers=family.stacked)


def from_disk(tensors: Mapping[str, Tensor], family: Family, facts: Facts) -> dict[str, Tensor]:
    return apply.to_hub(megatron.in_memory(tensors).tensors, family, facts)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def bits(tensor: Tensor, checkpoint: Checkpoint) -> tuple[tuple[int, ...], bytes]:
    return tensor.shape, tensor.read(checkpoint.source).tobytes()


def truth(directory: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """What safetensors' own reader finds in a directory."""
    found = {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
    return {k: (tuple(v.shape), raw(v)) for k, v in found.items()}


def check_walk(directory: Path) -> None:
    checkpoint, family, facts = opened(directory)
    for layout in (megatron.TORCH_DIST, FSDP):
        disk = on_disk(checkpoint, family, facts, layout)
        back = {name: bits(tensor, checkpoint) for name, tensor in from_disk(disk, family, facts).items()}
        assert back == truth(directory)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", BY_TRANSFORMERS)
def test_a_model_of_transformers_comes_back_from_megatrons_files_bit_for_bit(
    model_type: str, seed: int, tmp_path: Path
) -> None:
    check_walk(saved(model_type, tmp_path / "model", seed))


def test_baichuan_comes_back_from_megatrons_files_bit_for_bit(tmp_path: Path) -> None:
    check_walk(as_baichuan(tmp_path / "model"))
