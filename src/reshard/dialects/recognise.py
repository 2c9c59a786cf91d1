"""What a Megatron checkpoint is: the family and a config.json, of its settings and tensors alone.

By table: for each family a config is made of the settings. The family fits when its rows have the checkpoint's names
and when its config says, in Megatron's settings again, what the checkpoint said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reshard.core.tensor import Tensor
from reshard.dialects.apply import present
from reshard.dialects.megatron_config import DEFAULTS, GPT, MALFORMED, NULL_MEANS_NONE, same, to_config, to_megatron
from reshard.dialects.setting import Values, flat
from reshard.dialects.table import Family, entries, variants
from reshard.errors import Incomplete, InputError, Mismatch, Unsupported, listed


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
    "moe_router_enable_expert_bias", "num_query_groups", "seq_len_interpolation_factor", "moe_router_topk",
    "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk", "qk_l2_norm",
    "apply_residual_connection_post_layernorm",
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
    what no tensor tells and for tensors that the one family lacks which fits but for them, Unsupported when none fits.
    """
    stated, notices = _completed(settings, tensors, vocab_size)
    # the first of a layer's experts stands for all, of which there may be tens of thousands
    names = {name: tensor for name, tensor in tensors.items() if not _OTHER_EXPERT.search(name)}
    fits: list[tuple[Family, dict[str, Any]]] = []
    short: list[tuple[Family, dict[str, Any], list[str]]] = []
    against: dict[str, str] = {}
    for family in candidates:
        try:
            config = to_config(stated, family)
            missing = _missing(config, family, stated, names)
        except InputError as error:
            against[family.name] = str(error)
        else:
            if missing:
                short.append((family, config, missing))
            else:
                fits.append((family, config))
    if not fits and not short:
        raise _unknown(against, tensors)
    if not fits:
        fewest = min(len(missing) for *_, missing in short)
        nearest = [(family, config) for family, config, missing in short if len(missing) == fewest]
        family, *_ = _likeliest(nearest, stated, hf_model_id)[0]
        raise _short(family, next(missing for other, _, missing in short if other is family))
    best, *others = _likeliest(fits, stated, hf_model_id)
    if others:
        names_of = listed(family.name for family, _ in others)
        notices.append(f"taken for a {best[0].name} model; its tensors and settings fit {names_of} too")
    return Recognised(*best, tuple(notices))


def lacking(settings: Values) -> list[str]:
    """What no tensor tells of a model and the settings do not say either: without it no config can be made."""
    optional = {"rotary_base"} if settings.get("position_embedding_type") == "none" else set()
    return [name for name in _NEEDED if settings.get(name) is None and name not in optional]


def _completed(
    settings: Values, tensors: Mapping[str, Tensor], vocab_size: int | None
) -> tuple[dict[str, Any], list[str]]:
    """The settings with what the tensors tell; what that leaves in doubt, in sentences."""
    stated = {name: value for name, value in settings.items() if value is not None or name in NULL_MEANS_NONE}
    beside = [f"{name} {stated[name]!r:.40}" for name in _NEEDED if name in stated and not _is_positive(stated[name])]
    if beside:
        raise Mismatch(f"the settings say {listed(beside)}: a number above 0 was expected")
    unsaid = lacking(settings)
    if unsaid:
        raise Incomplete(
            f"the checkpoint's settings do not say {listed(unsaid)}, and no tensor does",
            hint="--hf-model REF names the HuggingFace model that was trained: its config.json says them "
            "(or --model-id, for models that NVIDIA's script has names for)",
        )
    if str(stated.get("model_class")).startswith("nemo."):
        stated |= of_nemo(stated)
    notices: list[str] = []
    embedding = next((t for n, t in tensors.items() if n.endswith("embedding.word_embeddings.weight")), None)
    if embedding is not None and len(embedding.shape) == 2:
        stated.setdefault("hidden_size", embedding.shape[1])
        rows = embedding.shape[0]
        named = vocab_size or stated.get("vocab_size")
        if type(named) is int and named > rows:
            raise Mismatch(f"the settings say vocab_size {named}, the embedding has {rows} rows")
        if type(named) is not int or not 0 < named <= rows:
            named = rows
            notices.append(
                f"the checkpoint does not say how many tokens there are: all {rows} rows of the embedding are taken, "
                "which may be padded"
            )
        stated["vocab_size"] = named
        if embedding.dtype.kind == "float" and not (stated.get("bf16") or stated.get("fp16")):
            stated.setdefault("params_dtype", embedding.dtype.torch)
    if not stated.get("num_layers"):
        stated["num_layers"] = 1 + max(_numbers(tensors, "decoder.layers."), default=-1)
    _check_counts(stated, len(tensors))
    has_head = any(name.endswith("output_layer.weight") for name in tensors)
    stated.setdefault("share_embeddings_and_output_weights", not has_head)
    _complete_mlp(stated, tensors)
    if not any("mtp.layers." in name for name in tensors):
        stated["mtp_num_layers"] = 0
    return stated, notices


def _is_positive(value: Any) -> bool:
    """Whether a setting is a number above 0; Gemma 3 has two rotary bases."""
    if isinstance(value, list | tuple):
        return len(value) == 2 and not isinstance(value[0], list | tuple) and all(map(_is_positive, value))
    return type(value) in (int, float) and 0 < value < math.inf


def _check_counts(stated: Values, num_tensors: int) -> None:
    """Raise Mismatch for counts beyond measure: tables are made of them, and of each there is a tensor at least."""
    vision = stated.get("vision_config")
    inner = vision.get("config_dict", vision) if isinstance(vision, Mapping) else None
    tower: Values = inner if isinstance(inner, Mapping) else {}
    counts = {name: stated.get(name) or 0 for name in ("num_layers", "num_moe_experts", "mtp_num_layers")}
    counts |= {name: tower.get(name) or 0 for name in ("depth", "num_hidden_layers")}
    counts["hybrid_layer_pattern"] = len(str(stated.get("hybrid_layer_pattern") or "").replace("|", ""))
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count <= num_tensors:
            raise Mismatch(f"the settings say {name} {count!r:.100}, and there are {num_tensors} tensors")


def of_nemo(stated: Values) -> Values:
    """What NeMo 2 puts otherwise: a window counts its own token, and Llama 3.1 is scaled by settings of other names."""
    found: dict[str, Any] = {}
    window = stated.get("window_size")
    if isinstance(window, list) and len(window) == 2 and type(window[0]) is int and window[0] > 0:
        found["window_size"] = [window[0] - 1, window[1]]
    if "old_context_len" in stated and "scale_factor" in stated:
        found |= {"rope_scaling": True, "rope_scaling_factor": stated["scale_factor"]}
    if isinstance(stated.get("model_class"), str):
        found["apply_embedding_scaling"] = "gemma" in str(stated["model_class"]).rpartition(".")[2].lower()
    return found


def _complete_mlp(stated: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The sizes of the MLPs, of the experts and how many there are of these, where the settings do not say."""
    experts = 1 + max(_numbers(tensors, ".experts.linear_fc2.weight"), default=-1)
    if experts and stated.setdefault("num_moe_experts", experts) != experts:
        few = type(stated["num_moe_experts"]) is int and experts < stated["num_moe_experts"]
        said = f"the settings say num_moe_experts {stated['num_moe_experts']!r}, the tensors are of {experts}"
        raise (Incomplete if few else Mismatch)(said, hint="is every shard there?" if few else None)
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


def _missing(config: Values, family: Family, stated: Values, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names that a model of a family has and the checkpoint lacks.

    Raises Mismatch where the config that was made for the family says else than the checkpoint, or lacks its names.
    """
    try:
        facts = family.facts(config)
    except MALFORMED as error:
        raise Mismatch(f"the settings make no {family.name} model: {error!r:.100}") from error
    ours, _ = to_megatron(config, family, facts)
    unlike = [f"{name} {said!r}, not {meant!r}" for name, said, meant in _unlike(ours, stated, family)]
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
    return [name for name, entry in table.items() if not set(entry.hub) <= have]


def _unlike(ours: Values, stated: Values, family: Family) -> Iterator[tuple[str, Any, Any]]:
    """(setting, the checkpoint's value, a config's) where they are not the same."""
    for name in _IDENTITY:
        meant, said = _canonical(name, ours), _canonical(name, stated)
        if not same(meant, said):
            yield name, said, meant
    scaled = stated.get("apply_embedding_scaling")
    if isinstance(scaled, bool) and scaled != family.name.startswith(_SCALED):
        yield "apply_embedding_scaling", scaled, not scaled


def contradictions(config: Values, family: Family, settings: Values) -> tuple[list[str], list[str]]:
    """What a config.json and NeMo's settings of a model say differently: (what makes it another model, the rest).

    Nothing where the settings are not whole. The rest is what NeMo's own converters leave out: how far attention
    reaches, and which of two GELUs is meant.
    """
    if not {"normalization", "activation_func", "position_embedding_type"} <= settings.keys():
        return [], []
    is_nemo_2 = str(settings.get("model_class")).startswith("nemo.")
    stated = {**settings, **(of_nemo(settings) if is_nemo_2 else {})}
    ours, _ = to_megatron(config, family, family.facts(config))
    found = [*_unlike(ours, stated, family)]
    rope = flat(config)["rope"]
    if ours.get("rope_scaling") is True and stated.get("rope_scaling") is True:
        pairs = [(name, stated.get(name), rope.get(key)) for name, key in _BANDS]
        found += [(name, said, meant) for name, said, meant in pairs if None not in (said, meant) and said != meant]
    gelus = {"gelu", "fast_gelu"}
    lesser = [f for f in found if f[0] == "window_size" or (f[0] == "activation_func" and gelus == {*f[1:]})]
    return [_sentence(f) for f in found if f not in lesser], [_sentence(f) for f in lesser]


_BANDS = (
    ("rope_scaling_factor", "factor"),
    ("low_freq_factor", "low_freq_factor"),
    ("high_freq_factor", "high_freq_factor"),
    ("old_context_len", "original_max_position_embeddings"),
)
"""(NeMo's setting, the config's)."""


def _sentence(found: tuple[str, Any, Any]) -> str:
    name, said, meant = found
    return f"{name}: HF {meant}, checkpoint {said}"


_SCALED = "gemma"
"""Families of this name multiply embeddings, by a class of their own: of all settings only NeMo's speak of it."""


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
        case "seq_len_interpolation_factor", 1:
            return None
        case "qk_l2_norm" | "apply_residual_connection_post_layernorm", False:
            return None
        case "add_qkv_bias", _:
            return bool(value or settings.get("add_bias_linear", True))
        case "window_size", [-1, -1] | (-1, -1):
            return None
        case _, tuple():
            return list(value)
    return value


def _likeliest(
    fits: Sequence[tuple[Family, dict[str, Any]]], stated: Values, hf_model_id: str | None
) -> list[tuple[Family, dict[str, Any]]]:
    """Those of some families that fit, for which most speaks beside the names and values that they have in common."""
    ours = [to_megatron(config, family, family.facts(config))[0] for family, config in fits]
    telling = {
        name
        for settings in ours
        for name, value in settings.items()
        if name not in _OF_TRAINING and not isinstance(value, Mapping)
    }
    scores = [
        _hints(family, settings, stated, telling, hf_model_id) for (family, _), settings in zip(fits, ours, strict=True)
    ]
    return [fit for fit, score in zip(fits, scores, strict=True) if score == max(scores)]


def _hints(
    family: Family, ours: Values, stated: Values, telling: Iterable[str], hf_model_id: str | None
) -> tuple[int, ...]:
    """How much speaks for a family: what made the checkpoint, settings that are its own, and proof."""
    source = str(hf_model_id or stated.get("hf_model_id") or stated.get("model_class") or "")
    named = _letters(source.rpartition("/")[2])
    built = ours.get("_target_") == stated.get("_target_")
    turns_parts = "rotary_percent" in {item[0] if isinstance(item, tuple) else item.name for item in family.settings}
    return (
        turns_parts or ours.get("rotary_percent") in (None, 1),
        built and ours.get("_target_") != GPT,
        ours.get("transformer_layer_spec") == stated.get("transformer_layer_spec"),
        any(_letters(kind.removesuffix("_text")) in named for kind in (family.name, *family.model_types)),
        "bit for bit" in family.verified,
        sum(same(_canonical(name, ours), _canonical(name, stated)) for name in telling),
        "transformers" in family.verified,
        built,
    )


def _letters(name: str) -> str:
    """`Phi-3-mini` and `phi3`, `Qwen2.5-VL` and `qwen2_5_vl` in one spelling."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


_OF_TRAINING = frozenset(
    {
        "_target_", "attention_dropout", "hidden_dropout", "init_method_std", "moe_aux_loss_coeff", "moe_grouped_gemm",
        "moe_router_load_balancing_type", "moe_token_dispatcher_type",
    }
)  # fmt: skip
"""What tells how a model was built and trained, and not which one it is."""


def _short(family: Family, missing: Sequence[str]) -> InputError:
    """What to say when a family fits but for tensors that are not there."""
    return Incomplete(
        f"{len(missing)} tensors of the {family.name} model, which the settings describe, are missing: "
        f"{listed(missing)}",
        hint="is every shard there? If it is another model, --hf-model REF names the HuggingFace model that was "
        "trained",
    )


def _num_unlike(why: str) -> int:
    """How many settings a sentence names, and counts."""
    more = re.search(r" and (\d+) more$", why)
    return why.count(", not ") + (int(more[1]) if more else 0)


def _unknown(against: Mapping[str, str], tensors: Mapping[str, Tensor]) -> InputError:
    """What to say when no family fits: the reasons of those that came nearest."""
    near = [f"{name}: {why}" for name, why in against.items() if "not its" in why]
    says = [name for name, why in against.items() if why.startswith("the checkpoint says")]
    near += [f"{name}: {against[name]}" for name in sorted(says, key=lambda name: _num_unlike(against[name]))]
    return Unsupported(
        f"no known family has the checkpoint's {len(tensors)} tensors and its settings:\n  " + "\n  ".join(near[:4]),
        hint="--hf-model REF names the HuggingFace model that was trained; `reshard families` lists what is known",
    )
