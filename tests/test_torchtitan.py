"""torchtitan's names to hub names and back, held against transformers.

The names and layouts that the models are given here are torchtitan's (state_dict_adapter.py of each model, at b5bcd76
of August 2026, and at v0.2.2), stated a second time with torch's operations.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoConfig, AutoModelForCausalLM

import reshard
import tiny_models
from checkpoints import write_dcp
from reshard.core.checkpoint import Checkpoint, Origin
from reshard.core.dtypes import dtype
from reshard.core.tensor import Literal, Tensor
from reshard.dialects import match, torchtitan
from reshard.dialects.fuse import QKV, SAME, Chained, Rotary
from reshard.dialects.table import Row
from reshard.errors import Incomplete, Mismatch, Unsupported
from reshard.storage.files import LazySource

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

Tensors = dict[str, torch.Tensor]

TEXT = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": TEXT | {"tie_word_embeddings": False},
    "qwen3": TEXT | {"tie_word_embeddings": True},
    "qwen3_moe": tiny_models.CONFIGS["qwen3_moe"] | TEXT | {"tie_word_embeddings": False},
    "deepseek_v3": tiny_models.CONFIGS["deepseek_v3"] | {"tie_word_embeddings": False},
    "gpt_oss": TEXT
    | {
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "llama4_text": TEXT
    | {"intermediate_size_mlp": 20, "num_local_experts": 3, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
}

# Plain names of HuggingFace, and torchtitan's for the same tensor.
NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
    "self_attn.sinks": "attention.sinks",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.gate.weight": "moe.router.gate.weight",
    "mlp.router.weight": "moe.router.gate.weight",
    "mlp.router.bias": "moe.router.gate.bias",
    "mlp.gate.e_score_correction_bias": "moe.expert_bias_E",
    "mlp.shared_experts.gate_proj.weight": "moe.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "moe.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "moe.shared_experts.w2.weight",
    "feed_forward.gate_proj.weight": "feed_forward.w1.weight",
    "feed_forward.up_proj.weight": "feed_forward.w3.weight",
    "feed_forward.down_proj.weight": "feed_forward.w2.weight",
    "feed_forward.router.weight": "moe.router.gate.weight",
    "feed_forward.shared_expert.gate_proj.weight": "moe.shared_experts.w1.weight",
    "feed_forward.shared_expert.up_proj.weight": "moe.shared_experts.w3.weight",
    "feed_forward.shared_expert.down_proj.weight": "moe.shared_experts.w2.weight",
}
LATENT = {
    "self_attn.q_proj": "attention.wq",  # where the config has no q_lora_rank
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a",
    "self_attn.kv_a_layernorm": "attention.kv_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
}
EXPERTS = "moe.routed_experts.inner_experts"


def make(model_type: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(model_type, **(CONFIGS[model_type] | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 0.1 + (1.0 if tensor.ndim == 1 else 0.0))
    return model.eval()


def reverse_permute(w: torch.Tensor, n_heads: int) -> torch.Tensor:
    """torchtitan llama3: HF -> titan is view(heads, 2, head_dim / 2, in).transpose(1, 2), of wq and wk."""
    return w.view(n_heads, 2, w.shape[0] // n_heads // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def to_titan(model: Any) -> Tensors:
    """The model's state dict as torchtitan holds it. transformers 5 has fused experts: gate above up, (E, 2F, D)."""
    model_type, config = model.config.model_type, model.config
    names = NAMES | LATENT if model_type == "deepseek_v3" else NAMES
    result: Tensors = {}
    for fqn, tensor in model.state_dict().items():
        at, name = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.+)", fqn).groups(default="")  # type: ignore[union-attr]
        if name.endswith("mlp.experts.gate_up_proj") and model_type != "gpt_oss":
            result[f"{at}{EXPERTS}.w1_EFD"], result[f"{at}{EXPERTS}.w3_EFD"] = tensor.chunk(2, dim=1)
        elif name.endswith("mlp.experts.down_proj") and model_type != "gpt_oss":
            result[f"{at}{EXPERTS}.w2_EDF"] = tensor
        elif name == "mlp.experts.gate_up_proj":  # gpt_oss: (E, D, 2F) in transformers, (E, 2F, D) in torchtitan
            result[f"{at}{EXPERTS}.mlp1_weight_EGD"] = tensor.transpose(1, 2)
        elif name == "mlp.experts.down_proj":
            result[f"{at}{EXPERTS}.mlp2_weight_EDF"] = tensor.transpose(1, 2)
        elif name.startswith("mlp.experts."):
            result[f"{at}{EXPERTS}." + {"gate": "mlp1_bias_EG", "down": "mlp2_bias_ED"}[name[12:16]]] = tensor
        elif name == "feed_forward.experts.gate_up_proj":  # llama4: chunk(2, dim=-1), each transposed
            w1, w3 = tensor.chunk(2, dim=-1)
            result[f"{at}{EXPERTS}.w1_EFD"], result[f"{at}{EXPERTS}.w3_EFD"] = w1.transpose(1, 2), w3.transpose(1, 2)
        elif name == "feed_forward.experts.down_proj":
            result[f"{at}{EXPERTS}.w2_EDF"] = tensor.transpose(1, 2)
        else:
            if model_type == "llama" and name == "self_attn.q_proj.weight":
                tensor = reverse_permute(tensor, config.num_attention_heads)
            if model_type == "llama" and name == "self_attn.k_proj.weight":
                tensor = reverse_permute(tensor, config.num_key_value_heads)
            stem, _, kind = name.rpartition(".")
            result[at + (names[name] if name in names else f"{names[stem]}.{kind}")] = tensor
    return {fqn: tensor.detach().clone().contiguous() for fqn, tensor in result.items()}


def as_v0_2_2(tensors: Tensors) -> Tensors:
    older = {
        fqn.replace("qkv_linear.", "")
        .replace("routed_experts.inner_experts", "experts")
        .replace("lm_head", "output"): t
        for fqn, t in tensors.items()
    }
    return {re.sub(r"_[A-Z]+$", "", fqn): tensor for fqn, tensor in older.items()}


def as_of_spring_2026(tensors: Tensors) -> Tensors:
    """Experts had dimensions in their names before they moved into `routed_experts`."""
    return {fqn.replace("routed_experts.inner_experts", "experts"): tensor for fqn, tensor in tensors.items()}


def as_fused(tensors: Tensors) -> Tensors:
    """FusedQKVLinear before its state dict hooks: (kv_heads, heads / kv_heads + 2, head_dim, in), flattened."""
    result = {fqn: tensor for fqn, tensor in tensors.items() if "qkv_linear" not in fqn}
    for fqn, query in tensors.items():
        if "qkv_linear.wq." in fqn:
            key, value = (tensors[fqn.replace(".wq.", f".{w}.")] for w in ("wk", "wv"))
            tail = query.shape[1:]
            q, k, v = (t.view(2, -1, 8, *tail) for t in (query, key, value))
            result[fqn.replace(".wq.", ".wqkv.")] = torch.cat([q, k, v], dim=1).reshape(-1, *tail)
    return result


def save(tensors: Tensors, directory: Path) -> Path:
    """`step-N/` as torchtitan's checkpointer calls DCP: the model's names at the top level, beside the rest."""
    state = {
        f"state.{fqn}.{moment}": torch.zeros_like(t) for fqn, t in tensors.items() for moment in ("exp_avg", "step")
    }
    rest = {"lr_scheduler": {"last_epoch": 500}, "dataloader": {"dp_rank_0": b"x"}, "train_state": {"step": 500}}
    dcp.save({**tensors, "optimizer": state, **rest}, checkpoint_id=directory, no_dist=True)
    return directory


def save_of_two_ranks(tensors: Tensors, directory: Path) -> Path:
    """The last `step-N/` of a run, which may hold the model alone; each tensor in chunks of two ranks."""
    return write_dcp(directory, tensors)


def save_base(model: Any, directory: Path, **changes: Any) -> Path:
    """What `--base` names: the config alone."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.config.save_pretrained(directory)
    return directory


def assert_loads(model: Any, output: Path) -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert {name: value for name, value in info.items() if value} == {}
    assert torch.equal(tiny_models.logits(loaded.eval()), tiny_models.logits(model))
    for fqn, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[fqn], tensor), fqn


def of(tensors: Tensors) -> Checkpoint:
    def literal(tensor: torch.Tensor) -> Tensor:
        return Literal(dtype("float32"), tuple(tensor.shape), np.ascontiguousarray(tensor.numpy()).tobytes())

    return Checkpoint({fqn: literal(t) for fqn, t in tensors.items()}, Origin(Path("run"), "test"), LazySource())


def values(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {fqn: (lazy.shape, np.ascontiguousarray(lazy.numpy()).tobytes()) for fqn, lazy in checkpoint.items()}


def config_of(model: Any) -> dict[str, Any]:
    return dict(model.config.to_dict())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_transformers_loads_a_merged_step_and_computes_the_same(model_type: str, tmp_path: Path) -> None:
    model = make(model_type)
    step = save(to_titan(model), tmp_path / "step-500")
    merged = reshard.merge(step, tmp_path / "out", base=str(save_base(model, tmp_path / "base")))
    assert_loads(model, merged.output)
    assert any(notice.startswith(f"torchtitan's names to the hub's of {model_type}: ") for notice in merged.notices)


@pytest.mark.parametrize("spelling", [as_v0_2_2, as_of_spring_2026])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_older_releases_spell_the_same_otherwise(
    model_type: str, spelling: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    model = make(model_type)
    step = save_of_two_ranks(spelling(to_titan(model)), tmp_path / "step-500")
    merged = reshard.merge(step, tmp_path / "out", base=str(save_base(model, tmp_path / "base")))
    assert_loads(model, merged.output)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_oss", "llama4_text"])
def test_fused_queries_keys_and_values_are_taken_apart(model_type: str, tmp_path: Path) -> None:
    model = make(model_type)
    step = save_of_two_ranks(as_fused(to_titan(model)), tmp_path / "step-500")
    merged = reshard.merge(step, tmp_path / "out", base=str(save_base(model, tmp_path / "base")))
    assert_loads(model, merged.output)


def test_small_blocks_give_the_same_bytes(tmp_path: Path) -> None:
    model = make("llama")
    step = save_of_two_ranks(to_titan(model), tmp_path / "step-500")
    base = str(save_base(model, tmp_path / "base"))
    merged = reshard.merge(step, tmp_path / "out", base=base, block_nbytes=200)
    assert_loads(model, merged.output)


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    model = make("qwen3")
    step = save(to_titan(model), tmp_path / "step-500")
    merged = reshard.merge(step, tmp_path / "out", base=str(save_base(model, tmp_path / "base")))
    assert "lm_head.weight" not in reshard.open(merged.output)


def test_rotated_queries_and_keys_agree_in_both_orders() -> None:
    """torchtitan rotates (x[2i], x[2i + 1]) as a complex number, transformers (x[i], x[i + head_dim / 2])."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    model = make("llama")
    config, position = config_of(model), torch.arange(5)[None]
    hub = torchtitan.to_hub(of(to_titan(model)), config)
    x = torch.randn(5, 16)
    cos, sin = LlamaRotaryEmbedding(model.config)(x, position)
    heads, turned = {}, {}
    for theirs, ours, count in (("q", "wq", 4), ("k", "wk", 2)):
        weight = torch.from_numpy(hub[f"model.layers.0.self_attn.{theirs}_proj.weight"].numpy().copy())
        heads[theirs] = (x @ weight.T).view(1, 5, count, 8).transpose(1, 2)
        titan = (x @ to_titan(model)[f"layers.0.attention.qkv_linear.{ours}.weight"].T).view(5, count, 4, 2)
        angles = torch.outer(torch.arange(5.0), 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8))
        rotated = torch.view_as_complex(titan) * torch.polar(torch.ones_like(angles), angles)[:, None]
        turned[theirs] = torch.view_as_real(rotated).flatten(2).transpose(0, 1)
    query, key = apply_rotary_pos_emb(heads["q"], heads["k"], cos, sin)
    expected = turned["q"] @ turned["k"].repeat_interleave(2, 0).transpose(1, 2)
    assert torch.allclose((query @ key.repeat_interleave(2, 1).transpose(2, 3))[0], expected, atol=1e-4)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_joining_undoes_splitting(model_type: str) -> None:
    model = make(model_type)
    titan = of(to_titan(model))
    back = torchtitan.from_hub(torchtitan.to_hub(titan, config_of(model)), config_of(model))
    assert values(back) == values(titan)


@pytest.mark.parametrize("rotary", [True, False])
def test_fused_projections_are_joined_as_they_were_split(rotary: bool) -> None:
    of_parts = (Rotary("heads"), Rotary("groups"), SAME) if rotary else (SAME, SAME, SAME)
    row = Row("qkv", ("q", "k", "v"), Chained(QKV, of_parts))
    sizes = {"heads": 6, "groups": 2, "head_dim": 4}
    fused = of({"qkv": torch.randn((6 + 2 + 2) * 4, 5)})
    parts = match.split(fused.tensors["qkv"], row, {}, sizes)
    assert {name: part.shape for name, part in parts.items()} == {"q": (24, 5), "k": (8, 5), "v": (8, 5)}
    joined = replace(fused, tensors=match.joined(parts, [row], sizes))
    assert values(joined) == values(fused)


def test_layers_that_predict_further_tokens_are_counted_on() -> None:
    model = make("deepseek_v3")
    titan = to_titan(model)
    more = {f"mtp_{fqn.replace('.1.', '.0.')}": t for fqn, t in titan.items() if fqn.startswith("layers.1.")}
    more |= {f"mtp_layers.0.{name}.weight": torch.ones(16) for name in ("enorm", "hnorm", "mtp_norm")}
    hub = torchtitan.to_hub(of(titan | more), config_of(model))
    added = {fqn for fqn in hub if fqn.startswith("model.layers.2.")}
    assert len(added) == len([fqn for fqn in hub if fqn.startswith("model.layers.1.")]) + 3
    assert {"model.layers.2.shared_head.norm.weight", "model.layers.2.mlp.experts.3.up_proj.weight"} <= added
    back = torchtitan.from_hub(hub, config_of(model))
    assert values(back) == values(of(titan | more))


def test_a_composed_llama4_has_its_text_under_language_model() -> None:
    config = {"model_type": "llama4", "text_config": config_of(make("llama4_text")), "vision_config": {}}
    titan = of(to_titan(make("llama4_text")))
    hub = torchtitan.to_hub(titan, config)
    assert {fqn.partition(".")[0] for fqn in hub} == {"language_model"}
    assert hub["language_model.model.layers.1.feed_forward.experts.gate_up_proj"].shape == (3, 16, 48)
    assert "language_model.lm_head.weight" in hub
    assert "torchtitan trains the text model alone: the output has no vision tower" in hub.notices
    assert values(torchtitan.from_hub(hub, config)) == values(titan)


def test_what_only_training_needs_is_left_out_and_said() -> None:
    model = make("qwen3_moe")
    hub = torchtitan.to_hub(of(to_titan(model) | {"layers.0.moe.expert_bias_E": torch.ones(3)}), config_of(model))
    assert not any("bias" in fqn for fqn in hub)
    assert [notice for notice in hub.notices if "left out" in notice and "layers.0.moe.expert_bias_E" in notice]


def test_a_quantized_base_does_not_make_the_weights_quantized(tmp_path: Path) -> None:
    model = make("gpt_oss")
    step = save(to_titan(model), tmp_path / "step-500")
    base = save_base(model, tmp_path / "base", quantization_config={"quant_method": "mxfp4"})
    merged = reshard.merge(step, tmp_path / "out", base=str(base))
    assert "config.json: quantization_config was taken out: the weights are not quantized" in merged.notices
    assert_loads(model, merged.output)


def test_names_without_a_place_are_listed() -> None:
    model = make("llama")
    strange = {f"layers.{n}.attention.qkv_linear.wq.lora_a.weight": torch.ones(2, 2) for n in range(2)}
    with pytest.raises(Mismatch) as caught:
        torchtitan.to_hub(of(to_titan(model) | strange), config_of(model))
    assert "2 of torchtitan's names have no place in a llama model" in str(caught.value)
    assert all(fqn in str(caught.value) for fqn in strange)
    with pytest.raises(Mismatch, match=r"expert_bias|have no place in a llama model"):
        torchtitan.to_hub(of(to_titan(make("qwen3_moe"))), config_of(model))


def test_models_without_a_table_are_named() -> None:
    with pytest.raises(Unsupported, match="no table leads to the hub's of mistral"):
        torchtitan.to_hub(of(to_titan(make("llama"))), {"model_type": "mistral"})


def test_a_config_that_does_not_fit_is_told_by_the_shapes() -> None:
    titan = to_titan(make("llama"))
    with pytest.raises(Mismatch, match="does not divide into 10 blocks of rows"):
        torchtitan.to_hub(of(titan), config_of(make("llama")) | {"num_attention_heads": 5})
    with pytest.raises(Mismatch, match="lacks num_attention_heads"):
        torchtitan.to_hub(of(titan), {"model_type": "llama"})
    with pytest.raises(Mismatch, match="rope_interleave: false"):
        torchtitan.to_hub(of(to_titan(make("deepseek_v3"))), config_of(make("deepseek_v3", rope_interleave=False)))


def test_experts_of_before_v0_2_0_are_refused_by_their_shape() -> None:
    model = make("qwen3_moe")
    turned = {fqn: t.transpose(1, 2).contiguous() if "experts" in fqn else t for fqn, t in to_titan(model).items()}
    with pytest.raises(Mismatch, match="should be the hidden_size of the config, 16"):
        torchtitan.to_hub(of(turned), config_of(model))


def test_missing_halves_are_an_error() -> None:
    model = make("llama4_text")
    titan = to_titan(model)
    del titan[f"layers.1.{EXPERTS}.w3_EFD"]
    with pytest.raises(Incomplete, match=r"gate_up_proj: no tensor for .*up_proj"):
        torchtitan.to_hub(of(titan), config_of(model))


def test_without_a_config_names_stay_and_the_way_out_is_said(tmp_path: Path) -> None:
    titan = to_titan(make("llama"))
    merged = reshard.merge(save(titan, tmp_path / "step-500"), tmp_path / "model.safetensors")
    assert set(reshard.open(merged.output)) == set(titan)
    assert any("--base" in notice for notice in merged.notices if "torchtitan's own" in notice)


def test_names_are_kept_when_that_is_asked(tmp_path: Path) -> None:
    model = make("llama")
    titan = to_titan(model)
    step, base = save(titan, tmp_path / "step-500"), save_base(model, tmp_path / "base")
    merged = reshard.merge(step, tmp_path / "out", base=str(base), keep_names=True)
    assert set(reshard.open(merged.output)) == set(titan)


def test_a_part_of_the_model_is_known_too(tmp_path: Path) -> None:
    model = make("llama")
    step, base = save(to_titan(model), tmp_path / "step-500"), save_base(model, tmp_path / "base")
    for n, (glob, expected) in enumerate(
        {
            "tok_embeddings*": ["model.embed_tokens.weight"],
            "layers.0.*_norm.weight": [
                "model.layers.0.input_layernorm.weight",
                "model.layers.0.post_attention_layernorm.weight",
            ],
        }.items()
    ):
        merged = reshard.merge(step, tmp_path / f"{n}.safetensors", base=str(base), include=(glob,))
        assert sorted(reshard.open(merged.output)) == expected


@pytest.mark.parametrize(
    "fqns",
    [
        ["embed.weight", "layers.0.up.weight", "norm.weight"],  # anyone's
        ["tok_embeddings.weight", "layers.0.attn.q_proj.weight", "layers.0.mlp.w1.weight"],  # torchtune's
        ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"],
        ["norm.weight", "lm_head.weight"],
    ],
)
def test_other_names_stay_as_they_are(fqns: list[str]) -> None:
    checkpoint = of({fqn: torch.ones(2, 2) for fqn in fqns})
    assert torchtitan.to_hub(checkpoint, {"model_type": "llama"}) is checkpoint
    assert torchtitan.to_hub(checkpoint, None) is checkpoint
