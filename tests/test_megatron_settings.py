"""Settings: config.json to Megatron's and back, held against what Megatron wrote and what transformers reads."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reshard.core.dtypes import dtype
from reshard.core.tensor import Filled, Tensor
from reshard.dialects.megatron_config import check_config, to_config, to_megatron
from reshard.dialects.recognise import recognise
from reshard.dialects.run_config import args, run_config
from reshard.dialects.setting import flat
from reshard.dialects.table import Family, entries
from reshard.errors import Incomplete, InputError, Mismatch, Unsupported
from reshard.families import families
from reshard.formats import megatron_settings

DATA = json.loads((Path(__file__).parent / "data/megatron/settings.json").read_text())
NAMES = tuple(DATA["models"])
BRIDGE = tuple(name for name in NAMES if not name.startswith("mlm"))


def stated(name: str) -> dict[str, Any]:
    """The settings in a real checkpoint."""
    model = DATA["models"][name]
    return DATA["common"][model["common"]] | model["settings"]


def config_of(name: str) -> dict[str, Any]:
    """The config.json of the model that was imported."""
    return dict(DATA["models"][name]["config"])


def tensors_of(name: str) -> dict[str, Tensor]:
    """Tensors of the names and shapes that the checkpoint has."""
    by_shape = DATA["models"][name]["tensors"]
    return {tensor: filled(*map(int, shape.split())) for shape, names in by_shape.items() for tensor in names}


def filled(*shape: int) -> Tensor:
    return Filled(dtype("BF16"), shape, b"\0\0")


def family_of(config: Mapping[str, Any]) -> Family:
    return next(family for family in families() if config["model_type"] in family.model_types)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    family = family_of(config)
    return to_megatron(config, family, family.facts(config))[0]


def lost_of(config: Mapping[str, Any]) -> list[str]:
    family = family_of(config)
    return to_megatron(config, family, family.facts(config))[1]


# ------------------------------------------------------------------------------------------------------ to Megatron

EXPLAINED = {
    # made from the vocabulary by rules of DeepSeek's own; the embedding is not padded either way
    "make_vocab_size_divisible_by": ("bridge_deepseek_v2", "bridge_deepseek_v3", "bridge_llama_tp2"),
    # padded for two tensor-parallel ranks: what the caller asks for, not the config
    "should_pad_vocab": ("bridge_llama_tp2",),
    # Megatron-Bridge has one length for all models of DeepSeek-V2
    "seq_length": ("bridge_deepseek_v2",),
    # Megatron-Core's name since August 2026, which it reads beside the old one
    "experimental_attention_variant": tuple(n for n in BRIDGE if "qwen3_next" in n or "qwen3_5" in n),
    # a list or every how many layers
    "linear_attention_freq": ("seedfix_qwen3_5_w2",),
    # Megatron-Bridge did not look into rope_parameters: the model that it made computes otherwise
    "rotary_percent": ("bridge_qwen3_next",),
    "mrope_section": ("bridge_qwen2_5_vl",),
    # a silent config means one layer that predicts a second token; this checkpoint has none
    "mtp_num_layers": ("head_qwen3_5_text_w2",),
}
"""Settings where ours are not what Megatron-Bridge wrote, by name, with the checkpoints."""


@pytest.mark.parametrize("name", BRIDGE)
def test_settings_are_those_that_megatron_bridge_wrote(name: str) -> None:
    real = stated(name)
    ours = settings_of(config_of(name))
    vision, real_vision = ours.pop("vision_config", {}), real.get("vision_config", {})

    unlike = {key: (value, real.get(key)) for key, value in ours.items() if real.get(key) != value}

    assert {key for key in unlike if name not in EXPLAINED.get(key, ())} == set()
    real_vision = real_vision.get("config_dict", real_vision)
    assert {key for key in vision if key != "_target_" and real_vision.get(key) != vision[key]} <= {"model_type"}


@pytest.mark.parametrize("name", BRIDGE)
def test_nothing_of_real_configs_is_lost(name: str) -> None:
    assert lost_of(config_of(name)) == []


def test_what_a_loader_would_take_for_something_else_is_always_stated() -> None:
    needed = {
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
        "vocab_size", "normalization", "gated_linear_unit", "add_bias_linear", "position_embedding_type",
        "share_embeddings_and_output_weights", "rotary_base", "rotary_percent", "layernorm_epsilon",
        "activation_func", "qk_layernorm", "layernorm_zero_centered_gamma", "params_dtype", "bf16",
    }  # fmt: skip

    for name in BRIDGE:
        optional = {"rotary_percent"} if "nemotron_h" in name else set()
        assert needed - set(settings_of(config_of(name))) <= optional, name


def llama(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 80, "vocab_size": 323,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
    } | changes  # fmt: skip


def test_both_spellings_of_the_rotary_embedding_say_the_same() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip

    old = settings_of(llama(rope_theta=500000.0, rope_scaling=scaling, torch_dtype="bfloat16"))
    new = settings_of(llama(rope_parameters=scaling | {"rope_theta": 500000.0}))

    assert old == new
    assert (new["rope_scaling"], new["rope_scaling_factor"], new["rotary_base"]) == (True, 32.0, 500000.0)


def test_the_part_of_a_head_that_turns_is_found_in_rope_parameters_first() -> None:
    rope = {"rope_theta": 1e7, "partial_rotary_factor": 0.5, "rope_type": "default"}

    values = flat({"partial_rotary_factor": 0.25, "rope_parameters": rope})

    assert (values["partial_rotary_factor"], values["rope_theta"]) == (0.5, 1e7)


def test_rotary_embeddings_of_their_own_for_layers_with_windows_are_kept_apart() -> None:
    by_layer = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }

    values = flat({"rope_parameters": by_layer})

    assert (values["rope_theta"], values["rope_local_base_freq"]) == (1e6, 1e4)
    assert values["rope"] == {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "key, value", [("low_freq_factor", 2.0), ("high_freq_factor", 8.0), ("original_max_position_embeddings", 64)]
)
def test_a_scaling_of_llama_3_that_megatron_does_not_have_is_said(key: str, value: float) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, key: value}

    (said,) = lost_of(llama(rope_parameters=scaling))

    assert key in said
    assert f"the config says {value}" in said


def test_a_rotary_embedding_that_megatron_does_not_have_is_said() -> None:
    assert "dynamic" in lost_of(llama(rope_scaling={"type": "dynamic", "factor": 2.0}))[0]


def test_biases_that_megatron_has_no_setting_for_are_said() -> None:
    assert settings_of(llama(attention_bias=True, mlp_bias=True))["add_bias_linear"] is True
    assert lost_of(llama(attention_bias=True, mlp_bias=True)) == []
    assert "the model has them in proj, qkv" in lost_of(llama(attention_bias=True))[0]


def test_weights_of_experts_that_are_not_normalised_are_said() -> None:
    config = config_of("bridge_deepseek_v3") | {"norm_topk_prob": False}

    assert lost_of(config) == ["Megatron computes as with norm_topk_prob True, the config says False"]


def test_an_activation_that_megatron_does_not_have_is_refused() -> None:
    with pytest.raises(Unsupported, match="hidden_act is 'mish'"):
        settings_of(llama(hidden_act="mish"))


def test_a_config_that_lacks_a_size_is_refused_by_name() -> None:
    config = llama()
    del config["hidden_size"]
    family = family_of(config)

    with pytest.raises(Mismatch, match="hidden_size"):
        to_megatron(config, family, family.facts(llama()))


def test_windows_of_some_layers_are_listed() -> None:
    kinds = ["full_attention", "sliding_attention"]
    config = config_of("bridge_qwen2") | {"use_sliding_window": True, "sliding_window": 64, "layer_types": kinds}

    settings = settings_of(config)

    assert (settings["window_size"], settings["window_attn_skip_freq"]) == ([63, 0], [0, 1])
    assert to_config(settings, family_of(config))["layer_types"] == kinds


def test_windows_of_configs_without_layer_types_begin_at_a_layer() -> None:
    config = config_of("bridge_qwen2") | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    del config["layer_types"]

    assert settings_of(config)["window_attn_skip_freq"] == [0, 1]


def test_a_padded_vocabulary_is_told_from_the_tokens() -> None:
    family = family_of(llama())
    facts = family.facts(llama()).sized(padded_vocab=384)

    settings, _ = to_megatron(llama(), family, facts)

    assert (settings["vocab_size"], settings["should_pad_vocab"]) == (323, True)
    assert settings["make_vocab_size_divisible_by"] == 128


# ---------------------------------------------------------------------------------------------------- run_config.yaml


def run(settings: Mapping[str, Any], **changes: Any) -> str:
    return run_config(settings, ckpt_format="torch_dist", hf_model_id="hf/model", **changes)


@pytest.mark.parametrize("name", BRIDGE)
def test_run_config_reads_back_as_the_same_settings(name: str, tmp_path: Path) -> None:
    settings = settings_of(config_of(name))
    path = tmp_path / "run_config.yaml"
    path.write_text(run(settings, tp=2, ep=2))

    read = megatron_settings.of_run_config(path)

    mesh = {f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert")}
    beside = mesh | {"context_parallel_size", "hf_model_id"}
    assert {key: value for key, value in read.values.items() if key not in beside} == settings
    assert read.hf_model_id == "hf/model"
    assert read.layout is not None
    assert (read.layout.tensor, read.layout.expert) == (2, 2)


@pytest.mark.parametrize("name", BRIDGE)
def test_run_config_has_no_key_that_megatron_bridge_does_not_write(name: str) -> None:
    real = {key for other in BRIDGE for key in stated(other)}

    ours = set(yaml.safe_load(run(settings_of(config_of(name))))["model"])

    assert ours - real <= {"q_lora_rank"}


def test_run_config_names_python_objects_as_megatron_bridge_does() -> None:
    model = yaml.safe_load(run(settings_of(llama())))["model"]

    assert model["activation_func"] == {"_target_": "torch.nn.functional.silu", "_call_": False}
    assert model["params_dtype"] == {"_target_": "torch.bfloat16", "_call_": False}
    assert model["_target_"] == "megatron.bridge.models.gpt_provider.GPTModelProvider"
    module, _, function = model["activation_func"]["_target_"].rpartition(".")
    assert callable(getattr(import_module(module), function))


def test_run_config_tells_a_resumed_run_that_there_is_no_optimizer() -> None:
    checkpoint = yaml.safe_load(run(settings_of(llama())))["checkpoint"]

    assert checkpoint == {
        "ckpt_format": "torch_dist", "save_optim": False, "save_rng": False, "fully_parallel_save": True
    }  # fmt: skip


def test_an_object_that_megatron_does_not_have_is_refused() -> None:
    with pytest.raises(Unsupported, match="activation_func is 'mish'"):
        run(settings_of(llama()) | {"activation_func": "mish"})


# ----------------------------------------------------------------------------------------------------------- args


@pytest.mark.parametrize("name", ["bridge_llama", "bridge_mixtral", "bridge_qwen2", "bridge_nemotron"])
def test_arguments_tell_megatron_lm_the_same_model(name: str) -> None:
    config = config_of(name)
    settings = settings_of(config)

    read = megatron_settings.of_args(args(settings)).values
    found = recognise(read, families(), tensors_of(name), vocab_size=config["vocab_size"])

    for key in ("num_layers", "num_attention_heads", "add_position_embedding", "tensor_model_parallel_size"):
        assert key in args(settings)
    assert found.family.name in (family_of(config).name, "llama")
    assert unlike(found.config, config) == set()


def test_arguments_count_the_rows_that_pad_the_vocabulary() -> None:
    family = family_of(llama())
    settings, _ = to_megatron(llama(), family, family.facts(llama()).sized(padded_vocab=384))

    assert args(settings)["padded_vocab_size"] == 384


# ------------------------------------------------------------------------------------------------------ to a config

BESIDE = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache",
    "output_router_logits", "router_aux_loss_coef", "attention_dropout", "initializer_range", "max_window_layers",
    "full_attention_interval", "mtp_use_dedicated_embeddings",
}  # fmt: skip
"""Values that do not change logits, or that other values say too."""


def unlike(ours: Mapping[str, Any], truth: Mapping[str, Any]) -> set[str]:
    """Where two configs differ once transformers has read them."""
    return differences(loaded(ours), loaded(truth))


def loaded(config: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config))).to_dict()
    return values


def differences(ours: Mapping[str, Any], truth: Mapping[str, Any]) -> set[str]:
    """What only ours has is none: no class of transformers reads it."""
    found = set()
    for key, other in truth.items():
        one = ours.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= {f"{key}.{inner}" for inner in differences(one, other)}
        elif key not in BESIDE and one != other:
            found.add(key)
    return found


NOT_TOLD = {
    "bridge_deepseek_v2": {"max_position_embeddings"},
    "bridge_qwen3_next": {"rope_parameters.partial_rotary_factor"},
    "bridge_qwen2_5_vl": {"text_config.rope_parameters.mrope_section"},
    "seedfix_qwen3_5_w2": {"text_config.tie_word_embeddings"},
    # the epsilon of the run, which its reference did not have
    "mlmhead_qwen2_w4tp2": {"rms_norm_eps"},
}
"""Where a checkpoint's settings say something else than the config that it was made from."""


@pytest.mark.parametrize("name", NAMES)
def test_the_config_made_of_settings_computes_the_same(name: str) -> None:
    truth, model = config_of(name), DATA["models"][name]

    found = recognise(stated(name), families(), tensors_of(name), vocab_size=model["vocab_size"])

    assert found.family is family_of(truth)
    assert found.config["model_type"] == truth["model_type"]
    assert found.config["architectures"] == truth["architectures"]
    assert unlike(found.config, truth) == NOT_TOLD.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_the_model_made_of_settings_has_the_same_parameters(name: str) -> None:
    truth, model = config_of(name), DATA["models"][name]
    found = recognise(stated(name), families(), tensors_of(name), vocab_size=model["vocab_size"])

    assert parameters(found.config) == parameters(truth)


def parameters(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    read = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(read)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def small(model_type: str, seed: int) -> dict[str, Any]:
    """A config of a family as transformers has it, with sizes and switches at random."""
    draw = random.Random(f"{model_type}{seed}")
    groups, layers, window = draw.choice((1, 2, 4)), draw.choice((2, 4)), draw.choice((None, 96))
    latent = {"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 8}
    sizes = {
        "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": groups * draw.choice((1, 2)),
        "num_key_value_heads": groups, "num_hidden_layers": layers, "head_dim": 16, "vocab_size": 131,
        "max_position_embeddings": 512, "rms_norm_eps": draw.choice((1e-5, 1e-6)),
        "tie_word_embeddings": draw.choice((True, False)), "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "n_shared_experts": 1,
        "first_k_dense_replace": draw.choice((0, 1)), "mlp_only_layers": draw.choice(([], [1])),
        "norm_topk_prob": draw.choice((True, False)), "sliding_window": window, "max_window_layers": 1,
        "use_sliding_window": window is not None, "use_qk_norm": draw.choice((True, False)),
        "n_group": groups, "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
        "topk_group": 1, "routed_scaling_factor": draw.choice((1.0, 2.5)), "q_lora_rank": draw.choice((None, 24)),
        "kv_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
        "shared_expert_intermediate_size": 40, "pad_token_id": None, "dtype": draw.choice(("bfloat16", "float16")),
        "rope_parameters": rope(draw, model_type),
    }  # fmt: skip
    fixed = {
        "gpt_oss": {"sliding_window": 32, "rope_parameters": rope(draw, "yarn")},
        "gemma2": {"sliding_window": 96, "query_pre_attn_scalar": draw.choice((24, 256))},
        "gemma3_text": {"sliding_window": 96, "query_pre_attn_scalar": draw.choice((24, 256))},
        "exaone4": {"sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"] * (layers // 2)},
        "deepseek_v2": {"norm_topk_prob": False} | latent,
        "deepseek_v3": {"norm_topk_prob": True} | latent,
        "glm4_moe_lite": {"norm_topk_prob": True, "q_lora_rank": 24} | latent,
        **{kind: {"norm_topk_prob": True} for kind in ("glm4_moe", "dots1", "hy_v3")},
    }
    known = set(CONFIG_MAPPING[model_type]().to_dict())
    given = {key: value for key, value in (sizes | fixed.get(model_type, {})).items() if key in known}
    config = CONFIG_MAPPING[model_type](**given)
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def rope(draw: random.Random, model_type: str) -> dict[str, Any] | None:
    base = {"rope_theta": draw.choice((10000.0, 500000.0))}
    yarn = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0,
        "beta_slow": 2.0, "truncate": draw.choice((True, False)),
    }  # fmt: skip
    latent = {key: value for key, value in yarn.items() if key != "truncate"} | {"mscale": 0.7, "mscale_all_dim": 0.9}
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    match model_type:
        case "yarn":
            return base | yarn
        case "deepseek_v2" | "deepseek_v3" | "glm4_moe_lite":
            return base | draw.choice(({"rope_type": "default"}, latent))
        case "llama" | "qwen3" | "qwen2" | "mistral" | "qwen3_moe":
            return base | draw.choice(({"rope_type": "default"}, yarn, {"rope_type": "linear", "factor": 2.0}, llama3))
        case "gemma3_text":
            return None
    return base | {"rope_type": "default"}


CLASSES = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gemma", "gemma2",
    "gemma3_text", "nemotron", "starcoder2", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3",
    "dots1", "gpt_oss", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "seed_oss", "ernie4_5", "phi3", "exaone4",
    "minimax_m2", "hy_v3",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model_type", CLASSES)
def test_a_config_comes_back_from_its_settings(model_type: str, seed: int) -> None:
    truth = small(model_type, seed)
    family = family_of(truth)

    ours = to_config(settings_of(truth), family)

    assert unlike(ours, truth) == set()


# ------------------------------------------------------------------------------------------------------ recognition


def test_models_that_are_built_alike_are_told_apart_by_what_made_them() -> None:
    settings, tensors = stated("bridge_mistral"), tensors_of("bridge_mistral")
    plain = settings | {"_target_": None, "hf_model_id": None}

    assert recognise(settings, families(), tensors).family.name == "mistral"
    assert recognise(plain, families(), tensors, hf_model_id="mistralai/Mistral-7B-v0.1").family.name == "mistral"
    without = recognise(plain, families(), tensors)
    assert without.family.name == "llama"
    assert any("fit mistral too" in notice for notice in without.notices)


def test_a_window_tells_mistral_from_llama() -> None:
    settings = stated("bridge_llama") | {"window_size": [4095, 0], "rope_scaling": False, "hf_model_id": None}

    found = recognise(settings, families(), tensors_of("bridge_llama"))

    assert found.family.name == "mistral"
    assert found.config["sliding_window"] == 4096


def test_windows_of_nemo_count_the_token_itself() -> None:
    settings = stated("bridge_mistral") | {
        "window_size": [4096, 0], "model_class": "nemo.collections.llm.gpt.model.mistral.MistralModel",
    }  # fmt: skip

    assert recognise(settings, families(), tensors_of("bridge_mistral")).config["sliding_window"] == 4096


def test_nemo_scales_llama_with_settings_of_its_own() -> None:
    own = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 4096}
    settings = stated("bridge_llama") | own | {"model_class": "nemo.collections.llm.gpt.model.llama.LlamaModel"}
    del settings["rope_scaling"], settings["rope_scaling_factor"]

    config = recognise(settings, families(), tensors_of("bridge_llama")).config

    assert loaded(config)["rope_parameters"]["original_max_position_embeddings"] == 4096
    assert loaded(config)["rope_parameters"]["rope_type"] == "llama3"


def test_what_no_tensor_tells_is_asked_for_by_name() -> None:
    with pytest.raises(Incomplete, match="num_attention_heads, rotary_base, layernorm_epsilon") as error:
        recognise({}, families(), tensors_of("bridge_llama"))

    assert "--hf-model" in str(error.value.hint)


def test_sizes_that_tensors_tell_need_not_be_stated() -> None:
    settings = stated("bridge_qwen3_moe")
    for name in ("num_layers", "hidden_size", "vocab_size", "num_moe_experts", "moe_ffn_hidden_size"):
        settings.pop(name, None)
    settings.pop("share_embeddings_and_output_weights", None)

    found = recognise(settings, families(), tensors_of("bridge_qwen3_moe"))

    assert unlike(found.config, config_of("bridge_qwen3_moe")) == set()
    assert "all 323 rows of the embedding are taken" in found.notices[0]


def test_the_vocabulary_that_the_caller_knows_goes_before_the_rows() -> None:
    settings, tensors = stated("bridge_llama_tp2"), tensors_of("bridge_llama_tp2")
    del settings["vocab_size"]

    assert tensors["embedding.word_embeddings.weight"].shape[0] == 384
    assert recognise(settings, families(), tensors, vocab_size=323).config["vocab_size"] == 323
    assert recognise(settings, families(), tensors).config["vocab_size"] == 384


def test_no_family_is_made_up_for_tensors_that_none_has() -> None:
    tensors = tensors_of("bridge_llama") | {"decoder.layers.0.self_attention.rudder.weight": filled(3)}

    with pytest.raises(Unsupported, match="no known family") as error:
        recognise(stated("bridge_llama"), families(), tensors)

    assert "decoder.layers.0.self_attention.rudder.weight" in str(error.value)


def test_a_missing_tensor_is_not_taken_for_another_family() -> None:
    tensors = tensors_of("bridge_qwen3")
    del tensors["decoder.layers.1.self_attention.q_layernorm.weight"]

    with pytest.raises(Incomplete, match=r"1 tensors of the qwen3 model.*layers\.1\.self_attention\.q_layernorm"):
        recognise(stated("bridge_qwen3"), families(), tensors)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_layers", 10**12), ("num_layers", "4"), ("num_moe_experts", 10**12), ("mtp_num_layers", 10**12),
        ("vision_config", {"depth": 10**12}), ("hybrid_layer_pattern", "M" * 10**6),
    ],
)  # fmt: skip
def test_counts_without_measure_are_refused(name: str, value: Any) -> None:
    with pytest.raises(Mismatch, match="the settings say"):
        recognise(stated("bridge_qwen3_moe") | {name: value}, families(), tensors_of("bridge_qwen3_moe"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bridge_llama", "bridge_deepseek_v3", "bridge_qwen3_5_vl", "bridge_nemotron_h"])
@pytest.mark.parametrize("value", ["x", -1, 0, [1], {"a": 1}, True, 1e300])
def test_settings_of_any_kind_end_in_an_error_or_a_config(name: str, value: Any) -> None:
    for setting in settings_of(config_of(name)):
        try:
            recognise(stated(name) | {setting: value}, families(), tensors_of(name))
        except InputError:
            continue


# ------------------------------------------------------------------------------------------------------------ check


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_does_not_contradict_the_config_that_it_was_made_from(name: str) -> None:
    assert check_config(config_of(name), stated(name)) == []


def test_every_contradiction_is_listed() -> None:
    config = config_of("bridge_qwen3_moe") | {
        "num_hidden_layers": 6, "num_attention_heads": 8, "rope_parameters": {"rope_theta": 10000.0},
        "num_local_experts": 8, "rms_norm_eps": 1e-4, "tie_word_embeddings": True,
    }  # fmt: skip

    assert check_config(config, stated("bridge_qwen3_moe")) == [
        "layers: HF 6, checkpoint 4",
        "heads: HF 8, checkpoint 4",
        "experts: HF 8, checkpoint 4",
        "rotary base: HF 10000.0, checkpoint 1000000.0",
        "epsilon: HF 0.0001, checkpoint 1e-06",
        "tied embeddings: HF True, checkpoint False",
    ]


def test_what_only_one_of_them_states_is_no_contradiction() -> None:
    assert check_config({"model_type": "llama"}, stated("bridge_llama")) == []
    assert check_config(config_of("bridge_llama"), {}) == []


def test_settings_left_as_megatron_has_them_contradict_nobody() -> None:
    left = {"hidden_size": 48, "num_attention_heads": 4, "ffn_hidden_size": 192, "kv_channels": 12}

    assert check_config(config_of("bridge_llama"), left | {"layernorm_epsilon": 1e-5}) == []


@pytest.mark.parametrize("balancing", ["none", "aux_loss", "seq_aux_loss"])
def test_how_experts_were_balanced_does_not_tell_which_model_it_is(balancing: str) -> None:
    config = small("glm4_moe", 0) | {"num_nextn_predict_layers": 0}
    family = family_of(config)
    facts = family.facts(config)
    settings = to_megatron(config, family, facts)[0] | {"moe_router_load_balancing_type": balancing}
    plain = {name: value for name, value in settings.items() if name not in ("_target_", "transformer_layer_spec")}
    tensors = {entry.name: Filled(dtype("BF16"), (1,), bytes(2)) for entry in entries(family, facts)}

    assert recognise(plain, families(), tensors).family.name == "glm4_moe"
