"""What several families say about their settings: lists and rules to be put together in `Family.settings`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.megatron_config import bias_settings, rope_config, rope_settings
from reshard.dialects.setting import Always, Item, Rule, Setting, Values
from reshard.errors import Unsupported

_BRIDGE = "megatron.bridge.models."


def provider(path: str) -> tuple[str, str]:
    """The class that Megatron-Bridge builds such models with."""
    return "_target_", _BRIDGE + path


def epsilon(key: str, default: float) -> Setting:
    """What norms add to the variance."""
    return Setting("layernorm_epsilon", key, default)


def rotary(base: float, percent: float = 1.0) -> tuple[Setting, ...]:
    """The base of the rotary embedding, and the part of a head that it turns, where a config does not say."""
    turned = Setting("rotary_base", "rope_theta", base)
    return (turned,) if percent == 1 else (turned, Setting("rotary_percent", "partial_rotary_factor", percent))


def biases(*everywhere: str, qkv: str = "") -> Rule:
    """The config's names of the biases: those of all linears, and of query, key and value."""

    def config(settings: Values) -> Values:
        linear, first = bool(settings["add_bias_linear"]), bool(settings["add_qkv_bias"])
        return dict.fromkeys(everywhere, linear) | ({qkv: linear or first} if qkv else {})

    return Rule("biases", bias_settings, config)


# ---------------------------------------------------------------------------------------------------------- windows


def _kinds(config: Values, num_layers: int) -> list[str]:
    """What each layer attends to; configs before `layer_types` say from which layer on windows are used."""
    kinds = config.get("layer_types")
    if kinds is not None:
        return list(kinds)
    full = config.get("max_window_layers", 28) if config.get("use_sliding_window") else num_layers
    return ["full_attention" if layer < full else "sliding_attention" for layer in range(num_layers)]


def window(default: int | None = None, *, layers: bool = False, switch: bool = False) -> Rule:
    """Sliding windows: Megatron counts the tokens before a token, the config that token too.

    With `layers` only some have a window, which `layer_types` names; with `switch` the config turns windows on.
    """

    def settings(config: Values, facts: Facts) -> Values:
        size = config.get("sliding_window", default)
        kinds = _kinds(config, len(facts.layers)) if layers else ["sliding_attention"]
        if not size or not config.get("use_sliding_window", not switch) or "sliding_attention" not in kinds:
            return {}
        found: dict[str, Any] = {"window_size": [size - 1, 0]}
        if "full_attention" in kinds:
            found["window_attn_skip_freq"] = [int(kind == "sliding_attention") for kind in kinds]
        return found

    def config(settings: Values) -> Values:
        size = _window_size(settings)
        found: dict[str, Any] = {"sliding_window": size} | ({"use_sliding_window": size is not None} if switch else {})
        if layers:
            kinds = ["sliding_attention" if on else "full_attention" for on in _windowed(settings)]
            found["layer_types"] = kinds
        return found

    return Rule("window", settings, config)


def _window_size(settings: Values) -> int | None:
    size = settings.get("window_size")
    if isinstance(size, list | tuple) and len(size) == 2 and type(size[0]) is int and size[0] >= 0:
        return size[0] + 1
    return None


def _windowed(settings: Values) -> list[bool]:
    """Which layers have a window."""
    count, skip = settings["num_layers"], settings.get("window_attn_skip_freq")
    if _window_size(settings) is None:
        return [False] * count
    if isinstance(skip, list | tuple):
        return [bool(on) for on in skip]
    return [not skip or layer % skip != 0 for layer in range(1, count + 1)]


def _alternating_config(settings: Values) -> Values:
    kinds = ["sliding_attention" if on else "full_attention" for on in _windowed(settings)]
    return {"sliding_window": _window_size(settings), "layer_types": kinds}


def _alternating(config: Values, facts: Facts) -> Values:
    kinds = _listed_kinds(config, (["sliding_attention", "full_attention"] * len(facts.layers))[: len(facts.layers)])
    skipped = 2 if kinds is None else [int(kind == "sliding_attention") for kind in kinds]
    return {"window_size": [config.get("sliding_window", 128) - 1, 0], "window_attn_skip_freq": skipped}


def _listed_kinds(config: Values, usual: list[str]) -> list[str] | None:
    """What the layers attend to, where that is not the usual order."""
    kinds = config.get("layer_types")
    return None if kinds is None or list(kinds) == usual else list(kinds)


ALTERNATING = Rule("window", _alternating, _alternating_config)
"""Every other layer has a window, the first one too, unless `layer_types` says otherwise."""


def _every_other(settings: Values) -> Values:
    count, size = settings["num_layers"], _window_size(settings)
    kinds = ["sliding_attention", "full_attention"] * count
    return {"sliding_window": size} | ({} if size is None else {"layer_types": kinds[:count]})


EVERY_OTHER = Rule("window", window(4096).settings, _every_other)
"""The same where the class that is built knows which layers have a window: Megatron has no setting for it."""

PLAIN_ROPE = Rule(
    "rope", rope_settings, lambda settings: rope_config(settings) or {"rope_scaling": {"rope_type": "default"}}
)
"""The rotary embedding of a family whose configs mean a scaling when they mention none."""


def _unturned(config: Values, facts: Facts) -> Values:
    kinds = config.get("layer_types") or ()
    if "sliding_attention" not in kinds:
        return {}
    return {"no_rope_freq": [int(kind == "full_attention") for kind in kinds]}


UNTURNED = Rule("no_rope_freq", _unturned, lambda settings: {})
"""Between layers with a window, those without have no rotary embedding."""


# ------------------------------------------------------------------------------------------------ mixtures of experts


def moe(*experts: str, size: str = "moe_intermediate_size", aux: float | None = None) -> tuple[Item, ...]:
    """Experts, how many a token takes, and their size, by the config's names."""
    return (
        Setting("num_moe_experts", (*experts, "num_experts", "num_local_experts", "n_routed_experts")),
        Setting("moe_router_topk", "num_experts_per_tok"),
        Setting("moe_ffn_hidden_size", size),
        Setting("moe_aux_loss_coeff", ("router_aux_loss_coef", "aux_loss_alpha"), aux),
        ("moe_router_score_function", "softmax"),
        ("moe_router_pre_softmax", False),
        ("moe_grouped_gemm", True),
        ("moe_token_dispatcher_type", "alltoall"),
    )


def _moe_layers(facts: Facts) -> list[int]:
    return [int("moe" in tags) for tags in facts.layers]


def _is_moe(settings: Values) -> list[bool]:
    """Which layers are mixtures of experts."""
    frequency, count = settings["moe_layer_freq"], settings["num_layers"]
    if isinstance(frequency, list | tuple):
        return [bool(on) for on in frequency]
    return [layer % int(frequency) == 0 for layer in range(count)]


def _dense_first(settings: Values) -> Values:
    kinds = _is_moe(settings)
    first = kinds.index(True) if True in kinds else len(kinds)
    if not all(kinds[first:]):
        raise Unsupported(f"moe_layer_freq is {settings['moe_layer_freq']}: dense layers after the first experts")
    return {"first_k_dense_replace": first}


DENSE_FIRST = Rule("moe_layer_freq", lambda config, facts: {"moe_layer_freq": _moe_layers(facts)}, _dense_first)
"""Some dense layers, then mixtures of experts."""


def _dense_listed(settings: Values) -> Values:
    kinds = ["sparse" if on else "dense" for on in _is_moe(settings)]
    return {**_dense_first(settings), "mlp_layer_types": kinds}


DENSE_LISTED = Rule("moe_layer_freq", DENSE_FIRST.settings, _dense_listed)
"""The same, for configs that transformers 5 reads layer by layer."""


def _some_dense(config: Values, facts: Facts) -> Values:
    kinds = _moe_layers(facts)
    return {"moe_layer_freq": 1 if all(kinds) else kinds}


def _some_dense_config(settings: Values) -> Values:
    dense = [layer for layer, on in enumerate(_is_moe(settings)) if not on]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


SOME_DENSE = Rule("moe_layer_freq", _some_dense, _some_dense_config)
"""Mixtures of experts but where `mlp_only_layers` or `decoder_sparse_step` say otherwise."""

NO_DENSE = Rule(
    "ffn_hidden_size",
    lambda config, facts: {"ffn_hidden_size": config.get("intermediate_size") or 4 * config["hidden_size"]},
    lambda settings: {},
)
"""No layer is dense, and the config has no size for one: Megatron's own default stands there."""

NORMED = Setting("moe_router_pre_softmax", "norm_topk_prob", False, values=((True, False), (False, True)))
"""Whether the weights of a token's experts are normalised: Megatron then takes the softmax over these alone."""


def _shared(config: Values, facts: Facts) -> Values:
    count = config.get("n_shared_experts") or config.get("num_shared_experts")
    return {"moe_shared_expert_intermediate_size": config["moe_intermediate_size"] * count} if count else {}


def _shared_config(settings: Values) -> Values:
    size, unit = settings.get("moe_shared_expert_intermediate_size") or 0, settings["moe_ffn_hidden_size"]
    return {"n_shared_experts": size // unit}


SHARED = Rule("shared_experts", _shared, _shared_config)
"""Shared experts, counted by the config, measured by Megatron."""

NUM_SHARED = Rule("shared_experts", _shared, lambda s: {"num_shared_experts": _shared_config(s)["n_shared_experts"]})
"""The same, under another name."""

GATED_SHARED: tuple[Item, ...] = (
    Setting("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
    ("moe_shared_expert_gate", True),
)

GROUPS: tuple[Item, ...] = (
    Setting("moe_router_num_groups", "n_group"),
    Setting("moe_router_group_topk", "topk_group"),
    Setting("moe_router_topk_scaling_factor", "routed_scaling_factor", 1.0),
)
"""Experts chosen by groups, and what their weights are multiplied by."""

SIGMOID: tuple[Item, ...] = (
    ("moe_router_score_function", "sigmoid"),
    ("moe_router_enable_expert_bias", True),
    ("moe_router_dtype", "fp32"),
    ("moe_router_load_balancing_type", "seq_aux_loss"),
    Always("norm_topk_prob", True),
)
"""Sigmoids instead of a softmax, a bias that only chooses, normalised weights."""

BLOCKS: tuple[str, Any] = (
    "transformer_layer_spec",
    {
        "_target_": "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec",
        "_partial_": True,
        "_args_": [],
        "use_transformer_engine": True,
    },
)
"""Megatron-Bridge builds the layers one by one: they are not alike."""


# ---------------------------------------------------------------------------------------------------- latent attention


def _latent_rope(config: Values, facts: Facts) -> Values:
    """YaRN always: one that scales by 1 is a plain rotary embedding."""
    rope = config["rope"]
    scales = rope["rope_type"] == "yarn"
    return {
        "position_embedding_type": "rope",
        "rope_scaling": False,
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope["factor"]) if scales else 1.0,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", 4096) if scales else 4096,
        "beta_fast": rope.get("beta_fast", 32),
        "beta_slow": rope.get("beta_slow", 1),
        "mscale": rope.get("mscale", 1.0),
        "mscale_all_dim": rope.get("mscale_all_dim", 0.0 if scales else 1.0),
    }


def _latent_rope_config(settings: Values) -> Values:
    factor = settings["rotary_scaling_factor"]
    if settings["rope_type"] != "yarn" or factor == 1:
        return {}
    named = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    rope = {"type": "yarn", "rope_type": "yarn", "factor": factor}
    return {"rope_scaling": rope | {key: settings[key] for key in named}}


def _latent_heads(config: Values, facts: Facts) -> Values:
    heads = config["num_attention_heads"]
    return {"num_attention_heads": heads, "num_query_groups": heads, "kv_channels": config["qk_rope_head_dim"]}


def _latent_heads_config(settings: Values) -> Values:
    heads = settings["num_attention_heads"]
    return {"num_attention_heads": heads, "num_key_value_heads": heads}


def _queries_config(settings: Values) -> Values:
    return {"q_lora_rank": settings["q_lora_rank"]}


LATENT: tuple[Item, ...] = (
    provider("mla_provider.MLAModelProvider"),
    BLOCKS,
    ("multi_latent_attention", True),
    ("qk_layernorm", True),
    Rule("heads", _latent_heads, _latent_heads_config),
    Rule("queries", lambda config, _: {"q_lora_rank": config.get("q_lora_rank")}, _queries_config),
    Setting("kv_lora_rank", "kv_lora_rank"),
    Setting("qk_head_dim", "qk_nope_head_dim"),
    Setting("qk_pos_emb_head_dim", "qk_rope_head_dim"),
    Setting("v_head_dim", "v_head_dim"),
    Rule("rope", _latent_rope, _latent_rope_config),
    ("rotary_percent", 1.0),
)
"""Multi-head latent attention."""


# --------------------------------------------------------------------------------------------------- gated delta nets


def _linear(config: Values, facts: Facts) -> Values:
    return {"linear_attention_freq": [int("linear" in tags) for tags in facts.layers]}


def _linear_config(settings: Values) -> Values:
    frequency, count = settings["linear_attention_freq"], settings["num_layers"]
    if not isinstance(frequency, list | tuple):
        frequency = [int(layer % int(frequency) != 0) for layer in range(1, count + 1)]
    return {"layer_types": ["linear_attention" if on else "full_attention" for on in frequency]}


DELTA_NET: tuple[Item, ...] = (
    ("transformer_layer_spec", "get_transformer_block_with_experimental_attention_variant_spec"),
    ("experimental_attention_variant", "gated_delta_net"),
    ("hetereogenous_dist_checkpoint", True),
    ("attention_output_gate", True),
    ("layernorm_zero_centered_gamma", True),
    ("qk_layernorm", True),
    Rule("linear_attention_freq", _linear, _linear_config),
    *(
        Setting(name, name)
        for name in (
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
        )
    ),
)
"""Layers of gated delta nets between those of attention with an output gate."""


def mtp_count(key: str = "num_nextn_predict_layers") -> Rule:
    """The layers that predict further tokens."""

    def settings(config: Values, facts: Facts) -> Values:
        return {"mtp_num_layers": facts.counts.get("mtp", 1)} if "mtp" in facts.tags else {}

    return Rule("mtp_num_layers", settings, lambda settings: {key: settings.get("mtp_num_layers") or 0})


# ------------------------------------------------------------------------------------------------------------- vision


def mrope(default: Sequence[int], *, interleaved: bool = False) -> Rule:
    """Positions in three directions: how many of a head's numbers turn with each, one after another or by turns."""

    def settings(config: Values, facts: Facts) -> Values:
        sections = config["rope"].get("mrope_section", default)
        return {"position_embedding_type": "mrope", "mrope_section": list(sections), "rope_scaling": False}

    def config(settings: Values) -> Values:
        rope = {"rope_type": "default", "mrope_section": list(settings.get("mrope_section") or default)}
        return {"rope_scaling": rope | ({"mrope_interleaved": True} if interleaved else {"type": "mrope"})}

    return Rule("rope", settings, config)


def _thirds(settings: Values) -> list[int]:
    """Half of the numbers that are turned, cut among time, height and width as Qwen3.5 does: 11, 11 and 10 of 32."""
    head = settings.get("kv_channels") or settings["hidden_size"] // settings["num_attention_heads"]
    half = int(head * settings["rotary_percent"]) // 2
    return [-(-half // 3), -(-(half - 1) // 3), half // 3]


def text_mrope(kind: str = "rope") -> Rule:
    """Qwen3.5's positions in three directions, which are one in text; partial, and by turns."""

    def settings(config: Values, facts: Facts) -> Values:
        found: dict[str, Any] = {"position_embedding_type": kind, "rope_scaling": False, "rope_scaling_factor": 1.0}
        sections = config["rope"].get("mrope_section")
        return found | ({"mrope_section": list(sections)} if sections and kind == "mrope" else {})

    def config(settings: Values) -> Values:
        rope = {
            "rope_type": "default",
            "rope_theta": settings["rotary_base"],
            "partial_rotary_factor": settings["rotary_percent"],
            "mrope_interleaved": True,
            "mrope_section": list(settings.get("mrope_section") or _thirds(settings)),
        }
        return {"rope_parameters": rope}

    return Rule("rope", settings, config)


def tower(target: str, *tokens: tuple[str, int]) -> tuple[Item, ...]:
    """The vision tower's own config, and the tokens that stand for what it sees."""

    def settings(config: Values, facts: Facts) -> Values:
        return {"vision_config": {"_target_": f"transformers.models.{target}", **config["vision_config"]}}

    def config(settings: Values) -> Values:
        vision = settings["vision_config"]
        values: Mapping[str, Any] = vision.get("config_dict", vision)
        return {"vision_config": {n: v for n, v in values.items() if n not in _NOT_OF_TOWER and v is not None}}

    return (
        Rule("vision_config", settings, config),
        ("scatter_embedding_sequence_parallel", False),
        Setting("bos_token_id", "bos_token_id"),
        Setting("eos_token_id", "eos_token_id"),
        *(Setting(name, name, number) for name, number in tokens),
    )


def qwen_tokens(start: int, end: int, image: int, video: int) -> tuple[tuple[str, int], ...]:
    """The tokens around and instead of pictures and films, by name."""
    numbers = (start, end, image, video)
    return tuple(zip(QWEN_TOKENS, numbers, strict=True))


QWEN_TOKENS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")

_NOT_OF_TOWER = frozenset(
    {
        "_target_", "_call_", "_name_or_path", "architectures", "chunk_size_feed_forward", "id2label", "label2id",
        "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
        "transformers_version", "torch_dtype", "dtype",
    }
)  # fmt: skip
"""What transformers writes into every config object, of no meaning to a tower."""


# -------------------------------------------------------------------------------------------------------------- Gemma

GEMMA: tuple[Item, ...] = (("layernorm_zero_centered_gamma", True), ("activation_func", "fast_gelu"))
"""Norms of 1 + w. Configs of the first Gemma say `gelu`, and its approximation is meant."""


def _bases(config: Values, facts: Facts) -> Values:
    rope = config["rope"]
    return {
        "rotary_base": [config.get("rope_local_base_freq") or 10000.0, config.get("rope_theta") or 1e6],
        "rope_scaling_factor": rope["factor"] if rope["rope_type"] == "linear" else 1.0,
        "position_embedding_type": "rope",
    }


def _bases_config(settings: Values) -> Values:
    local, whole = settings["rotary_base"]
    factor = settings["rope_scaling_factor"]
    scaling = {} if factor == 1 else {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    return {"rope_theta": whole, "rope_local_base_freq": local} | scaling


def _scale(config: Values, facts: Facts) -> Values:
    """Gemma 3 divides by the root of a number of its own."""
    return {"softmax_scale": 1.0 / math.sqrt(config.get("query_pre_attn_scalar") or 256)}


def _scale_config(settings: Values) -> Values:
    scalar = 1.0 / (settings.get("softmax_scale") or 1.0 / 16) ** 2
    whole = round(scalar)
    return {"query_pre_attn_scalar": whole if math.isclose(scalar, whole, rel_tol=1e-9) else scalar}


def _local_window(settings: Values) -> Values:
    size, (local, whole) = settings["window_size"], settings.get("interleaved_attn_pattern") or _FIVE_TO_ONE
    period = ["sliding_attention"] * local + ["full_attention"] * whole
    kinds = (period * settings["num_layers"])[: settings["num_layers"]]
    return {"sliding_window": size if isinstance(size, int) else size[0] + 1, "layer_types": kinds}


_FIVE_TO_ONE = (5, 1)


def _pattern(config: Values, facts: Facts) -> Values:
    """How many layers with a window there are before each without one: Megatron-Bridge repeats that."""
    kinds = config.get("layer_types") or ()
    local = list(kinds).index("full_attention") if "full_attention" in kinds else _FIVE_TO_ONE[0]
    return {"interleaved_attn_pattern": [local, 1]}


GEMMA3: tuple[Item, ...] = (
    *GEMMA,
    ("qk_layernorm", True),
    ("transformer_layer_spec", "gemma3_layer_spec"),
    Rule("interleaved_attn_pattern", _pattern, lambda settings: {}),
    Always("hidden_activation", "gelu_pytorch_tanh"),
    Rule("rotary_base", _bases, _bases_config),
    Rule("rope", lambda config, facts: {}, lambda settings: {}),
    Rule("softmax_scale", _scale, _scale_config),
    Rule("window", lambda config, _: {"window_size": config.get("sliding_window", 4096)}, _local_window),
)
"""Five layers with a window and a rotary base of their own, one without."""
