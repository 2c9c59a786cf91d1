"""Megatron checkpoints without a reference: the model made of settings and tensors computes what was converted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from reshard.cli.main import main

TEXT: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 36, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
TIED = {"tie_word_embeddings": True, "num_key_value_heads": 1}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 20}
ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}  # fmt: skip
TURNED = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
QWEN3_5 = TEXT | DELTA_NET | {"rope_parameters": TURNED | {"mrope_interleaved": True}}
SOME_TWICE = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
TURNS = ["full_attention", "sliding_attention"] * 2
BASES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA = TEXT | TIED | {"sliding_window": 5}
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2,
    "num_attention_heads": 3, "image_size": 8, "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
SINKS = TEXT | {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-Next": ("qwen3_next", TEXT | DELTA_NET | SHARED),
    "Qwen3-Next, some layers dense": ("qwen3_next", TEXT | DELTA_NET | SHARED | {"mlp_only_layers": [1]}),
    "Qwen3.5": ("qwen3_5_text", QWEN3_5),
    "Qwen3.5, tied": ("qwen3_5_text", QWEN3_5 | TIED),
    "Qwen3.5 with experts": ("qwen3_5_moe_text", QWEN3_5 | SHARED),
    "GLM-4.5": ("glm4_moe", TEXT | ROUTED | {"use_qk_norm": True, "attention_bias": True}),
    "GLM-4.5 Air": ("glm4_moe", TEXT | ROUTED | {"use_qk_norm": False, "routed_scaling_factor": 1.7}),
    "Gemma 2 without bounds": ("gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "Gemma 3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 12}),
    "Gemma 3, scaled": ("gemma3_text", GEMMA | {"num_hidden_layers": 6, "rope_parameters": BASES}),
    "Gemma 3 of another pattern": ("gemma3_text", GEMMA | {"layer_types": TURNS[::-1]}),
    "Gemma 3 with its tower": (
        "gemma3",
        {"text_config": GEMMA | {"model_type": "gemma3_text"}, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
    ),
    "Phi-4 mini, heads turned in part": (
        "phi3",
        TEXT | TIED | {"hidden_size": 32, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "gpt-oss": ("gpt_oss", SINKS),
    "gpt-oss without YaRN": ("gpt_oss", SINKS | TIED | {"rope_parameters": {"rope_type": "default"}}),
    "gpt-oss of another order": ("gpt_oss", SINKS | {"layer_types": TURNS}),
    "Ministral": ("ministral", TEXT | {"sliding_window": 7, "layer_types": SOME_TWICE}),
}  # fmt: skip


def saved(model_type: str, values: dict[str, Any], directory: Path) -> Any:
    """A random model, saved; its class."""
    config = AutoConfig.for_model(model_type, **copy.deepcopy(values))
    torch.manual_seed(1)
    kind = AutoModelForImageTextToText if "vision_config" in values else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + ("norm" in name and parameter.ndim == 1))
    model.save_pretrained(directory)
    return type(model)


def logits(kind: Any, directory: Path) -> torch.Tensor:
    model, info = kind.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert {key: value for key, value in info.items() if value} == {}
    tokens = torch.randint(7, 60, (1, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=tokens).logits
    return result


def convert(source: Path, output: Path, to: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What a conversion says."""
    code = main(["convert", str(source), str(output), "--to", to, *more])
    said = capsys.readouterr().err
    assert code == 0, said
    return said


@pytest.mark.parametrize("to", ["torch_dist", "fsdp_dtensor"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_known_by_its_settings_and_computes_the_same(
    name: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_type, values = MODELS[name]
    kind = saved(model_type, values, tmp_path / "model")

    convert(tmp_path / "model", tmp_path / "megatron", to, capsys)
    convert(tmp_path / "megatron", tmp_path / "back", "hf", capsys)

    assert AutoConfig.from_pretrained(tmp_path / "back").model_type == model_type
    assert torch.equal(logits(kind, tmp_path / "back"), logits(kind, tmp_path / "model"))


@pytest.mark.parametrize(
    ("directory", "model_type"), [("Phi-3-mini", "phi3"), ("Mistral-7B", "mistral"), ("x", "llama")]
)
def test_models_that_compute_alike_are_told_apart_by_the_name_of_the_one_that_was_converted(
    directory: str, model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = saved(model_type, TEXT | {"sliding_window": None, "hidden_size": 32}, tmp_path / directory)

    convert(tmp_path / directory, tmp_path / "megatron", "torch_dist", capsys)
    convert(tmp_path / "megatron", tmp_path / "back", "hf", capsys)

    assert AutoConfig.from_pretrained(tmp_path / "back").model_type == model_type
    assert torch.equal(logits(kind, tmp_path / "back"), logits(kind, tmp_path / directory))


@pytest.mark.parametrize(
    "model_type, values, said",
    [
        ("gemma2", GEMMA | {"layer_types": SOME_TWICE}, "computes layer 0 with sliding_attention"),
        ("olmoe", TEXT | EXPERTS | {"hidden_size": 32, "clip_qkv": 1.0}, "clip_qkv None, the config says 1.0"),
    ],
)
def test_what_megatron_has_no_setting_for_is_said(
    model_type: str, values: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(model_type, values, tmp_path / "model")

    assert said in convert(tmp_path / "model", tmp_path / "megatron", "torch_dist", capsys)


def test_a_tower_that_lacks_a_level_of_its_name_lacks_it_again_with_a_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    saved(*MODELS["Gemma 3 with its tower"], tmp_path / "model")

    convert(tmp_path / "model", tmp_path / "megatron", "torch_dist", capsys)
    convert(tmp_path / "megatron", tmp_path / "back", "hf", capsys, "--hf-model", str(tmp_path / "model"))

    truth, back = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "back"))
    assert "vision_tower.embeddings.patch_embedding.weight" in truth
    assert back.keys() == truth.keys()
    assert all(torch.equal(back[name], truth[name]) for name in truth)
