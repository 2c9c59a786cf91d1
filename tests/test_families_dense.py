"""Dense families: transformers' models to Megatron's files and back, bit for bit; megatron-core as second oracle."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import megatron_ranks
from reshard.core.checkpoint import Checkpoint, Origin
from reshard.core.dtypes import dtype
from reshard.core.tensor import Filled, Tensor
from reshard.dialects import apply, megatron, megatron_config
from reshard.dialects.facts import Facts
from reshard.dialects.table import Family, copies, entries, variants
from reshard.dialects.transformers import to_hub as from_modules
from reshard.errors import Incomplete, Mismatch, Unsupported
from reshard.families import (
    exaone4,
    gemma,
    glm4,
    llama,
    mimo,
    mistral3,
    nemotron,
    nemotron_nas,
    phi,
    starcoder2,
)
from reshard.formats import open_path
from reshard.storage.files import LazySource

FAMILIES = {
    model_type: family
    for module in (exaone4, gemma, glm4, llama, mimo, mistral3, nemotron, nemotron_nas, phi, starcoder2)
    for family in module.FAMILIES
    for model_type in family.model_types
}
FSDP = megatron.Layout(prefixes=("model.module.",), stacked=False, halves=True)
BF16 = dtype("BF16")
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
BY_TRANSFORMERS = tuple(model_type for model_type in FAMILIES if model_type not in ("mimo", "nemotron-nas"))


def built(model_type: str, seed: int) -> Any:
    """A model of random weights, norms and biases included."""
    made = transformers.AutoConfig.for_model(model_type, **config(model_type, random.Random(f"{model_type}{seed}")))
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if model_type in ("gemma3", "mistral3") else AutoModelForCausalLM
    model = kind.from_config(made, dtype=torch.bfloat16)
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


def as_mimo(directory: Path) -> Path:
    """A Qwen2 with a layer for a second token beside it."""
    draw = random.Random(3)
    made = transformers.AutoConfig.for_model("qwen2", **text(draw, num_hidden_layers=3, tie_word_embeddings=False))
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(directory)
    tensors = {name: torch.randn_like(tensor) for name, tensor in load_file(directory / "model.safetensors").items()}
    at = "model.mtp_layers.0."
    last = {name: tensors.pop(name) for name in list(tensors) if name.startswith(L.format(2))}
    tensors |= {at + name.removeprefix(L.format(2)): tensor for name, tensor in last.items()}
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        tensors[f"{at}{name}.weight"] = torch.randn(36, dtype=torch.bfloat16)
    tensors[f"{at}input_proj.weight"] = torch.randn(36, 72, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    published = json.loads((directory / "config.json").read_text())
    changes = {"model_type": "mimo", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    (directory / "config.json").write_text(json.dumps({**published, **changes, "layer_types": None}))
    return directory


def as_nemotron_nas(directory: Path) -> Path:
    """A Llama that lost its first layer's attention and its last layer's MLP."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "tie_word_embeddings": False}
    made = transformers.AutoConfig.for_model("llama", **text(random.Random(5), **sizes))
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(directory)
    lost = tuple(L.format(0) + part for part in ("self_attn", "input_layernorm"))
    lost += tuple(L.format(2) + part for part in ("mlp", "post_attention_layernorm"))
    tensors = {n: torch.randn_like(t) for n, t in load_file(directory / "model.safetensors").items()}
    kept = {n: t for n, t in tensors.items() if not n.startswith(lost)}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    published = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(published | NEMOTRON_NAS))
    return directory


def _block(no_attention: bool = False, no_mlp: bool = False, **attention: Any) -> dict[str, Any]:
    heads = None if no_attention else 2
    return {
        "attention": {"n_heads_in_group": heads, "no_op": no_attention, "replace_with_linear": False} | attention,
        "ffn": {"ffn_mult": None if no_mlp else 2.625, "no_op": no_mlp, "replace_with_linear": False},
    }


NEMOTRON_NAS = {
    "model_type": "nemotron-nas",
    "num_key_value_heads": None,
    "intermediate_size": None,
    "block_configs": [_block(no_attention=True), _block(), _block(no_mlp=True)],
}


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


@pytest.mark.parametrize("build", [as_mimo, as_nemotron_nas])
def test_a_model_that_is_only_on_the_hub_comes_back_bit_for_bit(build: Callable[[Path], Path], tmp_path: Path) -> None:
    check_walk(build(tmp_path / "model"))


def test_mimos_second_token_takes_the_embedding_first_in_megatron(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(as_mimo(tmp_path / "model"))
    hidden, embedding = load_file(tmp_path / "model" / "model.safetensors")[
        "model.mtp_layers.0.input_proj.weight"
    ].chunk(2, dim=1)
    named = apply.to_megatron(checkpoint.tensors, family, facts)
    assert "mtp.layers.0.transformer_layer.self_attention.linear_qkv.bias" in named
    ours = as_torch(named["mtp.layers.0.eh_proj.weight"].tensor, checkpoint)
    assert torch.equal(ours, torch.cat([embedding, hidden], dim=1))


def test_layers_of_a_searched_llama_keep_their_numbers(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(as_nemotron_nas(tmp_path / "model"))
    disk = on_disk(checkpoint, family, facts, megatron.TORCH_DIST)
    qkv = [name for name in disk if name.endswith("linear_qkv.weight")]
    fc1 = [name for name in disk if name.endswith("linear_fc1.weight")]
    assert qkv == [D.format(layer) + "self_attention.linear_qkv.weight" for layer in (1, 2)]
    assert fc1 == [D.format(layer) + "mlp.linear_fc1.weight" for layer in (0, 1)]


def test_the_layers_of_a_searched_llama_are_told_to_megatron_and_back() -> None:
    config = published("llama", "32 20 3 4 2 67") | NEMOTRON_NAS
    family = FAMILIES["nemotron-nas"]
    settings, _ = megatron_config.to_megatron(config, family, family.facts(config))
    assert settings["num_query_groups"] == 2
    back = megatron_config.to_config(settings, family)
    assert {key: back[key] for key in NEMOTRON_NAS} == NEMOTRON_NAS


@pytest.mark.parametrize(
    "blocks",
    [
        None,
        [],
        [{}],
        [{"attention": 1, "ffn": 2}],
        [_block(), _block(n_heads_in_group=4)],
        [_block(n_heads_in_group=[2])],
        [_block(replace_with_linear=True)],
        [_block(True)],
    ],
)
def test_a_searched_llama_that_no_table_can_describe_is_refused(blocks: Any) -> None:
    config = published("llama", "32 20 1 4 2 67") | NEMOTRON_NAS | {"block_configs": blocks}
    with pytest.raises((Mismatch, Unsupported)):
        FAMILIES["nemotron-nas"].facts(config)


def test_a_padded_vocabulary_is_padded_with_zeros_and_cut_again(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(saved("phi3", tmp_path / "model"))
    padded = facts.sized(padded_vocab=256)
    disk = on_disk(checkpoint, family, padded, megatron.TORCH_DIST)
    embedding = as_torch(disk["embedding.word_embeddings.weight"], checkpoint)
    assert embedding.shape[0] == 256
    assert not embedding[facts.sizes["vocab"] :].any()
    back = {name: bits(tensor, checkpoint) for name, tensor in from_disk(disk, family, padded).items()}
    assert back == truth(tmp_path / "model")


def test_names_of_the_local_spec_and_of_other_bridges_are_read(tmp_path: Path) -> None:
    for model_type, renamed in OTHER_NAMES.items():
        checkpoint, family, facts = opened(saved(model_type, tmp_path / model_type))
        named = apply.to_megatron(checkpoint.tensors, family, facts)
        others = {_replaced(name, renamed): tensor.tensor for name, tensor in named.items()}
        assert len(set(others) - set(named)) >= len(renamed)
        back = {name: bits(tensor, checkpoint) for name, tensor in apply.to_hub(others, family, facts).items()}
        assert back == truth(tmp_path / model_type)


LOCAL = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
OTHER_NAMES = {
    "llama": LOCAL,
    "nemotron": LOCAL,
    "phi3": LOCAL,
    "gemma2": {
        "self_attention.linear_proj.post_layernorm": "post_attention_layernorm",
        "mlp.linear_fc2.post_layernorm": "post_feedforward_layernorm",
    },
    "glm4": {
        "post_self_attn_layernorm": "self_attention.post_self_attn_layernorm",
        "post_mlp_layernorm": "mlp.post_mlp_layernorm",
    },
    "gemma3": {"vision_tower.": "vision_tower.vision_model."},
}


def _replaced(name: str, renamed: Mapping[str, str]) -> str:
    old = next((old for old in renamed if old in name), None)
    return name if old is None else name.replace(old, renamed[old])


# -------------------------------------------------------------------------------------- against plain torch arithmetic


def by_group(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    """Query heads of a group, its key, its value, group after group."""
    return torch.cat([part for trio in zip(*(x.chunk(groups) for x in (q, k, v)), strict=True) for part in trio])


def as_torch(tensor: Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    data = torch.frombuffer(bytearray(tensor.read(checkpoint.source).tobytes()), dtype=torch.uint8)
    return data.view(getattr(torch, tensor.dtype.torch)).reshape(tensor.shape)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "seed_oss", "gemma2", "starcoder2", "phi3"])
def test_fused_projections_are_what_plain_torch_makes(model_type: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    checkpoint, family, facts = opened(saved(model_type, directory, seed=1))
    hub = load_file(directory / "model.safetensors")
    groups, heads = facts.sizes["groups"], facts.sizes["heads"]
    named = apply.to_megatron(checkpoint.tensors, family, facts)
    for layer in range(len(facts.layers)):
        at, to = L.format(layer), D.format(layer)
        for kind in ("weight", "bias"):
            packed = hub.get(f"{at}self_attn.qkv_proj.{kind}")
            if packed is not None:
                rows = [heads * facts.sizes["head_dim"], *[groups * facts.sizes["head_dim"]] * 2]
                q, k, v = packed.split(rows)
            elif f"{at}self_attn.q_proj.{kind}" in hub:
                q, k, v = (hub[f"{at}self_attn.{x}_proj.{kind}"] for x in "qkv")
            else:
                assert f"{to}self_attention.linear_qkv.{kind}" not in named
                continue
            ours = as_torch(named[f"{to}self_attention.linear_qkv.{kind}"].tensor, checkpoint)
            assert torch.equal(ours, by_group(q, k, v, groups))
        fc1 = as_torch(named[f"{to}mlp.linear_fc1.weight"].tensor, checkpoint)
        names = ("gate_up_proj",) if model_type == "phi3" else ("gate_proj", "up_proj")
        names = ("c_fc",) if model_type == "starcoder2" else names
        assert torch.equal(fc1, torch.cat([hub[f"{at}mlp.{name}.weight"] for name in names]))


def test_gemma_3s_projection_of_pictures_is_turned(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(saved("gemma3", tmp_path / "model"))
    hub = load_file(tmp_path / "model" / "model.safetensors")
    named = apply.to_megatron(checkpoint.tensors, family, facts)
    ours = as_torch(named["multi_modal_projector.proj.weight"].tensor, checkpoint)
    assert torch.equal(ours, hub["multi_modal_projector.mm_input_projection_weight"].T)


# ------------------------------------------------------------------------------------------------- published configs


def published(model_type: str, sizes: str, **changes: Any) -> dict[str, Any]:
    """What config.json on the hub says: hidden, intermediate, layers, heads, key-value heads, vocabulary."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = dict(zip((*keys, "vocab_size"), map(int, sizes.split()), strict=True))
    return {"model_type": model_type} | numbers | changes


TIED, UNTIED, WIDE = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"head_dim": 128}
SIGLIP_400M = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
PIXTRAL_400M = {
    "head_dim": 64,
    "hidden_size": 1024,
    "image_size": 1540,
    "intermediate_size": 4096,
    "model_type": "pixtral",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
GEMMA3_4B = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
GEMMA3_27B = {
    "head_dim": 128,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "model_type": "gemma3_text",
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
}

PUBLISHED = {
    "Llama 2 7B": published("llama", "4096 11008 32 32 32 32000", **UNTIED),
    "Llama 3.1 405B": published("llama", "16384 53248 126 128 8 128256", attention_bias=False, mlp_bias=False),
    "Llama 3.2 1B": published("llama", "2048 8192 16 32 8 128256", head_dim=64, **TIED),
    "Yi 1.5 9B": published("llama", "4096 11008 48 32 4 64000", **UNTIED),
    "DeepSeek LLM 67B": published("llama", "8192 22016 95 64 8 102400", **UNTIED),
    "Mistral 7B": published("mistral", "4096 14336 32 32 8 32000", **UNTIED),
    "Mistral Nemo": published("mistral", "5120 14336 40 32 8 131072", **WIDE),
    "Qwen2.5 0.5B": published("qwen2", "896 4864 24 14 2 151936", **TIED),
    "Qwen2.5 7B": published("qwen2", "3584 18944 28 28 4 152064", **UNTIED),
    "Qwen3 0.6B": published("qwen3", "1024 3072 28 16 8 151936", attention_bias=False, **WIDE, **TIED),
    "Qwen3 8B": published("qwen3", "4096 12288 36 32 8 151936", attention_bias=False, **WIDE, **UNTIED),
    "Seed-OSS 36B": published(
        "seed_oss",
        "5120 27648 64 80 8 155136",
        attention_bias=True,
        attention_out_bias=False,
        mlp_bias=False,
        **WIDE,
        **UNTIED,
    ),
    "ERNIE 4.5 0.3B": published("ernie4_5", "1024 3072 18 16 2 103424", use_bias=False, **WIDE, **TIED),
    "Gemma 2B": published("gemma", "2048 16384 18 8 1 256000", head_dim=256),
    "Gemma 2 27B": published("gemma2", "4608 36864 46 32 16 256000", **WIDE),
    "Gemma 3 1B": published("gemma3_text", "1152 6912 26 4 1 262144", head_dim=256),
    "Gemma 3 4B": {"model_type": "gemma3", "text_config": GEMMA3_4B, "vision_config": SIGLIP_400M},
    "Gemma 3 27B": {"model_type": "gemma3", "text_config": GEMMA3_27B, "vision_config": SIGLIP_400M},
    "Minitron 4B": published("nemotron", "3072 9216 32 24 8 256000", attention_bias=False, mlp_bias=False, **WIDE),
    "Nemotron-4 340B": published("nemotron", "18432 73728 96 96 8 256000", **UNTIED),
    "StarCoder2 3B": published("starcoder2", "3072 12288 30 24 2 49152", use_bias=True),
    "StarCoder2 15B": published("starcoder2", "6144 24576 40 48 4 49152", use_bias=True),
    "Phi-3 mini": published("phi3", "3072 8192 32 32 32 32064", **UNTIED),
    "Phi-4": published("phi3", "5120 17920 40 40 10 100352", **UNTIED),
    "Phi-4 mini": published("phi3", "3072 8192 32 24 8 200064", partial_rotary_factor=0.75, **TIED),
    "GLM-4 9B": published("glm", "4096 13696 40 32 2 151552", attention_bias=True, **WIDE, **UNTIED),
    "GLM-4 0414 9B": published("glm4", "4096 13696 40 32 2 151552", attention_bias=True, **WIDE, **UNTIED),
    "EXAONE 4.0 1.2B": published("exaone4", "2048 4096 30 32 8 102400", head_dim=64, **TIED),
    "EXAONE 4.0 32B": published("exaone4", "5120 27392 64 40 8 102400", **WIDE, **UNTIED),
    "Mistral Small 3.1 24B": {
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "text_config": published("mistral", "5120 32768 40 32 8 131072", **WIDE),
        "tie_word_embeddings": False,
        "vision_config": PIXTRAL_400M,
    },
    "Ministral 3 3B": {
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "text_config": published("ministral3", "3072 9216 26 32 8 131072", **WIDE, **TIED),
        "vision_config": PIXTRAL_400M,
    },
}


def without_elements(config: dict[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of the tensors that transformers' class has, under the hub's names, each tied one once."""
    composed = "vision_config" in config
    made = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    with torch.device("meta"):
        model = (AutoModelForImageTextToText if composed else AutoModelForCausalLM).from_config(made)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if made.get_text_config().tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors = {name: Filled(BF16, shape, b"\0\0") for name, shape in shapes.items()}
    return dict(from_modules(Checkpoint(tensors, Origin(Path("model"), "test"), LazySource()), config).tensors)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_tensors_that_transformers_has(name: str) -> None:
    config = PUBLISHED[name]
    family = FAMILIES[config["model_type"]]
    hub, facts = without_elements(config), family.facts(config)
    named = apply.to_megatron(hub, family, facts)
    back = apply.to_hub({key: each.tensor for key, each in named.items()}, family, facts)
    assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in hub.items()}


def test_heads_that_a_config_of_llama_1_does_not_group_are_all_key_value_heads() -> None:
    config = published("llama", "4096 11008 32 32 32 32000")
    del config["num_key_value_heads"]
    assert FAMILIES["llama"].facts(config).sizes["groups"] == 32


@pytest.mark.parametrize("key", ["num_attention_heads", "hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_size_that_is_missing_is_named(key: str) -> None:
    config = {k: v for k, v in PUBLISHED["Llama 2 7B"].items() if k != key}
    with pytest.raises(Mismatch, match=key):
        FAMILIES["llama"].facts(config)


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3"])
def test_a_tower_without_a_number_of_layers_is_named(model_type: str) -> None:
    config = {"model_type": model_type, "text_config": GEMMA3_27B | {"vocab_size": 9}, "vision_config": {}}
    with pytest.raises(Mismatch, match="num_hidden_layers"):
        FAMILIES[model_type].facts(config)


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_table_is_a_bijection_and_variants_are_other_names_of_the_same(name: str) -> None:
    family = FAMILIES[PUBLISHED[name]["model_type"]]
    facts = family.facts(PUBLISHED[name])
    table = entries(family, facts)
    hub = [tensor for entry in table for tensor in entry.hub]
    others = variants(family, facts)
    assert len({entry.name for entry in table}) == len(table)
    assert len(set(hub)) == len(hub)
    assert not {entry.name for entry in table} & set(others)
    assert {entry.hub for entry in others.values()} <= {entry.hub for entry in table}


def test_a_head_beside_a_tied_embedding_is_known_as_its_copy() -> None:
    for model_type in ("qwen2", "gemma", "starcoder2"):
        family = FAMILIES[model_type]
        facts = family.facts(published(model_type, "32 20 1 2 1 67", **TIED))
        assert [(copy.name, copy.of) for copy in copies(family, facts)] == [
            ("lm_head.weight", "model.embed_tokens.weight")
        ]


def test_a_tensor_too_many_and_one_too_few_are_named(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(saved("nemotron", tmp_path / "model"))
    tensors = dict(checkpoint.tensors)
    norm = tensors.pop("model.norm.bias")
    with pytest.raises(Incomplete, match=r"model\.norm\.bias"):
        apply.to_megatron(tensors, family, facts)
    with pytest.raises(Mismatch, match=r"model\.norm\.beta"):
        apply.to_megatron(tensors | {"model.norm.beta": norm}, family, facts)


# ------------------------------------------------------------------------------------------- megatron-core's own model

Shapes = dict[str, tuple[int, ...]]
"""Of tensors by name."""

TOKENS = [[5, 11, 7, 30, 42, 3, 19]]
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LAYER_NORM = {"normalization": "LayerNorm", "gated_linear_unit": False}
COMPUTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"attention_bias": True, "mlp_bias": True}, {"add_bias_linear": True}),
    "mistral": ({"sliding_window": None}, {}),
    "qwen2": ({}, {"add_qkv_bias": True}),
    "qwen3": ({"attention_bias": False}, {"qk_layernorm": True}),
    "seed_oss": (
        {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
        {"add_qkv_bias": True},
    ),
    "ernie4_5": ({"use_bias": False}, {"rotary_interleaved": True}),
    "glm": (
        {"attention_bias": True, "rope_parameters": PLAIN["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        {"add_qkv_bias": True, "rotary_interleaved": True},
    ),
    "phi3": ({"sliding_window": None}, {}),
    "starcoder2": (
        {"use_bias": True, "sliding_window": None, "attention_dropout": 0.0},
        {"add_bias_linear": True, "activation_func": "gelu"} | LAYER_NORM,
    ),
    "nemotron": ({"attention_bias": False, "mlp_bias": False}, {"activation_func": "squared_relu"} | LAYER_NORM),
}
"""For each model type what its config says, and Megatron's settings for it."""


def in_float32(model_type: str, directory: Path) -> torch.Tensor:
    """A model to be computed with, and its logits by transformers."""
    sizes = text(random.Random(model_type), hidden_size=40, num_attention_heads=4, num_key_value_heads=2)
    if model_type in ("phi3", "starcoder2"):
        del sizes["head_dim"]
    values = sizes | PLAIN | COMPUTED[model_type][0]
    torch.manual_seed(1)
    made = transformers.AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.ndim == 1))
        logits: torch.Tensor = model(input_ids=torch.tensor(TOKENS)).logits
    model.save_pretrained(directory)
    return logits


def megatrons_own(directories: dict[str, Path]) -> dict[str, tuple[torch.Tensor, Shapes]]:
    """What megatron-core's own models compute with our tensors, and how it names them on disk. For one rank."""
    from megatron.core import tensor_parallel

    torch.cuda.current_device = lambda: "cpu"  # where Megatron's rotary embedding puts its numbers
    tensor_parallel.get_cuda_rng_tracker().fork = nullcontext  # of a dropout that drops nothing
    return {model_type: _megatrons_own(model_type, directory) for model_type, directory in directories.items()}


def _megatrons_own(model_type: str, directory: Path) -> tuple[torch.Tensor, Shapes]:
    checkpoint, family, facts = opened(directory)
    named = apply.to_megatron(checkpoint.tensors, family, facts)
    tensors = {_replaced(name, LOCAL): as_torch(each.tensor, checkpoint) for name, each in named.items()}
    if model_type == "nemotron":  # its norms are of 1 + w, which Megatron has with Transformer Engine only
        tensors |= {name: tensor + 1 for name, tensor in tensors.items() if name.endswith("layernorm.weight")}
    settings = _megatrons_settings(model_type, facts, tensors)
    settings |= {"vocab_size": facts.sizes["vocab"], "tied": "tied" in facts.tags}
    model = megatron_ranks.gpt_model(**settings).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert [name for name in missing if not name.endswith("_extra_state")] == []
    assert unexpected == []
    tokens = torch.tensor(TOKENS)
    mask = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()[None, None]
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, torch.arange(tokens.shape[1])[None], mask)
    return logits, megatron_ranks.shapes_on_disk(settings)


def _megatrons_settings(model_type: str, facts: Facts, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    from megatron.core.activations import squared_relu

    functions = {"gelu": partial(torch.nn.functional.gelu, approximate="tanh"), "squared_relu": squared_relu}
    settings = {
        "num_layers": len(facts.layers),
        "hidden_size": facts.sizes["hidden"],
        "num_attention_heads": facts.sizes["heads"],
        "num_query_groups": facts.sizes["groups"],
        "kv_channels": facts.sizes["head_dim"],
        "ffn_hidden_size": tensors["decoder.layers.0.mlp.linear_fc2.weight"].shape[1],
        "layernorm_epsilon": 1e-6,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "bf16": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    } | COMPUTED[model_type][1]
    if "activation_func" in settings:
        settings["activation_func"] = functions[settings["activation_func"]]
    return settings


@pytest.mark.slow
@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatron_computes_with_our_tensors_what_transformers_does_and_names_them_so_on_disk(tmp_path: Path) -> None:
    directories = {model_type: tmp_path / model_type for model_type in COMPUTED}
    expected = {model_type: in_float32(model_type, directory) for model_type, directory in directories.items()}
    [actual] = megatron_ranks.on_ranks(megatrons_own, directories)
    for model_type, (logits, shapes) in actual.items():
        assert expected[model_type].std() > 0.1
        assert torch.allclose(logits, expected[model_type], rtol=1e-3, atol=1e-3), model_type
        disk = on_disk(*opened(directories[model_type]), megatron.TORCH_DIST)
        assert {name: tensor.shape for name, tensor in disk.items()} == shapes, model_type
