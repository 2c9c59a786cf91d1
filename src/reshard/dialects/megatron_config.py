"""What a model computes with: config.json to Megatron's settings and back.

    to_megatron     every setting that changes what the model computes, stated
    to_config       the config.json of a family, of settings
    check_config    where a config.json and a checkpoint's settings contradict each other

Settings have the names of Megatron-Core's `TransformerConfig` and of Megatron-Bridge's `GPTModelProvider`. What differs
from family to family is in `Family.settings`; what all share is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import isclose
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import Glu, InterleavedGlu
from reshard.dialects.setting import Always, Item, Nested, Rule, Setting, Values, flat, merged
from reshard.dialects.table import Config, Family
from reshard.errors import Mismatch, listed

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

NULL_MEANS_NONE = frozenset(
    {"q_lora_rank", "activation_func_clamp_value", "attn_logit_softcapping", "final_logit_softcapping"}
)
"""Settings whose null is a value of its own, not the default."""

MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)
"""What values of other kinds than expected end in."""

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


def rope_settings(config: Values, facts: Facts) -> Values:
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


def rope_config(settings: Values) -> Values:
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
    Rule("rope", rope_settings, rope_config),
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
    except MALFORMED as error:
        kind = config.get("model_type")
        raise Mismatch(f"config.json of a {kind} model lacks what its settings need: {error!r:.200}") from error
    lacking = [name for name in _SIZES if settings.get(name) is None]
    if lacking:
        raise Mismatch(f"config.json of a {config.get('model_type')} model does not say {listed(lacking)}")
    settings.setdefault("gated_linear_unit", _is_gated(family))
    settings["share_embeddings_and_output_weights"] = "tied" in facts.tags
    without = () if settings.get("num_moe_experts") else ("moe_",)
    said = {n: v for n, v in settings.items() if v is not None or n in NULL_MEANS_NONE}
    stated = {n: v for n, v in said.items() if not n.startswith(without)}
    return stated, [*_lost(values, items, facts), *_lost_windows(values, stated, family)]


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


def _lost_windows(config: Values, stated: Values, family: Family) -> Iterator[str]:
    """Which layers have a window where Megatron's settings cannot say so."""
    kinds = config.get("layer_types")
    if not kinds or "sliding_attention" not in kinds:
        return
    found = flat(to_config(stated, family)).get("layer_types") or ["sliding_attention"] * len(kinds)
    if found != list(kinds):
        first = next(n for n, pair in enumerate(zip(kinds, found, strict=False)) if len({*pair}) > 1)
        yield f"Megatron computes layer {first} with {found[first]}, layer_types of the config says {kinds[first]}"


# ------------------------------------------------------------------------------------------------------ to a config


def to_config(settings: Values, family: Family) -> dict[str, Any]:
    """A config.json of a family, of Megatron's settings; what they do not state is as Megatron-Core has it.

    Raises Mismatch for settings that lack a size, Unsupported for a value that no config of the family has.
    """
    known = {**DEFAULTS, **{n: v for n, v in settings.items() if v is not None or n in NULL_MEANS_NONE}}
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
    except MALFORMED as error:
        raise Mismatch(f"the settings lack what a {family.name} config needs: {error!r:.200}") from error
    values["tie_word_embeddings"] = bool(known.get("share_embeddings_and_output_weights", True))
    values |= {n: float(v) for n, v in values.items() if n in _FRACTIONS and type(v) is int}
    names = {"architectures": [family.architectures[0]], "model_type": family.model_types[0]}
    if nested is None:
        return names | values
    both = {"tie_word_embeddings", "torch_dtype"}
    outer = {*both, "vision_config", *nested.outer}
    text = {"model_type": nested.model_type} | {n: v for n, v in values.items() if n not in outer - both}
    return names | {n: v for n, v in values.items() if n in outer} | {"text_config": text}


_FRACTIONS = frozenset(
    {"rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon", "initializer_range",
     "router_aux_loss_coef", "aux_loss_alpha", "routed_scaling_factor", "router_scaling_factor",
     "partial_rotary_factor", "attn_logit_softcapping", "final_logit_softcapping"}
)  # fmt: skip
"""What transformers 5 takes no whole number for, and a YAML may have one: `moe_aux_loss_coeff: 0`."""


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
        if not same(theirs, ours):
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


def same(one: Any, other: Any) -> bool:
    """Whether two values of a setting are the same; 0, none and unsaid are."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return isclose(one, other, rel_tol=1e-9)
    return bool(one == other) or (not one and not other)
