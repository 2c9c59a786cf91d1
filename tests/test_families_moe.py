"""Families with experts: transformers' models and hand-made ones, to Megatron's files and back, bit for bit."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from reshard.cli.main import main
from reshard.core.checkpoint import Checkpoint
from reshard.core.tensor import Tensor
from reshard.dialects import apply, megatron, megatron_config, run_config
from reshard.dialects.facts import Facts
from reshard.dialects.table import Family, copies, entries, variants
from reshard.dialects.transformers import to_hub as from_modules
from reshard.errors import Incomplete, Mismatch
from reshard.families import bailing, deepseek, ernie, exaone_moe, glm, gpt_oss, mixtral, olmoe, qwen3_moe
from reshard.formats import dcp, open_path

FAMILIES = {
    model_type: family
    for module in (bailing, deepseek, ernie, exaone_moe, glm, gpt_oss, mixtral, olmoe, qwen3_moe)
    for family in module.FAMILIES
    for model_type in family.model_types
}
FSDP = megatron.Layout(prefixes=("model.module.",), stacked=False, halves=True)
D, L = "decoder.layers.{}.", "model.layers.{}."


# ------------------------------------------------------------------------------------------------- models to be tried


class Draw(random.Random):
    """Sizes at random, kinds of a model in turn."""

    def __init__(self, model_type: str, seed: int) -> None:
        super().__init__(f"{model_type}{seed}")
        self._turn = seed

    def kind(self, *kinds: Any) -> Any:
        return kinds[self._turn % len(kinds)]


def text(draw: Draw, **changes: Any) -> dict[str, Any]:
    groups = draw.choice((1, 2, 3))
    return {
        "vocab_size": draw.choice((67, 128, 130)),
        "hidden_size": 32,
        "intermediate_size": 20,
        "num_hidden_layers": draw.choice((2, 3)),
        "num_attention_heads": groups * draw.choice((1, 2)),
        "num_key_value_heads": groups,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | changes


_FOUR_HEADS = {"head_dim": None, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Of models whose heads fill the hidden size."""


def routed(draw: Draw, **changes: Any) -> dict[str, Any]:
    return {
        "n_routed_experts": draw.choice((2, 5)),
        "n_shared_experts": draw.choice((1, 2)),
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": draw.kind(1, 0),
        "num_nextn_predict_layers": 0,
    } | changes


def latent(draw: Draw, **changes: Any) -> dict[str, Any]:
    sizes = text(draw, num_key_value_heads=4, num_attention_heads=4, head_dim=None) | routed(draw)
    low = {"q_lora_rank": 18, "kv_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10}
    return sizes | low | changes


def experts(draw: Draw, key: str = "num_experts") -> dict[str, Any]:
    """Of models whose `intermediate_size` is an expert's."""
    return {key: draw.choice((2, 5)), "num_experts_per_tok": 2}


_SMALL = {"moe_intermediate_size": 12}
"""Of models whose experts have a size of their own."""


def config(model_type: str, seed: int) -> dict[str, Any]:
    draw = Draw(model_type, seed)
    match model_type:
        case "mixtral" | "minimax_m2":
            return text(draw) | experts(draw, "num_local_experts")
        case "gpt_oss":
            return text(draw) | experts(draw, "num_local_experts") | {"sliding_window": 4}
        case "olmoe":
            return text(draw) | experts(draw) | _FOUR_HEADS
        case "qwen2_moe" | "qwen3_moe":
            layers = draw.kind({"decoder_sparse_step": 1}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]})
            more = {"shared_expert_intermediate_size": 28, **_FOUR_HEADS} if model_type == "qwen2_moe" else {}
            tied, biased = draw.kind(True, False), draw.kind(False, True)
            more |= {"qkv_bias" if model_type == "qwen2_moe" else "attention_bias": biased}
            return text(draw, tie_word_embeddings=tied) | experts(draw) | _SMALL | layers | more
        case "deepseek_v2" | "deepseek_v3":
            return latent(draw, q_lora_rank=draw.kind(None, 18))
        case "glm4_moe_lite":
            return latent(draw)
        case "deepseek_v32" | "glm_moe_dsa":
            return latent(draw, index_head_dim=16, index_n_heads=2, index_topk=4)
        case "glm4_moe":
            kinds = {"attention_bias": draw.kind(True, False), "use_qk_norm": draw.kind(True, True, False)}
            return text(draw) | routed(draw) | kinds
        case "dots1":
            return text(draw) | routed(draw)
        case "exaone_moe":
            kinds = {"first_k_dense_replace": draw.kind(1, 0), "num_shared_experts": 1, "sliding_window": 4}
            return text(draw) | experts(draw) | _SMALL | kinds
        case "ernie4_5_moe":
            parts = {"moe_num_experts": 3, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 1}
            return text(draw) | parts | _FOUR_HEADS | {"tie_word_embeddings": draw.kind(True, False)}
    raise AssertionError(model_type)


BY_TRANSFORMERS = (
    "mixtral",
    "minimax_m2",
    "gpt_oss",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm_moe_dsa",
    "glm4_moe",
    "glm4_moe_lite",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
)


def saved(model_type: str, directory: Path, seed: int) -> Path:
    """A random model as transformers saves it; biases that it keeps in float32 stay so."""
    settings = {key: value for key, value in config(model_type, seed).items() if value is not None}
    made = transformers.AutoConfig.for_model(model_type, **settings)
    if "kv_lora_rank" in settings:
        made.q_lora_rank = settings.get("q_lora_rank")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
    model.save_pretrained(directory)
    return directory


def with_mtp(directory: Path) -> Path:
    """The same with a layer behind the last, which transformers neither loads nor saves."""
    tensors = load_file(directory / "model.safetensors")
    settings = json.loads((directory / "config.json").read_text())
    n = settings["num_hidden_layers"]
    last, mtp = L.format(n - 1), L.format(n)
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[mtp + name.removeprefix(last)] = torch.randn_like(tensors[name])
    hidden = settings["hidden_size"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{mtp}{name}.weight"] = torch.randn(hidden, dtype=torch.bfloat16)
    tensors[f"{mtp}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, dtype=torch.bfloat16)
    tensors[f"{mtp}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{mtp}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 1}))
    return directory


# ------------------------------------------------------------------------------------------------------------ walking


def opened(directory: Path) -> tuple[Checkpoint, Family, Facts]:
    checkpoint = open_path(directory)
    assert checkpoint.config is not None
    family = FAMILIES[checkpoint.config["model_type"]]
    return from_modules(checkpoint, checkpoint.config), family, family.facts(checkpoint.config)


def on_disk(checkpoint: Checkpoint, family: Family, facts: Facts, layout: megatron.Layout) -> dict[str, Tensor]:
    named = apply.to_megatron(checkpoint.tensors, family, facts)
    alike = family.stacked and len(set(facts.layers)) == 1
    return megatron.on_disk(named, layout, facts.sizes, stack_layers=alike)


def from_disk(tensors: Mapping[str, Tensor], family: Family, facts: Facts) -> dict[str, Tensor]:
    hub = apply.to_hub(megatron.in_memory(tensors).tensors, family, facts)
    return hub | {copy.name: hub[copy.of] for copy in copies(family, facts) if copy.always}


def bits(tensor: Tensor, checkpoint: Checkpoint) -> tuple[str, tuple[int, ...], bytes]:
    return tensor.dtype.name, tensor.shape, tensor.read(checkpoint.source).tobytes()


def truth(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What safetensors' own reader finds in a directory."""
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    found = {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
    return {k: (names[v.dtype], tuple(v.shape), raw(v)) for k, v in found.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def as_torch(tensor: Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    data = np.frombuffer(bytearray(tensor.read(checkpoint.source).tobytes()), np.uint8)
    dtype = torch.bfloat16 if tensor.dtype.name == "BF16" else torch.float32
    return torch.from_numpy(data.copy()).view(dtype).reshape(tensor.shape)


def check_walk(directory: Path) -> None:
    checkpoint, family, facts = opened(directory)
    for layout in (megatron.TORCH_DIST, FSDP):
        disk = on_disk(checkpoint, family, facts, layout)
        back = from_disk(disk, family, facts)
        assert {name: bits(tensor, checkpoint) for name, tensor in back.items()} == truth(directory)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", BY_TRANSFORMERS)
def test_a_model_of_transformers_comes_back_from_megatrons_files_bit_for_bit(
    model_type: str, seed: int, tmp_path: Path
) -> None:
    check_walk(saved(model_type, tmp_path / "model", seed))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe", "glm4_moe_lite"])
def test_the_layer_that_predicts_a_second_token_comes_back_with_what_it_repeats(
    model_type: str, tmp_path: Path
) -> None:
    check_walk(with_mtp(saved(model_type, tmp_path / "model", 1)))


def test_k_exaones_layer_that_predicts_a_second_token_is_dense_and_beside_the_model(tmp_path: Path) -> None:
    directory = saved("exaone_moe", tmp_path / "model", 0)
    tensors = load_file(directory / "model.safetensors")
    settings = json.loads((directory / "config.json").read_text())
    first = L.format(0)
    for name in [name for name in tensors if name.startswith(first)]:
        tensors["mtp.layers.0." + name.removeprefix(first)] = torch.randn_like(tensors[name])
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        tensors[f"mtp.{name}.weight"] = torch.randn(32, dtype=torch.bfloat16)
    tensors["mtp.fc.weight"] = torch.randn(32, 64, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    switches = [kind == "sparse" for kind in settings.pop("mlp_layer_types")]
    changes = {"num_nextn_predict_layers": 1, "is_moe_layer": switches}
    (directory / "config.json").write_text(json.dumps(settings | changes))
    check_walk(directory)


def test_a_padded_vocabulary_is_padded_with_zeros_and_cut_again(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(saved("mixtral", tmp_path / "model", 0))
    padded = facts.sized(padded_vocab=256)
    disk = on_disk(checkpoint, family, padded, megatron.TORCH_DIST)
    embedding = as_torch(disk["embedding.word_embeddings.weight"], checkpoint)
    assert embedding.shape[0] == 256
    assert not embedding[facts.sizes["vocab"] :].any()
    back = from_disk(disk, family, padded)
    assert {name: bits(tensor, checkpoint) for name, tensor in back.items()} == truth(tmp_path / "model")


@pytest.mark.parametrize(("seed", "numbered"), [(0, False), (1, True), (2, True)])
def test_layers_are_numbered_on_disk_where_some_are_dense(seed: int, numbered: bool, tmp_path: Path) -> None:
    directory = saved("qwen3_moe", tmp_path / "model", seed)
    assert main(["convert", str(directory), str(tmp_path / "run"), "--to", "torch_dist"]) == 0
    (iteration,) = (tmp_path / "run").glob("iter_*")
    norms = {name for name in dcp.open(iteration).tensors if name.endswith("q_layernorm.weight")}
    layers = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    own = {f"{D.format(layer)}self_attention.q_layernorm.weight" for layer in range(layers)}
    assert norms == (own if numbered else {"decoder.layers.self_attention.q_layernorm.weight"})


# ------------------------------------------------------------------------------- models that transformers has not got


def by_hand(settings: dict[str, Any], directory: Path) -> Path:
    """Ling 2.0's, Hy3's and Sarvam's tensors by their names on the hub."""
    torch.manual_seed(0)
    h, f, v = settings["hidden_size"], settings["moe_intermediate_size"], settings["vocab_size"]
    ling = settings["model_type"] in ("bailing_moe_v2", "sarvam_moe")
    shapes = {f"model.{'word_embeddings' if ling else 'embed_tokens'}.weight": (v, h), "lm_head.weight": (v, h)}
    shapes["model.norm.weight"] = (h,)
    num_layers = settings["num_hidden_layers"]
    for layer in range(num_layers + settings.get("num_nextn_predict_layers", 0)):
        at = L.format(layer)
        shapes |= {f"{at}{name}.weight": (h,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {at + name: shape for name, shape in _attention(settings).items()}
        for name in ("gate_proj", "up_proj", "down_proj"):
            turned = -1 if name == "down_proj" else 1
            if layer < settings["first_k_dense_replace"]:
                shapes[f"{at}mlp.{name}.weight"] = (20, h)[::turned]
                continue
            shared = "shared_mlp" if settings["model_type"] == "hy_v3" else "shared_experts"
            shapes[f"{at}mlp.{shared}.{name}.weight"] = (f, h)[::turned]
            for expert in range(settings["num_experts"]):
                shapes[f"{at}mlp.experts.{expert}.{name}.weight"] = (f, h)[::turned]
        if layer >= settings["first_k_dense_replace"]:
            router, bias = _router(settings["model_type"])
            shapes |= {f"{at}mlp.{router}": (settings["num_experts"], h), f"{at}mlp.{bias}": (settings["num_experts"],)}
        if layer >= num_layers:
            shapes |= {f"{at}{name}.weight": (h,) for name in ("enorm", "hnorm", "final_layernorm")}
            shapes[f"{at}eh_proj.weight"] = (h, 2 * h)
    f32 = ("expert_bias", "e_score_correction_bias")
    dtypes = {name: torch.float32 if name.endswith(f32) else torch.bfloat16 for name in shapes}
    directory.mkdir()
    save_file({n: torch.randn(s, dtype=dtypes[n]) for n, s in shapes.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def _attention(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, heads, groups, d = settings["hidden_size"], settings["num_attention_heads"], settings["num_key_value_heads"], 8
    match settings["model_type"]:
        case "hy_v3":
            q_k_v = {"q": heads, "k": groups, "v": groups}
            shapes = {f"self_attn.{x}_proj.weight": (n * d, h) for x, n in q_k_v.items()}
            shapes |= {f"self_attn.{x}_norm.weight": (d,) for x in "qk"}
            return {**shapes, "self_attn.o_proj.weight": (h, heads * d)}
        case "sarvam_mla":
            names = {"q_proj": (40, h), "kv_a_proj_with_mqa": (18, h), "kv_a_layernorm": (14,), "kv_b_proj": (64, 14)}
            return {f"self_attn.{n}.weight": s for n, s in (names | {"o_proj": (h, 40)}).items()}
    names = {"query_key_value": ((heads + 2 * groups) * d, h), "dense": (h, heads * d)}
    names |= {"query_layernorm": (d,), "key_layernorm": (d,)}
    return {f"attention.{n}.weight": s for n, s in names.items()}


def _router(model_type: str) -> tuple[str, str]:
    if model_type == "hy_v3":
        return "router.gate.weight", "expert_bias"
    return "gate.weight", "gate.e_score_correction_bias" if model_type == "sarvam_mla" else "gate.expert_bias"


HAND_MADE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 24,
    "vocab_size": 67,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_experts": 3,
    "num_shared_experts": 1,
    "moe_intermediate_size": 12,
}


@pytest.mark.parametrize("model_type", ["bailing_moe_v2", "sarvam_moe", "hy_v3", "sarvam_mla"])
def test_a_model_that_is_only_on_the_hub_comes_back_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    latent = {"kv_lora_rank": 14, "qk_rope_head_dim": 4} if model_type == "sarvam_mla" else {}
    mtp = {"num_nextn_predict_layers": 1} if model_type in ("bailing_moe_v2", "hy_v3") else {}
    check_walk(by_hand(HAND_MADE | latent | mtp | {"model_type": model_type}, tmp_path / "model"))


# -------------------------------------------------------------------------------------- against plain torch arithmetic


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    per_group = zip(q.chunk(groups), k.chunk(groups), v.chunk(groups), strict=True)
    return torch.cat([rows for group in per_group for rows in group])


def test_gpt_oss_has_gate_above_up_where_the_hub_has_them_by_turns(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(saved("gpt_oss", tmp_path / "model", 2))
    hub = load_file(tmp_path / "model" / "model.safetensors")
    disk = on_disk(checkpoint, family, facts, megatron.TORCH_DIST)
    layers = range(len(facts.layers))
    wanted = {}
    for layer in layers:
        at = L.format(layer) + "mlp.experts."
        up, bias = hub[at + "gate_up_proj"].transpose(1, 2), hub[at + "gate_up_proj_bias"]
        wanted[layer] = {
            "linear_fc1.weight": torch.cat([up[:, 0::2], up[:, 1::2]], 1),
            "linear_fc1.bias": torch.cat([bias[:, 0::2], bias[:, 1::2]], 1),
            "linear_fc2.weight": hub[at + "down_proj"].transpose(1, 2),
            "linear_fc2.bias": hub[at + "down_proj_bias"],
        }
    for name in wanted[0]:
        found = as_torch(disk[f"decoder.layers.mlp.experts.experts.{name}"], checkpoint)
        assert raw(found) == raw(torch.stack([wanted[layer][name] for layer in layers]))
    halves = on_disk(checkpoint, family, facts, FSDP)
    expert = "model.module.decoder.layers.1.mlp.experts.linear_fc1.bias1"
    assert raw(as_torch(halves[f"{expert}_w"], checkpoint)) == raw(
        hub[L.format(1) + "mlp.experts.gate_up_proj_bias"][1, 0::2]
    )
    assert raw(as_torch(halves[f"{expert}_v"], checkpoint)) == raw(
        hub[L.format(1) + "mlp.experts.gate_up_proj_bias"][1, 1::2]
    )


def test_lings_one_tensor_of_queries_keys_and_values_is_grouped_by_key_head(tmp_path: Path) -> None:
    directory = by_hand(HAND_MADE | {"model_type": "bailing_moe_v2"}, tmp_path / "model")
    checkpoint, family, facts = opened(directory)
    hub = load_file(directory / "model.safetensors")
    disk = on_disk(checkpoint, family, facts, megatron.TORCH_DIST)
    q, k, v = hub[L.format(2) + "attention.query_key_value.weight"].split((4 * 8, 2 * 8, 2 * 8))
    found = as_torch(disk[D.format(2) + "self_attention.linear_qkv.weight"], checkpoint)
    assert raw(found) == raw(_grouped(q, k, v, 2))


def test_experts_are_stacked_with_their_gates_above_and_biases_of_one_row_are_vectors(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(saved("ernie4_5_moe", tmp_path / "model", 0))
    hub = load_file(tmp_path / "model" / "model.safetensors")
    disk = on_disk(checkpoint, family, facts, megatron.TORCH_DIST)
    at = L.format(1) + "mlp."
    pairs = [[hub[f"{at}experts.{e}.{x}_proj.weight"] for x in ("gate", "up")] for e in range(3)]
    stacked = torch.stack([torch.cat(pair) for pair in pairs])
    assert raw(as_torch(disk[D.format(1) + "mlp.experts.experts.linear_fc1.weight"], checkpoint)) == raw(stacked)
    bias = disk[D.format(1) + "mlp.router.expert_bias"]
    assert (bias.dtype.name, bias.shape) == ("F32", (3,))
    assert raw(as_torch(bias, checkpoint)) == raw(hub[f"{at}moe_statics.e_score_correction_bias"])


# ------------------------------------------------------------------------------------------- names of other releases


@pytest.mark.parametrize(("module", "halves"), [("local_experts", False), ("experts", True)])
def test_norms_of_latent_attention_kept_apart_and_numbered_experts_are_read(
    module: str, halves: bool, tmp_path: Path
) -> None:
    directory = with_mtp(saved("deepseek_v3", tmp_path / "model", 1))
    checkpoint, family, facts = opened(directory)
    plain = on_disk(checkpoint, family, facts, megatron.Layout(stacked=False, halves=halves))
    local = {}
    for name, tensor in plain.items():
        for kind in ("q", "kv"):
            name = name.replace(f"linear_{kind}_up_proj.layer_norm_weight", f"{kind}_layernorm.weight")
        path, _, rest = name.rpartition(".weight")
        expert = rest.rstrip("_wv")
        if ".experts." in name and expert:
            name = path.replace(".experts.", f".experts.{module}.{expert}.") + ".weight" + rest.removeprefix(expert)
        local[name.replace("transformer_layer", "mtp_model_layer")] = tensor
    assert len(set(local) & set(plain)) < len(plain)
    assert {n: bits(t, checkpoint) for n, t in from_disk(local, family, facts).items()} == truth(directory)


def test_a_fused_down_projection_is_taken_apart(tmp_path: Path) -> None:
    directory = saved("deepseek_v3", tmp_path / "model", 1)
    checkpoint, family, facts = opened(directory)
    hub = load_file(directory / "model.safetensors")
    fused = {}
    for layer in range(len(facts.layers)):
        at, ours = L.format(layer) + "self_attn.", D.format(layer) + "self_attention.linear_qkv_down_proj."
        fused[f"{ours}weight"] = torch.cat([hub[f"{at}q_a_proj.weight"], hub[f"{at}kv_a_proj_with_mqa.weight"]])
        fused[f"{ours}layer_norm_weight"] = hub[L.format(layer) + "input_layernorm.weight"]
    save_file(fused, tmp_path / "fused.safetensors")
    megatrons = on_disk(checkpoint, family, facts, megatron.Layout(stacked=False))
    left = ("linear_q_down_proj.weight", "linear_kv_down_proj.weight", ".input_layernorm.weight")
    tensors = {name: tensor for name, tensor in megatrons.items() if not name.endswith(left)}
    other = open_path(tmp_path / "fused.safetensors")
    back = from_disk(tensors | dict(other.tensors), family, facts)
    assert sorted(back) == sorted(hub)
    for layer in range(len(facts.layers)):
        for name in ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "input_layernorm"):
            whole = L.format(layer) + name + ".weight"
            assert raw(as_torch(back[whole], other)) == raw(hub[whole])


def test_norms_before_experts_are_read_under_the_name_of_a_dense_mlps(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(saved("mixtral", tmp_path / "model", 1))
    disk = on_disk(checkpoint, family, facts, megatron.TORCH_DIST)
    disk["decoder.layers.mlp.linear_fc1.layer_norm_weight"] = disk.pop("decoder.layers.pre_mlp_layernorm.weight")
    back = from_disk(disk, family, facts)
    assert {n: bits(t, checkpoint) for n, t in back.items()} == truth(tmp_path / "model")


# -------------------------------------------------------------------------------------------------- published configs

_DEEPSEEK = {"num_key_value_heads": 128, "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_layer_freq": 1}
_DEEPSEEK |= {"num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "tie_word_embeddings": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {
        **_DEEPSEEK,
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "topk_method": "noaux_tc",
        "vocab_size": 129280,
    },
    "Kimi-K2": {
        **_DEEPSEEK,
        "model_type": "kimi_k2",
        "hidden_size": 7168,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 1,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "topk_method": "noaux_tc",
        "vocab_size": 163840,
    },
    "DeepSeek-V2-Lite": {
        **_DEEPSEEK,
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "vocab_size": 102400,
    },
    "GLM-4.5": {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "use_qk_norm": True,
        "hidden_size": 5120,
        "head_dim": 128,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "num_hidden_layers": 92,
        "first_k_dense_replace": 3,
        "n_routed_experts": 160,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
        "vocab_size": 151552,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "hidden_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "hidden_size": 4096,
        "head_dim": 128,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "num_hidden_layers": 94,
        "num_experts": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
}
NUM_TENSORS = {
    "DeepSeek-V3": 3 + 61 * 9 + 3 * 3 + 58 * (256 * 3 + 5) + (9 + 256 * 3 + 5 + 4 + 2),
    "Kimi-K2": 3 + 61 * 9 + 3 + 60 * (384 * 3 + 5),
    "DeepSeek-V2-Lite": 3 + 27 * 7 + 3 + 26 * (64 * 3 + 4),
    "GLM-4.5": 3 + 92 * 11 + 3 * 3 + 89 * (160 * 3 + 5) + (11 + 160 * 3 + 5 + 4 + 2),
    "gpt-oss-20b": 3 + 24 * (2 + 8 + 1 + 2 + 4),
    "Qwen3-235B-A22B": 3 + 94 * (8 + 1 + 128 * 3),
}
SOME_NAMES = {
    "DeepSeek-V3": (
        "model.layers.61.mlp.experts.255.down_proj.weight",
        "model.layers.61.shared_head.head.weight",
        "model.layers.61.embed_tokens.weight",
        "model.layers.2.mlp.gate_proj.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    ),
    "Kimi-K2": ("model.layers.60.mlp.experts.383.up_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"),
    "DeepSeek-V2-Lite": ("model.layers.26.self_attn.q_proj.weight", "model.layers.26.self_attn.kv_b_proj.weight"),
    "GLM-4.5": ("model.layers.92.eh_proj.weight", "model.layers.92.self_attn.q_norm.weight"),
    "gpt-oss-20b": ("model.layers.23.mlp.experts.gate_up_proj_bias", "model.layers.0.self_attn.sinks"),
    "Qwen3-235B-A22B": ("model.layers.93.mlp.experts.127.gate_proj.weight",),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_every_name_of_its_index_once(name: str) -> None:
    family = FAMILIES[PUBLISHED[name]["model_type"]]
    facts = family.facts(PUBLISHED[name])
    rows = entries(family, facts)
    hub = Counter(hub for entry in rows if entry.index in (None, 0) for hub in entry.hub)
    hub.update(copy.name for copy in copies(family, facts) if copy.always)
    assert set(hub.values()) == {1}
    assert len(hub) == NUM_TENSORS[name]
    assert set(SOME_NAMES[name]) <= set(hub)
    ours = Counter(entry.name for entry in rows)
    assert set(ours.values()) == {1}
    assert not set(ours) & set(variants(family, facts))


def test_configs_of_either_release_of_transformers_mean_the_same() -> None:
    old = PUBLISHED["DeepSeek-V3"]
    kinds = ["dense"] * 3 + ["sparse"] * 58
    new = {k: v for k, v in old.items() if k not in ("first_k_dense_replace", "moe_layer_freq", "topk_method")}
    family = FAMILIES["deepseek_v3"]
    assert family.facts(new | {"mlp_layer_types": kinds}) == family.facts(old)
    sparse = old | {"model_type": "glm_moe_dsa", "num_experts": 7}
    assert FAMILIES["glm_moe_dsa"].facts(sparse).counts["expert"] == 256


@pytest.mark.parametrize(
    "schedule",
    [
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_pattern": "FSFSSFSF"},
        {},
    ],
)
def test_layers_that_share_an_indexer_have_none_of_their_own(schedule: dict[str, Any]) -> None:
    made = transformers.AutoConfig.for_model("glm_moe_dsa", num_hidden_layers=8, **schedule)
    sizes = PUBLISHED["DeepSeek-V3"] | {"model_type": "glm_moe_dsa", "num_hidden_layers": 8, "n_group": 1}
    facts = FAMILIES["glm_moe_dsa"].facts(sizes | schedule)
    assert ["indexer" in tags for tags in facts.layers] == [kind == "full" for kind in made.indexer_types]


def test_queries_that_are_not_compressed_are_said_so_where_megatron_bridge_would_compress_them() -> None:
    family = FAMILIES["deepseek_v2"]
    lite = PUBLISHED["DeepSeek-V2-Lite"] | {"intermediate_size": 10944, "moe_intermediate_size": 1408}
    lite |= {"num_experts_per_tok": 6, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 163840}
    settings, _ = megatron_config.to_megatron(lite, family, family.facts(lite))
    assert settings["q_lora_rank"] is None
    assert (
        yaml.safe_load(run_config.run_config(settings, ckpt_format="torch_dist", hf_model_id=None))["model"][
            "q_lora_rank"
        ]
        is None
    )


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("DeepSeek-V3", "kv_lora_rank"),
        ("DeepSeek-V3", "first_k_dense_replace"),
        ("GLM-4.5", "num_hidden_layers"),
    ],
)
def test_a_config_without_a_size_is_refused_by_the_sizes_name(name: str, key: str) -> None:
    settings = {k: v for k, v in PUBLISHED[name].items() if k != key}
    with pytest.raises(Mismatch, match=key):
        FAMILIES[settings["model_type"]].facts(settings)


def test_a_config_without_a_number_of_experts_is_refused() -> None:
    settings = {k: v for k, v in PUBLISHED["gpt-oss-20b"].items() if k != "num_local_experts"}
    with pytest.raises(Mismatch, match="how many experts"):
        FAMILIES["gpt_oss"].facts(settings)


def test_quantised_experts_of_gpt_oss_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(saved("gpt_oss", tmp_path / "model", 0))
    tensors = dict(checkpoint.tensors)
    tensors["model.layers.0.mlp.experts.down_proj_blocks"] = tensors.pop("model.layers.0.mlp.experts.down_proj")
    with pytest.raises(Mismatch, match=r"model\.layers\.0\.mlp\.experts\.down_proj_blocks"):
        apply.to_megatron(tensors, family, facts)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    checkpoint, family, facts = opened(saved("olmoe", tmp_path / "model", 0))
    lost = "model.layers.1.mlp.experts.1.up_proj.weight"
    with pytest.raises(Incomplete, match=lost.replace(".", r"\.")):
        apply.to_megatron({k: v for k, v in checkpoint.tensors.items() if k != lost}, family, facts)
