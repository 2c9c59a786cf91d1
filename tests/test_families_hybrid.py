"""Tables of Qwen3-Next, Qwen3.5, Nemotron-H and Qwen's vision-language models, held against transformers and torch."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from reshard.core.checkpoint import Checkpoint, Origin
from reshard.core.dtypes import dtype
from reshard.core.tensor import Filled, Literal, Tensor
from reshard.dialects import megatron, packing
from reshard.dialects import transformers as dialect
from reshard.dialects.apply import to_hub, to_megatron
from reshard.dialects.facts import Facts
from reshard.dialects.megatron import TORCH_DIST, Layout
from reshard.dialects.table import Family, entries, variants
from reshard.errors import Incomplete, Mismatch
from reshard.families import families
from reshard.formats import open_path
from reshard.storage.files import LazySource

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NAMES = Path(__file__).parent / "data" / "megatron" / "bridge_names"
LAYOUTS = {
    "torch_dist": TORCH_DIST,
    "fsdp_dtensor": Layout(prefixes=("model.module.",), stacked=False, halves=True),
    "Megatron-LM's fsdp_dtensor": Layout(("model.",), False, True, split_parts=(False,), mtp=("mtp_model_layer",)),
}
ORIGIN = Origin(Path("hub"), "test")
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def family_of(config: Mapping[str, Any]) -> Family:
    (family,) = [family for family in families() if config["model_type"] in family.model_types]
    return family


def literal(tensor: torch.Tensor) -> Tensor:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Literal(dtype(DTYPES[tensor.dtype]), tuple(tensor.shape), data)


def read(tensor: Tensor, source: Any = None) -> torch.Tensor:
    kind = next(key for key, name in DTYPES.items() if name == tensor.dtype.name)
    data = bytearray(tensor.read(source or LazySource()).tobytes())
    return torch.frombuffer(data, dtype=kind).reshape(tensor.shape)


# ------------------------------------------------------------------------------------- models that transformers makes


def text_sizes(draw: random.Random) -> dict[str, Any]:
    groups = draw.choice((1, 2, 3))
    return {
        "vocab_size": draw.randrange(40, 70),
        "hidden_size": 8 * draw.choice((2, 3)),
        "intermediate_size": draw.randrange(10, 30),
        "num_attention_heads": groups * draw.choice((1, 2, 4)),
        "num_key_value_heads": groups,
        "head_dim": draw.choice((4, 8)),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw.random() < 0.5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def linear_sizes(draw: random.Random) -> dict[str, Any]:
    key_heads = draw.choice((1, 2, 3))
    return {
        "num_hidden_layers": draw.choice((2, 4)),
        "full_attention_interval": 2,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw.choice((1, 2)),
        "linear_key_head_dim": draw.choice((2, 4)),
        "linear_value_head_dim": draw.choice((3, 6)),
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
    }


def expert_sizes(draw: random.Random) -> dict[str, Any]:
    return {
        "num_experts": draw.choice((2, 3)),
        "num_experts_per_tok": 2,
        "moe_intermediate_size": draw.randrange(5, 12),
        "shared_expert_intermediate_size": draw.randrange(5, 12),
        "decoder_sparse_step": 1,
    }


def vision_sizes(draw: random.Random, hidden: int) -> dict[str, Any]:
    heads = draw.choice((2, 3, 4))
    return {
        "depth": draw.choice((1, 2)),
        "num_heads": heads,
        "hidden_size": 4 * heads,
        "intermediate_size": draw.randrange(10, 20),
        "out_hidden_size": hidden,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 16,
    }


def qwen3_next(draw: random.Random) -> dict[str, Any]:
    dense = {"mlp_only_layers": [0]} if draw.random() < 0.3 else {}
    bias = {"attention_bias": draw.random() < 0.3}
    return text_sizes(draw) | linear_sizes(draw) | expert_sizes(draw) | dense | bias


def qwen3_5_text(draw: random.Random) -> dict[str, Any]:
    return text_sizes(draw) | linear_sizes(draw)


def qwen3_5_moe_text(draw: random.Random) -> dict[str, Any]:
    return qwen3_5_text(draw) | expert_sizes(draw)


def with_vision(text: dict[str, Any], draw: random.Random, **vision: Any) -> dict[str, Any]:
    tied = text.pop("tie_word_embeddings")
    vision = vision_sizes(draw, text["hidden_size"]) | vision
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


def qwen3_5(draw: random.Random) -> dict[str, Any]:
    return with_vision(qwen3_5_text(draw), draw)


def qwen3_5_moe(draw: random.Random) -> dict[str, Any]:
    return with_vision(qwen3_5_moe_text(draw), draw)


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}}


def qwen3_vl(draw: random.Random) -> dict[str, Any]:
    text = text_sizes(draw) | ROPE | {"num_hidden_layers": 2, "attention_bias": draw.random() < 0.5}
    return with_vision(text, draw, depth=2, deepstack_visual_indexes=draw.choice(([], [0], [0, 1])))


def qwen3_vl_moe(draw: random.Random) -> dict[str, Any]:
    config = qwen3_vl(draw)
    config["text_config"] |= expert_sizes(draw)
    return config


def qwen2_vl(draw: random.Random) -> dict[str, Any]:
    text = text_sizes(draw) | ROPE | {"num_hidden_layers": 2}
    text["hidden_size"] = text.pop("head_dim") * text["num_attention_heads"]
    return with_vision(text, draw, embed_dim=8, hidden_size=text["hidden_size"], mlp_ratio=2, num_heads=2)


def qwen2_5_vl(draw: random.Random) -> dict[str, Any]:
    config = qwen2_vl(draw)
    config["vision_config"] = vision_sizes(draw, config["text_config"]["hidden_size"])
    return config


def nemotron_h(draw: random.Random) -> dict[str, Any]:
    kinds = ["mamba", "mlp", "attention", "moe"]
    draw.shuffle(kinds)
    pattern = "".join({"mamba": "M", "mlp": "-", "attention": "*", "moe": "E"}[kind] for kind in kinds) + "M"
    said = {"layers_block_type": [*kinds, "mamba"]} if draw.random() < 0.5 else {"hybrid_override_pattern": pattern}
    groups = draw.choice((1, 2))
    return (
        text_sizes(draw)
        | said
        | {
            "mamba_num_heads": 2 * groups,
            "mamba_head_dim": 6,
            "n_groups": groups,
            "ssm_state_size": draw.choice((3, 5)),
            "conv_kernel": 4,
            "chunk_size": 8,
            "use_conv_bias": draw.random() < 0.7,
            "n_routed_experts": draw.choice((2, 3)),
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 7,
            "moe_shared_expert_intermediate_size": 9,
            "moe_latent_size": draw.choice((None, 5)),
            "num_nextn_predict_layers": draw.choice((0, 1)),
            "tie_word_embeddings": False,
        }
    )


KINDS = {
    make.__name__: make
    for make in (
        qwen3_next,
        qwen3_5_text,
        qwen3_5_moe_text,
        qwen3_5,
        qwen3_5_moe,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_moe,
        nemotron_h,
    )
}


def make(model_type: str, config: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    made = transformers.AutoConfig.for_model(model_type, **config, dtype="bfloat16")
    auto = transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
    model = auto.from_config(made, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 + torch.rand(parameter.shape) if parameter.ndim == 1 else torch.randn(parameter.shape))
    return model


def hub_directory(model_type: str, seed: int, path: Path) -> Path:
    """What transformers saves of a random model, and the layers for a second token, which it does not know."""
    model = make(model_type, KINDS[model_type](random.Random(f"{model_type} {seed}")), seed)
    model.save_pretrained(path)
    (file,) = path.glob("*.safetensors")
    weights = load_file(file)
    if model_type.startswith(("qwen3_next", "qwen3_5")):
        save_file(weights | prediction_layer(weights), file, {"format": "pt"})
    if model_type == "nemotron_h" and model.config.num_nextn_predict_layers:
        save_file(weights | prediction_mixers(weights), file, {"format": "pt"})
    return path


def prediction_layer(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Like the last layer, which has full attention in all of these configs."""
    at = "model.language_model.layers." if any("language_model" in name for name in weights) else "model.layers."
    last = max(int(name.removeprefix(at).split(".")[0]) for name in weights if name.startswith(at))
    layer = {n.removeprefix(f"{at}{last}."): t.flip(0) for n, t in weights.items() if n.startswith(f"{at}{last}.")}
    hidden = len(layer["input_layernorm.weight"])
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    return (
        {f"mtp.layers.0.{name}": tensor for name, tensor in layer.items()}
        | {f"mtp.{name}.weight": torch.rand(hidden).bfloat16() for name in norms}
        | {"mtp.fc.weight": torch.randn(hidden, 2 * hidden).bfloat16()}
    )


def prediction_mixers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Like the attention and the expert layer: `*E`."""
    result = {}
    for layer, sign in enumerate(("mixer.q_proj.weight", "mixer.gate.weight")):
        at = next(name for name in weights if name.endswith(sign)).removesuffix(sign)
        result |= {n.replace(at, f"mtp.layers.{layer}."): t.flip(0) for n, t in weights.items() if n.startswith(at)}
    hidden = len(result["mtp.layers.0.norm.weight"])
    for name in ("0.enorm", "0.hnorm", "1.final_layernorm"):
        result[f"mtp.layers.{name}.weight"] = torch.rand(hidden).bfloat16()
    return result | {"mtp.layers.0.eh_proj.weight": torch.randn(hidden, 2 * hidden).bfloat16()}


def opened(path: Path) -> tuple[Family, Facts, dict[str, Tensor], Any]:
    """(family, facts, the hub's tensors with single experts, where their bytes are)."""
    checkpoint = open_path(path)
    assert checkpoint.config is not None
    family = family_of(checkpoint.config)
    facts = family.facts(checkpoint.config)
    known = {name for entry in entries(family, facts) for name in entry.hub}
    return family, facts, packing.unpacked(checkpoint.tensors, known), checkpoint.source


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", KINDS)
def test_models_of_transformers_go_to_megatron_and_back_bit_for_bit(model_type: str, seed: int, tmp_path: Path) -> None:
    family, facts, hub, source = opened(hub_directory(model_type, seed, tmp_path))
    expected = {name: read(tensor, source) for name, tensor in hub.items()}
    facts = facts.sized(padded_vocab=facts.sizes["vocab"] + 9)
    for name, layout in LAYOUTS.items():
        disk = megatron.on_disk(to_megatron(hub, family, facts), layout, facts.sizes, stack_layers=family.stacked)
        memory = megatron.in_memory(disk)
        back = to_hub(memory.tensors, family, facts)
        assert memory.twins == ()
        assert sorted(back) == sorted(expected), name
        for key, tensor in back.items():
            assert torch.equal(read(tensor, source), expected[key]), (name, key)


@pytest.mark.parametrize("model_type", KINDS)
def test_tables_are_bijections(model_type: str) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        config = KINDS[model_type](draw) | {"model_type": model_type}
        family = family_of(config)
        if "text_config" in config:
            config["text_config"]["model_type"] = f"{model_type}_text"
        facts = family.facts(config)
        table = entries(family, facts)
        ours, theirs = [entry.name for entry in table], [name for entry in table for name in entry.hub]
        assert len(set(ours)) == len(ours)
        assert len(set(theirs)) == len(theirs)
        others = variants(family, facts)
        assert not set(others) & set(ours)
        assert {name for entry in others.values() for name in entry.hub} <= set(theirs)


# --------------------------------------------------------------------------------------- what Megatron-Bridge wrote


def zeros(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    return {name: Filled(dtype("BF16"), tuple(shape), bytes(2)) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", sorted(path.stem for path in NAMES.glob("*.json")))
def test_names_and_shapes_are_those_that_megatron_bridge_writes(name: str) -> None:
    recorded = json.loads((NAMES / f"{name}.json").read_text())
    family = family_of(recorded["config"])
    facts = family.facts(recorded["config"])
    model = to_megatron(zeros(recorded["hub"]), family, facts)
    disk = megatron.on_disk(model, TORCH_DIST, facts.sizes, stack_layers=family.stacked)
    assert {key: list(tensor.shape) for key, tensor in disk.items()} == recorded["megatron"]
    hub = to_hub(megatron.in_memory(zeros(recorded["megatron"])).tensors, family, facts)
    assert {key: list(tensor.shape) for key, tensor in hub.items()} == recorded["hub"]


@pytest.mark.parametrize("name", sorted(path.stem for path in NAMES.glob("*.json")))
def test_tensors_that_megatron_bridge_writes_with_the_hubs_bits_have_the_hubs_name(name: str) -> None:
    recorded = json.loads((NAMES / f"{name}.json").read_text())
    family = family_of(recorded["config"])
    table = {entry.name: entry.hub for entry in entries(family, family.facts(recorded["config"]))}
    same = {ours: theirs for ours, theirs in recorded["same_bits"].items() if ours in table}
    assert {ours: (theirs,) for ours, theirs in same.items()} == {ours: table[ours] for ours in same}
    assert len(same) > 0.4 * len(table)


# ------------------------------------------------------------------------------- what the hub's modules compute


def megatrons(model_type: str, path: Path, seed: int = 0) -> tuple[dict[str, torch.Tensor], Facts, Any]:
    """(tensors of Megatron's modules, facts, the model that transformers loads from the same files)."""
    family, facts, hub, source = opened(hub_directory(model_type, seed, path))
    named = to_megatron(hub, family, facts)
    auto = transformers.AutoModelForImageTextToText if "vision" in facts.tags else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=torch.float32)
    return {name: read(n.tensor, source).float() for name, n in named.items()}, facts, model


def layer_of(facts: Facts, kind: str) -> int:
    return next(i for i, tags in enumerate(facts.layers) if kind in tags)


def test_projections_of_qwen3_nexts_delta_net_are_those_that_transformers_takes_apart(tmp_path: Path) -> None:
    tensors, facts, model = megatrons("qwen3_next", tmp_path, seed=1)
    index = layer_of(facts, "linear")
    net = model.model.layers[index].linear_attn
    x = torch.randn(2, 3, facts.sizes["hidden"])
    query, key, value, z, beta, alpha = net.fix_query_key_value_ordering(net.in_proj_qkvz(x), net.in_proj_ba(x))
    expected = [part.flatten(2) for part in (query, key, value, z, beta, alpha)]
    actual = x @ tensors[f"decoder.layers.{index}.self_attention.in_proj.weight"].T
    assert torch.allclose(actual, torch.cat(expected, -1), atol=1e-5)


def test_projections_of_qwen3_5s_delta_net_lie_below_one_another(tmp_path: Path) -> None:
    tensors, facts, model = megatrons("qwen3_5_text", tmp_path)
    index = layer_of(facts, "linear")
    net = model.model.layers[index].linear_attn
    x = torch.randn(2, 3, facts.sizes["hidden"])
    expected = torch.cat([net.in_proj_qkv(x), net.in_proj_z(x), net.in_proj_b(x), net.in_proj_a(x)], -1)
    at = f"decoder.layers.{index}.self_attention."
    assert torch.allclose(x @ tensors[f"{at}in_proj.weight"].T, expected, atol=1e-5)
    assert torch.equal(tensors[f"{at}out_norm.weight"], (net.norm.weight - 1).bfloat16().float())


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text"])
def test_queries_gates_keys_and_values_lie_by_group(model_type: str, tmp_path: Path) -> None:
    tensors, facts, model = megatrons(model_type, tmp_path, seed=2)
    index = layer_of(facts, "full")
    attention = model.model.layers[index].self_attn
    heads, groups, size = (facts.sizes[name] for name in ("heads", "groups", "head_dim"))
    x = torch.randn(3, facts.sizes["hidden"])
    query, gate = attention.q_proj(x).view(3, heads, 2 * size).chunk(2, -1)
    key, value = attention.k_proj(x).view(3, groups, size), attention.v_proj(x).view(3, groups, size)
    at = f"decoder.layers.{index}.self_attention.linear_qkv."
    actual = (x @ tensors[f"{at}weight"].T + tensors.get(f"{at}bias", torch.zeros(1))).view(3, groups, -1, size)
    many = heads // groups
    assert torch.allclose(actual[:, :, :many], query.view(3, groups, many, size), atol=1e-5)
    assert torch.allclose(actual[:, :, many : 2 * many], gate.view(3, groups, many, size), atol=1e-5)
    assert torch.allclose(actual[:, :, -2], key, atol=1e-5)
    assert torch.allclose(actual[:, :, -1], value, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_vl"])
def test_queries_keys_and_values_of_the_tower_lie_by_head(model_type: str, tmp_path: Path) -> None:
    tensors, facts, model = megatrons(model_type, tmp_path)
    block = model.model.visual.blocks[0]
    x = torch.randn(5, block.attn.qkv.in_features)
    heads = facts.sizes["vision_heads"]
    expected = block.attn.qkv(x).view(5, 3, heads, -1).transpose(1, 2)
    at = "vision_model.decoder.layers.0.self_attention.linear_qkv."
    actual = x @ tensors[f"{at}weight"].T + tensors[f"{at}bias"]
    assert torch.allclose(actual.view(5, heads, 3, -1), expected, atol=1e-5)


def test_experts_of_qwen3_vl_are_turned_to_megatrons_way(tmp_path: Path) -> None:
    tensors, facts, model = megatrons("qwen3_vl_moe", tmp_path)
    mlp = model.model.language_model.layers[1].mlp.experts
    at = "language_model.decoder.layers.1.mlp.experts."
    for expert in range(facts.counts["expert"]):
        assert torch.equal(tensors[f"{at}linear_fc1.weight{expert}"], mlp.gate_up_proj[expert])
        assert torch.equal(tensors[f"{at}linear_fc2.weight{expert}"], mlp.down_proj[expert])


def test_parts_of_mamba_layers_have_names_of_their_own_on_disk(tmp_path: Path) -> None:
    family, facts, hub, source = opened(hub_directory("nemotron_h", 0, tmp_path))
    disk = megatron.on_disk(to_megatron(hub, family, facts), TORCH_DIST, facts.sizes, stack_layers=family.stacked)
    index = layer_of(facts, "mamba")
    inner, state, heads = (facts.sizes[name] for name in ("inner", "state", "mamba_heads"))
    ours, theirs = f"decoder.layers.{index}.mixer.", f"backbone.layers.{index}.mixer."
    whole = read(hub[f"{theirs}in_proj.weight"], source).split([inner, inner, state, state, heads])
    for name, part in zip(("z", "x", "B", "C", "dt"), whole, strict=True):
        assert torch.equal(read(disk[f"{ours}in_proj.weight.{name}"], source), part)
    whole = read(hub[f"{theirs}conv1d.weight"], source).split([inner, state, state])
    for name, part in zip(("x", "B", "C"), whole, strict=True):
        assert torch.equal(read(disk[f"{ours}conv1d.weight.{name}"], source), part)


# ------------------------------------------------------------------------------------------- other releases' names


def as_read(model_type: str, path: Path, rename: Any) -> None:
    """Every tensor of Megatron's or the hub's that `rename(its hub name)` names comes back to the hub the same."""
    family, facts, hub, source = opened(hub_directory(model_type, 1, path))
    others = {new: name for name in hub if (new := rename(name)) is not None}
    covered = set(others.values())
    tensors = {name: n.tensor for name, n in to_megatron(hub, family, facts).items() if not covered & set(n.entry.hub)}
    back = to_hub(tensors | {new: hub[name] for new, name in others.items()}, family, facts)
    assert len(others) > 5
    assert sorted(back) == sorted(hub)
    for name in hub:
        assert torch.equal(read(back[name], source), read(hub[name], source)), name


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text"])
def test_unfused_names_of_slime_are_read(model_type: str, tmp_path: Path) -> None:
    def rename(name: str) -> str | None:
        if not name.startswith("model.layers.") or name.endswith(".bias"):
            return None
        _, _, layer, module, rest = name.split(".", 4)
        names = {
            "linear_attn": f"linear_attn.{rest}",
            "self_attn": f"self_attn.{rest}",
            "input_layernorm": "input_layernorm.weight",
        }
        return f"decoder.layers.{layer}.self_attention.{names[module]}" if module in names else None

    as_read(model_type, tmp_path, rename)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_moe"])
def test_towers_that_were_kept_as_transformers_has_them_are_read(model_type: str, tmp_path: Path) -> None:
    def rename(name: str) -> str | None:
        at = "model.visual."
        return "vision_model." + name.removeprefix(at) if name.startswith(at) else None

    as_read(model_type, tmp_path, rename)


def test_other_names_of_nemotron_h_are_read(tmp_path: Path) -> None:
    family, facts, hub, _ = opened(hub_directory("nemotron_h", 0, tmp_path))
    renames = {
        "decoder.final_norm.": "decoder.final_layernorm.",
        ".mixer.in_proj.layer_norm_weight": ".norm.weight",
        ".mixer.conv1d.weight": ".mixer.conv1d_weight",
        ".self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
        ".mlp.linear_fc1.layer_norm_weight": ".pre_mlp_layernorm.weight",
    }
    tensors = {}
    for name, named in to_megatron(hub, family, facts).items():
        for old, new in renames.items():
            name = name.replace(old, new)
        tensors[name] = named.tensor
    assert set(tensors) & set(variants(family, facts))
    assert sorted(to_hub(tensors, family, facts)) == sorted(hub)


# ------------------------------------------------------------------------------------------------ configs of the hub

_QWEN_VL_FLAT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
_QWEN3_VISION = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_size": 1152,
    "in_channels": 3,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_LINEAR = {
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-Next 80B-A3B": _LINEAR
    | {
        "model_type": "qwen3_next",
        "decoder_sparse_step": 1,
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
    "Qwen2-VL 7B": _QWEN_VL_FLAT
    | {
        "model_type": "qwen2_vl",
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "Qwen2.5-VL 7B": _QWEN_VL_FLAT
    | {
        "model_type": "qwen2_5_vl",
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "Qwen3-VL 8B": {
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": False,
        "vision_config": _QWEN3_VISION | {"out_hidden_size": 4096},
    },
    "Qwen3-VL 30B-A3B": {
        "model_type": "qwen3_vl_moe",
        "text_config": {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "mlp_only_layers": [],
            "model_type": "qwen3_vl_moe_text",
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": False,
        "vision_config": _QWEN3_VISION | {"out_hidden_size": 2048},
    },
    "Nemotron-H 8B": {
        "model_type": "nemotron_h",
        "attention_head_dim": 128,
        "hidden_size": 4096,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "intermediate_size": 21504,
        "mamba_head_dim": 64,
        "mamba_num_heads": 128,
        "n_groups": 8,
        "num_attention_heads": 32,
        "num_hidden_layers": 52,
        "num_key_value_heads": 8,
        "ssm_state_size": 128,
        "tie_word_embeddings": False,
        "use_conv_bias": True,
        "vocab_size": 131072,
    },
    "Nemotron 3 Nano 30B-A3B": {
        "model_type": "nemotron_h",
        "head_dim": 128,
        "hidden_size": 2688,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "intermediate_size": 1856,
        "mamba_head_dim": 64,
        "mamba_num_heads": 64,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "n_groups": 8,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_attention_heads": 32,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 52,
        "num_key_value_heads": 2,
        "ssm_state_size": 128,
        "tie_word_embeddings": False,
        "use_conv_bias": True,
        "vocab_size": 131072,
    },
}
"""What these configs say about sizes, as they are on the hub."""


def with_few_experts(config: dict[str, Any]) -> dict[str, Any]:
    """The same with four experts a layer: the tables are as long, the test is not."""
    few = {key: 4 for key in ("num_experts", "n_routed_experts") if key in config}
    few |= {"num_experts_per_tok": 2} if few else {}
    nested = {key: with_few_experts(config[key]) for key in ("text_config", "vision_config") if key in config}
    return config | few | nested


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs_name_the_tensors_that_transformers_makes_of_them(model: str) -> None:
    config = with_few_experts(PUBLISHED[model])
    rest = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(config["model_type"], **rest)
    auto = transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        modules = auto.from_config(made).state_dict()
    family = family_of(config)
    facts = family.facts(config).without("mtp")
    checkpoint = Checkpoint(zeros({name: list(t.shape) for name, t in modules.items()}), ORIGIN, LazySource())
    table = to_megatron(packing.unpacked(dialect.to_hub(checkpoint, config).tensors, ()), family, facts)
    assert len(table) == len(entries(family, facts))


def test_the_prediction_layer_is_there_unless_a_config_denies_it() -> None:
    config = PUBLISHED["Qwen3-Next 80B-A3B"]
    facts = family_of(config).facts
    assert "mtp" in facts(config).tags
    assert "mtp" not in facts(config | {"mtp_num_hidden_layers": 0}).tags
    assert "mtp" not in facts(config | {"num_nextn_predict_layers": 0}).tags


def test_a_checkpoint_may_lack_its_prediction_layer_and_its_tower(tmp_path: Path) -> None:
    family, facts, hub, _ = opened(hub_directory("qwen3_5_moe", 0, tmp_path))
    text = {name: t for name, t in hub.items() if not name.startswith(("mtp.", "model.visual."))}
    with pytest.raises(Incomplete, match=r"tensors of the qwen3_5_moe model are missing: model.visual"):
        to_megatron(text, family, facts.without("mtp"))
    assert sorted(
        to_hub(
            {name: n.tensor for name, n in to_megatron(text, family, facts.without("mtp", "vision")).items()},
            family,
            facts.without("mtp", "vision"),
        )
    ) == sorted(text)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("Qwen3-Next 80B-A3B", {"linear_num_key_heads": None}, "linear_num_key_heads is None, a size expected"),
        ("Qwen3-Next 80B-A3B", {"layer_types": ["sliding_attention"] * 48}, "layer_types has 'sliding_attention'"),
        ("Qwen3-Next 80B-A3B", {"layer_types": ["full_attention"]}, "describes 1 layers, num_hidden_layers is 48"),
        ("Qwen3-VL 8B", {"vision_config": None}, "has no vision_config"),
        ("Qwen3-VL 8B", {"vision_config": {"num_heads": 2}}, "depth is None, a size expected"),
        ("Nemotron-H 8B", {"hybrid_override_pattern": "M-Q"}, "layers of the kinds Q are not known"),
        ("Nemotron-H 8B", {"hybrid_override_pattern": None}, "hybrid_override_pattern"),
        ("Nemotron-H 8B", {"n_groups": 0}, "n_groups is 0, a size expected"),
    ],
)
def test_configs_that_say_too_little_are_refused_with_the_key(model: str, changes: Any, message: str) -> None:
    config = PUBLISHED[model] | changes
    with pytest.raises(Mismatch, match=message):
        family_of(config).facts(config)
