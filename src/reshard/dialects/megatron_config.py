"""What a model computes with: config.json to Megatron's settings and back.

    to_megatron     every setting that changes what the model computes, stated
    recognise       the family and a config.json, of settings and tensors alone
    check_config    where a config.json and a checkpoint's settings contradict each other

Settings have the names of Megatron-Core's `TransformerConfig` and of Megatron-Bridge's `GPTModelProvider`. What differs
from family to family is in `Family.settings`; what all share is here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from reshard.core.tensor import Tensor
from reshard.dialects.apply import present
from reshard.dialects.fuse import Glu, InterleavedGlu
from reshard.dialects.setting import Always, Item, Nested, Rule, Setting, Values, flat, merged
from reshard.dialects.table import Config, Facts, Family, entries, variants
from reshard.errors import Incomplete, InputError, Mismatch, listed

GPT = "megatron.bridge.models.gpt_provider.GPTModelProvider"

DEFAULTS: Values = {
    "_target_": GPT,
    "activation_func": "gelu",
    "activation_func_clamp_value": None,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "attention_output_gate": False,
    "beta_fast": 32,
    "beta_slow": 1,
    "gated_linear_unit": False,
    "glu_linear_offset": 0.0,
    "init_method_std": 0.02,
    "kv_lora_rank": 512,
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "linear_conv_kernel_dim": 4,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "moe_layer_freq": 1,
    "moe_router_group_topk": 1,
    "moe_router_num_groups": 1,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk": 2,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_shared_expert_gate": False,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "multi_latent_attention": False,
    "normalization": "LayerNorm",
    "original_max_position_embeddings": 4096,
    "position_embedding_type": "learned_absolute",
    "q_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_layernorm": False,
    "qk_pos_emb_head_dim": 64,
    "rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rope_type": "yarn",
    "rotary_base": 10000.0,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_scaling_factor": 40.0,
    "softmax_type": "vanilla",
    "v_head_dim": 128,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True,
    "yarn_original_max_position_embeddings": 4096,
    "yarn_rotary_scaling_factor": 1.0,
}
"""What Megatron-Core makes of a setting that nobody states."""

_NULL_MEANS_NONE = frozenset({"q_lora_rank", "activation_func_clamp_value"})
"""Settings whose null is a value of its own, not the default."""

_DTYPES = ("bfloat16", "float16", "float32")

ACTIVATIONS = (
    ("silu", "silu"),
    ("swish", "silu"),
    ("gelu_pytorch_tanh", "fast_gelu"),
    ("gelu_new", "fast_gelu"),
    ("gelu_pytorch_tanh", "openai_gelu"),
    ("gelu", "gelu"),
    ("relu2", "squared_relu"),
    ("relu", "relu"),
)
"""(the config's name, Megatron's)."""


# ----------------------------------------------------------------------------------------- what all families share


def _dtypes(config: Values, facts: Facts) -> Values:
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if name not in _DTYPES:
        return {}
    return {"params_dtype": name, "bf16": name == "bfloat16", "fp16": name == "float16"}


def _dtype_of(settings: Values) -> Values:
    """`torch_dtype`: releases 4 and 5 of transformers read it."""
    named = settings.get("params_dtype")
    if named in _DTYPES and named != "float32":
        return {"torch_dtype": named}
    flags = (("bf16", "bfloat16"), ("fp16", "float16"))
    found = next((name for flag, name in flags if settings.get(flag) is True), named)
    return {"torch_dtype": found} if found in _DTYPES else {}


def _vocabulary(config: Values, facts: Facts) -> Values:
    size, padded = facts.sizes["vocab"], facts.sizes.get("padded_vocab", facts.sizes["vocab"])
    if padded != size:
        unit = 128 if -(-size // 128) * 128 == padded else padded
        return {"vocab_size": size, "should_pad_vocab": True, "make_vocab_size_divisible_by": unit}
    unit = min(size & -size, 128)
    return {"vocab_size": size, "should_pad_vocab": False, "make_vocab_size_divisible_by": unit}


def _heads(config: Values, facts: Facts) -> Values:
    names = (("num_attention_heads", "heads"), ("num_query_groups", "groups"), ("kv_channels", "head_dim"))
    return {setting: facts.sizes[size] for setting, size in names}


def _heads_of(settings: Values) -> Values:
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("num_query_groups") or heads,
        "head_dim": settings.get("kv_channels") or hidden // heads,
    }


def bias_settings(config: Values, facts: Facts) -> Values:
    """Megatron has biases of queries, keys and values, or of all linears."""
    everywhere = {"qkv_bias", "proj_bias", "mlp_bias"} <= facts.tags
    return {"add_bias_linear": everywhere, "add_qkv_bias": "qkv_bias" in facts.tags}


def _rope(config: Values, facts: Facts) -> Values:
    """The rotary embedding, but for its base and for the part of a head that it turns."""
    rope = config["rope"]
    plain = {"position_embedding_type": "rope", "rope_scaling": False, "rope_scaling_factor": 1.0}
    match rope["rope_type"]:
        case "llama3":
            return plain | {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
        case "linear":
            return plain | {"seq_len_interpolation_factor": rope["factor"]}
        case "yarn":
            found = {
                "yarn_rotary_scaling_factor": rope["factor"],
                "yarn_original_max_position_embeddings": rope.get("original_max_position_embeddings")
                or config["max_position_embeddings"],
                "yarn_beta_fast": float(rope.get("beta_fast", 32)),
                "yarn_beta_slow": float(rope.get("beta_slow", 1)),
                "yarn_correction_range_round_to_int": rope.get("truncate", True),
                "yarn_mscale": rope.get("mscale"),
                "yarn_mscale_all_dim": rope.get("mscale_all_dim"),
            }
            return plain | {"position_embedding_type": "yarn"} | found
    return plain


def _rope_of(settings: Values) -> Values:
    """`rope_scaling`, which releases 4 and 5 of transformers read."""
    if settings.get("position_embedding_type") == "yarn":
        found: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": settings["yarn_rotary_scaling_factor"],
            "original_max_position_embeddings": settings["yarn_original_max_position_embeddings"],
            "beta_fast": settings["yarn_beta_fast"],
            "beta_slow": settings["yarn_beta_slow"],
            "truncate": settings["yarn_correction_range_round_to_int"],
        }
        found |= {key: settings.get(f"yarn_{key}") for key in ("mscale", "mscale_all_dim")}
        return {"rope_scaling": {key: value for key, value in found.items() if value is not None}}
    if settings.get("rope_scaling") is True:
        return {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": settings["rope_scaling_factor"],
                "low_freq_factor": settings.get("low_freq_factor", 1.0),
                "high_freq_factor": settings.get("high_freq_factor", 4.0),
                "original_max_position_embeddings": settings.get("old_context_len", 8192),
            }
        }
    if (settings.get("seq_len_interpolation_factor") or 1) != 1:
        return {"rope_scaling": {"rope_type": "linear", "factor": settings["seq_len_interpolation_factor"]}}
    return {}


def _part(config: Values, facts: Facts) -> Values:
    part = config.get("partial_rotary_factor")
    return {"rotary_percent": 1.0 if part is None else part}


def _part_of(settings: Values) -> Values:
    """Whole heads are turned where a config is silent; families that do otherwise say so."""
    part = settings["rotary_percent"]
    return {} if part == 1 else {"partial_rotary_factor": part}


def _positions_of(settings: Values) -> Values:
    length = settings.get("max_position_embeddings") or settings.get("seq_length")
    return {} if length is None else {"max_position_embeddings": length}


def _no_config(settings: Values) -> Values:
    return {}


COMMON: tuple[Item, ...] = (
    ("_target_", GPT),
    Setting("num_layers", "num_hidden_layers"),
    Setting("hidden_size", "hidden_size"),
    Setting("ffn_hidden_size", ("intermediate_size", "ffn_hidden_size")),
    Rule("heads", _heads, _heads_of),
    Rule("vocabulary", _vocabulary, lambda settings: {"vocab_size": settings["vocab_size"]}),
    Rule("positions", lambda config, _: {"seq_length": config.get("max_position_embeddings")}, _positions_of),
    Rule("dtype", _dtypes, _dtype_of),
    ("normalization", "RMSNorm"),
    Setting("layernorm_epsilon", ("rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layer_norm_eps"), 1e-6),
    ("layernorm_zero_centered_gamma", False),
    Setting("activation_func", ("hidden_act", "hidden_activation"), "silu", ACTIVATIONS),
    Rule("biases", bias_settings, _no_config),
    ("qk_layernorm", False),
    ("attention_output_gate", False),
    ("softmax_type", "vanilla"),
    ("multi_latent_attention", False),
    Setting("attention_dropout", "attention_dropout", 0.0),
    ("hidden_dropout", 0.0),
    ("apply_query_key_layer_scaling", False),
    ("apply_residual_connection_post_layernorm", False),
    ("hetereogenous_dist_checkpoint", False),
    Setting("rotary_base", "rope_theta", 10000.0),
    Rule("rotary_percent", _part, _part_of),
    ("rotary_interleaved", False),
    Rule("rope", _rope, _rope_of),
    Setting("init_method_std", "initializer_range", 0.02),
)
"""What all families have, unless they say otherwise."""


# ------------------------------------------------------------------------------------------------------ to Megatron


def to_megatron(config: Config, family: Family, facts: Facts) -> tuple[dict[str, Any], list[str]]:
    """The settings of a model, and in sentences what of its config Megatron has no setting for.

    Raises Mismatch for a config that lacks a size, Unsupported for a value that Megatron does not have.
    """
    values, settings = flat(config), dict[str, Any]()
    items = merged(COMMON, family.settings)
    try:
        for item in items:
            match item:
                case (name, value):
                    settings[name] = value
                case Setting():
                    settings[item.megatron] = item.of_config(values)
                case Rule():
                    settings |= item.settings(values, facts)
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        kind = config.get("model_type")
        raise Mismatch(f"config.json of a {kind} model lacks what its settings need: {error!r:.200}") from error
    lacking = [name for name in _SIZES if settings.get(name) is None]
    if lacking:
        raise Mismatch(f"config.json of a {config.get('model_type')} model does not say {listed(lacking)}")
    settings.setdefault("gated_linear_unit", _is_gated(family))
    settings["share_embeddings_and_output_weights"] = "tied" in facts.tags
    without = () if settings.get("num_moe_experts") else ("moe_",)
    said = {n: v for n, v in settings.items() if v is not None or n in _NULL_MEANS_NONE}
    stated = {n: v for n, v in said.items() if not n.startswith(without)}
    return stated, [*_lost(values, items, facts)]


_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")


def _is_gated(family: Family) -> bool:
    return any(isinstance(row.fuse, Glu | InterleavedGlu) for row in family.rows)


_LLAMA3 = (("low_freq_factor", 1.0), ("high_freq_factor", 4.0), ("original_max_position_embeddings", 8192))
_ROPE_TYPES = ("default", "llama3", "linear", "yarn", "mrope", "proportional")


def _lost(config: Values, items: Iterable[Item], facts: Facts) -> Iterator[str]:
    """What of a config Megatron computes otherwise, in sentences."""
    rope = config["rope"]
    kind = rope["rope_type"]
    if kind == "llama3":
        for key, fixed in _LLAMA3:
            if rope.get(key, fixed) != fixed:
                yield f"Megatron computes Llama 3's rotary embedding with {key} {fixed:g}, the config says {rope[key]}"
    elif kind not in _ROPE_TYPES:
        yield f"Megatron has no rotary embedding of the kind {kind!r}: the model computes without its scaling"
    for key in ("attention_factor", "llama_4_scaling_beta"):
        if rope.get(key) is not None:
            yield f"Megatron does not take the {key} {rope[key]} of the rotary embedding"
    biased = {tag for tag in ("qkv_bias", "proj_bias", "mlp_bias") if tag in facts.tags}
    if biased & {"proj_bias", "mlp_bias"} and len(biased) < 3 and ("add_bias_linear", True) not in items:
        have = listed(sorted(tag.removesuffix("_bias") for tag in biased))
        yield f"Megatron has biases in all linears or in query, key and value alone; the model has them in {have}"
    for item in items:
        said = config.get(item.hub) if isinstance(item, Always) else None
        if isinstance(item, Always) and said is not None and said != item.value:
            yield f"Megatron computes as with {item.hub} {item.value!r}, the config says {said!r:.100}"


# ------------------------------------------------------------------------------------------------------ to a config


def to_config(settings: Values, family: Family) -> dict[str, Any]:
    """A config.json of a family, of Megatron's settings; what they do not state is as Megatron-Core has it.

    Raises Mismatch for settings that lack a size, Unsupported for a value that no config of the family has.
    """
    known = {**DEFAULTS, **{n: v for n, v in settings.items() if v is not None or n in _NULL_MEANS_NONE}}
    values: dict[str, Any] = {}
    nested: Nested | None = None
    try:
        for item in merged(COMMON, family.settings):
            match item:
                case Setting():
                    value = item.of_settings(known)
                    values |= {} if value is None else {item.hubs[0]: value}
                case Always():
                    values[item.hub] = item.value
                case Rule():
                    values |= item.config(known)
                case Nested():
                    nested = item
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise Mismatch(f"the settings lack what a {family.name} config needs: {error!r:.200}") from error
    values["tie_word_embeddings"] = bool(known.get("share_embeddings_and_output_weights", True))
    names = {"architectures": [family.architectures[0]], "model_type": family.model_types[0]}
    if nested is None:
        return names | values
    both = {"tie_word_embeddings", "torch_dtype"}
    outer = {*both, "vision_config", *nested.outer}
    text = {"model_type": nested.model_type} | {n: v for n, v in values.items() if n not in outer - both}
    return names | {n: v for n, v in values.items() if n in outer} | {"text_config": text}


# ------------------------------------------------------------------------------------------------------ recognition


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a checkpoint is, as its settings and tensors tell."""

    family: Family
    config: dict[str, Any]
    """Made of the settings."""
    notices: tuple[str, ...]


_IDENTITY = (
    "normalization", "layernorm_zero_centered_gamma", "activation_func", "gated_linear_unit", "glu_linear_offset",
    "activation_func_clamp_value", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "attention_output_gate",
    "softmax_type", "softmax_scale", "multi_latent_attention", "position_embedding_type", "rotary_interleaved",
    "rotary_percent", "rope_scaling", "window_size", "window_attn_skip_freq", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "num_moe_experts", "moe_shared_expert_gate",
    "moe_shared_expert_intermediate_size", "moe_router_score_function", "moe_router_pre_softmax",
    "moe_router_enable_expert_bias", "num_query_groups",
)  # fmt: skip
"""Settings that a config of the right family says alike."""

_NEEDED = ("num_attention_heads", "rotary_base", "layernorm_epsilon")
"""What no tensor tells."""


def recognise(
    settings: Values,
    candidates: Sequence[Family],
    tensors: Mapping[str, Tensor],
    *,
    vocab_size: int | None = None,
    hf_model_id: str | None = None,
) -> Recognised:
    """The family of a checkpoint and a config.json made of its settings, with Megatron's names for the tensors.

    A family fits when its table has these names, and when the config made for it says what the settings say. Of
    several that fit the one that the settings name is taken, else the first. Raises Incomplete for settings that lack
    what no tensor tells, Mismatch when no family fits.
    """
    stated, notices = _completed(settings, tensors, vocab_size)
    # the first of a layer's experts stands for all, of which there may be tens of thousands
    names = {name: tensor for name, tensor in tensors.items() if not _OTHER_EXPERT.search(name)}
    fits: list[tuple[Family, dict[str, Any]]] = []
    against: dict[str, str] = {}
    for family in candidates:
        try:
            config = to_config(stated, family)
            _check_fit(config, family, stated, names)
        except InputError as error:
            against[family.name] = str(error)
        else:
            fits.append((family, config))
    if not fits:
        raise _unknown(against, tensors)
    best = max(fits, key=lambda fit: _hints(fit[0], fit[1], stated, hf_model_id))
    most = _hints(best[0], best[1], stated, hf_model_id)
    likely = [family.name for family, config in fits if _hints(family, config, stated, hf_model_id) == most]
    others = [name for name in likely if name != best[0].name]
    if others:
        notices.append(f"taken for a {best[0].name} model; its tensors and settings fit {listed(others)} too")
    return Recognised(*best, tuple(notices))


def _completed(
    settings: Values, tensors: Mapping[str, Tensor], vocab_size: int | None
) -> tuple[dict[str, Any], list[str]]:
    """The settings with what the tensors tell; what that leaves in doubt, in sentences."""
    stated = {name: value for name, value in settings.items() if value is not None or name in _NULL_MEANS_NONE}
    optional = {"rotary_base"} if stated.get("position_embedding_type") == "none" else set()
    lacking = [name for name in _NEEDED if name not in stated and name not in optional]
    if lacking:
        raise Incomplete(
            f"the checkpoint's settings do not say {listed(lacking)}, and no tensor does",
            hint="--hf-model REF names the HuggingFace model that was trained: its config.json says them",
        )
    if str(stated.get("model_class")).startswith("nemo."):
        stated |= _of_nemo(stated)
    notices: list[str] = []
    embedding = next((t for n, t in tensors.items() if n.endswith("embedding.word_embeddings.weight")), None)
    if embedding is not None and len(embedding.shape) == 2:
        stated.setdefault("hidden_size", embedding.shape[1])
        rows = embedding.shape[0]
        named = vocab_size or stated.get("vocab_size")
        if type(named) is not int or not 0 < named <= rows:
            named = rows
            notices.append(
                f"the checkpoint does not say how many tokens there are: all {rows} rows of the embedding are taken, "
                "which may be padded"
            )
        stated["vocab_size"] = named
    if not stated.get("num_layers"):
        stated["num_layers"] = 1 + max(_numbers(tensors, "decoder.layers."), default=-1)
    for name in ("num_layers", "num_moe_experts"):
        if type(stated.get(name, 0)) is not int or stated.get(name, 0) > len(tensors):
            raise Mismatch(f"the settings say {name} {stated[name]!r:.100}, and there are {len(tensors)} tensors")
    has_head = any(name.endswith("output_layer.weight") for name in tensors)
    stated.setdefault("share_embeddings_and_output_weights", not has_head)
    _complete_mlp(stated, tensors)
    if not any("mtp.layers." in name for name in tensors):
        stated["mtp_num_layers"] = 0
    return stated, notices


def _of_nemo(stated: Values) -> Values:
    """What NeMo 2 puts otherwise: a window counts its own token, and Llama 3.1 is scaled by settings of other names."""
    found: dict[str, Any] = {}
    window = stated.get("window_size")
    if isinstance(window, list) and len(window) == 2 and type(window[0]) is int and window[0] > 0:
        found["window_size"] = [window[0] - 1, window[1]]
    if "old_context_len" in stated and "scale_factor" in stated:
        found |= {"rope_scaling": True, "rope_scaling_factor": stated["scale_factor"]}
    return found


def _complete_mlp(stated: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The sizes of the MLPs, of the experts and how many there are of these, where the settings do not say."""
    experts = 1 + max(_numbers(tensors, ".experts.linear_fc2.weight"), default=-1)
    if experts and stated.setdefault("num_moe_experts", experts) != experts:
        raise Mismatch(f"the settings say num_moe_experts {stated['num_moe_experts']!r}, the tensors are of {experts}")
    for name, ending in (("ffn_hidden_size", ".mlp.linear_fc2.weight"), ("moe_ffn_hidden_size", "fc2.weight0")):
        found = next((t for n, t in tensors.items() if n.endswith(ending) and ".layers." in n), None)
        if found is not None and len(found.shape) == 2 and not stated.get(name):
            stated[name] = found.shape[1]
    if stated.get("num_moe_experts") and stated.get("ffn_hidden_size"):
        stated.setdefault("moe_ffn_hidden_size", stated["ffn_hidden_size"])


def _numbers(names: Iterable[str], after: str) -> Iterator[int]:
    """The numbers that stand behind some words of the names."""
    for name in names:
        _, found, rest = name.partition(after)
        number = rest.partition(".")[0]
        if found and number.isdecimal():
            yield int(number)


_OTHER_EXPERT = re.compile(r"\.experts\.linear_fc[12]\.(?:weight|bias)[1-9]\d*$")


def _check_fit(config: Values, family: Family, stated: Values, tensors: Mapping[str, Tensor]) -> None:
    """Raise Mismatch where a config that was made for a family says else than the checkpoint, or lacks its names."""
    facts = family.facts(config)
    ours, _ = to_megatron(config, family, facts)
    unlike = [
        f"{name} {_canonical(name, stated)!r}, not {_canonical(name, ours)!r}"
        for name in _IDENTITY
        if not _same(_canonical(name, ours), _canonical(name, stated))
    ]
    if unlike:
        raise Mismatch(f"the checkpoint says {listed(unlike, 3)}")
    if facts.counts.get("expert"):
        facts = replace(facts, counts={**facts.counts, "expert": 1})
    facts, _ = present(tensors, family, facts, on_hub=False)
    table, others = {entry.name: entry for entry in entries(family, facts)}, variants(family, facts)
    unknown = [name for name in tensors if name not in table and name not in others]
    if unknown:
        raise Mismatch(f"{len(unknown)} tensors are not its: {listed(unknown, 3)}")
    have = {hub for name in tensors for hub in (table.get(name) or others[name]).hub}
    missing = [name for name, entry in table.items() if not set(entry.hub) <= have]
    if missing:
        raise Mismatch(f"{len(missing)} of its tensors are missing: {listed(missing, 3)}")


def _canonical(name: str, settings: Values) -> Any:
    """A setting, so that settings that compute the same are equal."""
    if name.startswith("moe_router_") and not settings.get("num_moe_experts"):
        return None
    if name == "moe_router_pre_softmax" and settings.get("moe_router_score_function") == "sigmoid":
        return None
    if name.startswith(("rotary_", "rope_")) and settings.get("position_embedding_type") == "none":
        return None
    value = settings.get(name)
    value = DEFAULTS.get(name) if value is None else value
    match name, value:
        case "num_query_groups", None:
            return settings.get("num_attention_heads")
        case "activation_func", "openai_gelu" | "gelu_pytorch_tanh" | "gelu_tanh":
            return "fast_gelu"
        case "moe_shared_expert_intermediate_size", 0:
            return None
        case "add_qkv_bias", _:
            return bool(value or settings.get("add_bias_linear", True))
        case "window_size", [-1, -1] | (-1, -1):
            return None
        case _, tuple():
            return list(value)
    return value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return isclose(one, other, rel_tol=1e-9)
    return bool(one == other) or (not one and not other)


def _hints(family: Family, config: Values, stated: Values, hf_model_id: str | None) -> tuple[bool, ...]:
    """How much speaks for a family, beside the names and values that fit: what made the checkpoint, and proof."""
    ours, _ = to_megatron(config, family, family.facts(config))
    source = str(hf_model_id or stated.get("hf_model_id") or stated.get("model_class") or "")
    named = source.rpartition("/")[2].lower().replace("-", "_")
    built = ours.get("_target_") == stated.get("_target_")
    return (
        built and ours.get("_target_") != GPT,
        ours.get("transformer_layer_spec") == stated.get("transformer_layer_spec"),
        any(kind.removesuffix("_text") in named for kind in (family.name, *family.model_types)),
        "bit for bit" in family.verified,
        built,
    )


def _unknown(against: Mapping[str, str], tensors: Mapping[str, Tensor]) -> InputError:
    """What to say when no family fits: the reasons of those that came nearest."""
    near = [f"{name}: {why}" for name, why in against.items() if "missing" in why or "not its" in why]
    near += [f"{name}: {why}" for name, why in against.items() if why.startswith("the checkpoint says")]
    return Mismatch(
        f"no known family has the checkpoint's {len(tensors)} tensors and its settings:\n  " + "\n  ".join(near[:4]),
        hint="--hf-model REF names the HuggingFace model that was trained; `reshard families` lists what is known",
    )


# ------------------------------------------------------------------------------------------------------------ check

_CHECKED = (
    ("layers", "num_layers", ("num_hidden_layers",)),
    ("hidden size", "hidden_size", ("hidden_size",)),
    ("heads", "num_attention_heads", ("num_attention_heads",)),
    ("key-value heads", "num_query_groups", ("num_key_value_heads",)),
    ("size of a head", "kv_channels", ("head_dim",)),
    ("size of the MLP", "ffn_hidden_size", ("intermediate_size",)),
    ("experts", "num_moe_experts", ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")),
    ("experts of a token", "moe_router_topk", ("num_experts_per_tok",)),
    ("size of an expert", "moe_ffn_hidden_size", ("moe_intermediate_size",)),
    ("rotary base", "rotary_base", ("rope_theta",)),
    ("epsilon", "layernorm_epsilon", ("rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layer_norm_eps")),
    ("tied embeddings", "share_embeddings_and_output_weights", ("tie_word_embeddings",)),
)
"""(what it is, the setting, the config's keys)."""

_OF_EXPERTS = frozenset({"num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"})


def check_config(config: Config, settings: Values) -> list[str]:
    """Where a config.json and a checkpoint's settings say different things, as `what: HF x, checkpoint y`.

    What only one of them states is no contradiction.
    """
    values = flat(config)
    tie = config.get("tie_word_embeddings")
    values["tie_word_embeddings"] = values.get("tie_word_embeddings") if tie is None else tie
    found = []
    for what, name, keys in _CHECKED:
        theirs = next((values[key] for key in keys if values.get(key) is not None), None)
        ours = settings.get(name)
        if theirs is None or ours is None or isinstance(ours, list | tuple) or _is_beside(name, settings):
            continue
        if ours == _unsaid(name, settings):
            continue
        if not _same(theirs, ours):
            found.append(f"{what}: HF {theirs}, checkpoint {ours}")
    return found


def _unsaid(name: str, settings: Values) -> Any:
    """What stands in settings that were left as they are: it contradicts nobody, and shapes tell sizes."""
    hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    if type(hidden) is not int or type(heads) is not int or heads <= 0:
        return None
    return {"ffn_hidden_size": 4 * hidden, "kv_channels": hidden // heads, "layernorm_epsilon": 1e-5}.get(name)


def _is_beside(name: str, settings: Values) -> bool:
    """Whether a setting has no meaning in such a model."""
    if name in ("num_query_groups", "kv_channels"):
        return settings.get("multi_latent_attention") is True
    if name == "rotary_base":
        return settings.get("position_embedding_type") == "none"
    return name in _OF_EXPERTS and name != "num_moe_experts" and not settings.get("num_moe_experts")
