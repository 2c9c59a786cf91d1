"""What NeMo 1 says of a model: the settings in an archive's model_config.yaml, and the tokenizer beside it.

    model_config.yaml                      the model's part of the training configuration, as OmegaConf writes it
    <32 hex digits>_tokenizer.model        files of the archive, which the YAML calls `nemo:<32 hex digits>_NAME`
    hparams.yaml                           of a training run, in the folder above `checkpoints`: the same behind `cfg:`
    hyper_parameters                       in a training checkpoint's common.pt or rank files: the same as an object

Models of NeMo 1 from before Megatron-Core have the same weights in the same layout, under names of their own.

Whatever the YAML does not say NeMo 1 takes from defaults of its own code, so these are values that were trained with,
and count as said. Any setting of Megatron-Core's own name is handed on to it.

Source: NeMo `collections/nlp/models/language_modeling/megatron_base_model.py:build_transformer_config`,
`megatron_gpt_model.py`, `collections/nlp/parts/nlp_overrides.py`,
`scripts/checkpoint_converters/convert_gpt_nemo_to_mcore.py`, 1.20 to 2.4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from reshard.core.tensor import Tensor, concat
from reshard.errors import Unsupported, listed
from reshard.formats import huggingface, megatron_settings, token_count
from reshard.formats.megatron_settings import Settings
from reshard.storage.unpickle import Inert

MODEL_CONFIG = "model_config.yaml"
HPARAMS = "hparams.yaml"

_DEFAULTS: Mapping[str, Any] = {
    "rotary_base": 10000,
    "rotary_percentage": 1.0,
    "position_embedding_type": "learned_absolute",
    "normalization": "layernorm",
    "layernorm_epsilon": 1e-5,
    "activation": "gelu",
    "bias": True,
    "qkv_bias": False,
    "share_embeddings_and_output_weights": True,
    "apply_embedding_scaling": False,
}
"""What NeMo 1's code takes for what a YAML leaves out."""

_EXPERT_DEFAULTS: Mapping[str, Any] = {"moe_router_topk": 2, "moe_router_pre_softmax": False, "moe_aux_loss_coeff": 0.0}

_RENAMED = {
    "encoder_seq_length": "seq_length",
    "rotary_percentage": "rotary_percent",
    "bias": "add_bias_linear",
    "qkv_bias": "add_qkv_bias",
    "override_vocab_size": "vocab_size",
}
"""NeMo 1's field: the setting. Fields that are not listed have the setting's own name."""

_LLAMA31 = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
"""Of a scaled rotary embedding, with NeMo's defaults; ignored unless scale_positional_embedding is set."""

_NORMS = {
    "rmsnorm": ("RMSNorm", False),
    "layernorm": ("LayerNorm", False),
    "low_precision_layernorm": ("LayerNorm", False),
    "layernorm1p": ("LayerNorm", True),
}
"""(normalization, layernorm_zero_centered_gamma); NeMo 1 does not mind capitals."""

_ACTIVATIONS = {
    "gelu": ("gelu", False),
    "geglu": ("gelu", True),
    "fast-geglu": ("gelu", True),
    "reglu": ("relu", True),
    "fast-reglu": ("relu", True),
    "swiglu": ("silu", True),
    "fast-swiglu": ("silu", True),
    "squared-relu": ("squared_relu", False),
}
"""(activation_func, gated_linear_unit)."""

_NOT_SETTINGS = frozenset(
    {"activation", "name", "target", "precision", "tokenizer", "data", "optim", "nsys_profile", "nemo_version", "peft",
     "scale_positional_embedding", "mcore_customization_config", "mcore_gpt", "model_class", "hf_model_id", "_target_",
     "activation_func", "params_dtype", "rope_scaling", "rope_scaling_factor", *_LLAMA31}
)  # fmt: skip
"""Fields that are read on their own, or that mean something else than the setting of their name."""

_COMPUTED = {
    "transformer_block_type": "pre_ln",
    "megatron_legacy": False,
    "headscale": False,
    "use_emha": False,
    "normalize_attention_scores": True,
}
"""What all models that can be converted have in common."""

_INTERPOLATION = re.compile(r"\$\{\s*\.?(?:model\.|cfg\.)?(\w+)\s*\}")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer that a configuration names."""

    files: Mapping[str, Path]
    """Those that lie beside it, by the names that HuggingFace has for them."""
    hub: str | None = None
    """The name of a tokenizer on the hub, whose files NeMo 1 does not keep."""
    is_plain: bool = True
    """Whether the tokens are those of the files, and no more."""
    lost: tuple[str, ...] = ()
    """Files that are named and not there."""


def settings_of(path: Path) -> Settings:
    """The settings in a model_config.yaml or hparams.yaml. Raises Corrupt when it is none, Unsupported for a model
    that is no GPT's."""
    document = megatron_settings.read_yaml(path)
    found = _settings(document.get("cfg", document) if path.name == HPARAMS else document, str(path))
    tokenizer = tokenizer_of(path)
    listing = next((tokenizer.files[n] for n in ("tokenizer.model", "tokenizer.json") if n in tokenizer.files), None)
    count = token_count.count(listing) if listing is not None and tokenizer.is_plain else None
    return replace(found, vocab_size=count, tokenizer=tokenizer.hub, notices=_lacking(tokenizer))


def settings_among(values: Mapping[Any, Any], where: str) -> Settings | None:
    """The settings among what Lightning keeps in a training checkpoint; None where there are none."""
    hyper = _plain(values.get("hyper_parameters"))
    found = hyper.get("cfg", hyper) if isinstance(hyper, Mapping) else None
    if not isinstance(found, Mapping) or "num_layers" not in found:
        return None
    return replace(_settings(found, where), source="hyper_parameters")


def _settings(document: Mapping[str, Any], where: str) -> Settings:
    if not isinstance(document, Mapping) or "hidden_size" not in document:
        _refuse_others(document if isinstance(document, Mapping) else {}, where)
        raise Unsupported(f"{where} describes no language model: it has no hidden_size")
    _refuse_others(document, where)
    stated = {name: _resolved(document, value) for name, value in document.items()}
    stated = {name: value for name, value in stated.items() if value is not None and value != "???"}
    stated = {**_DEFAULTS, **(_EXPERT_DEFAULTS if stated.get("num_moe_experts") else {}), **stated}
    values = {_RENAMED.get(name, name): value for name, value in stated.items() if _is_setting(name, value)}
    for derive in (_attention, _norm, _activation, _window, _scaling, _fp8):
        values |= derive(stated, where)
    more = stated.get("mcore_customization_config")
    if more is not None and not isinstance(more, Mapping):
        raise Unsupported(f"{where}: the mcore_customization_config {more!r:.60} is no mapping")
    values |= {str(name): value for name, value in more.items()} if isinstance(more, Mapping) else {}
    _check_numbers(values, where)
    _check_flags(values, where)
    _check_computed(stated, where)
    return megatron_settings.settings(values, MODEL_CONFIG, None)


def _is_setting(name: str, value: Any) -> bool:
    return name not in _NOT_SETTINGS and not isinstance(value, Mapping)


def _refuse_others(document: Mapping[str, Any], where: str) -> None:
    """Raise Unsupported for models that are no GPT's, and for adapters."""
    target = document.get("target")
    if isinstance(target, str) and not re.search(r"megatron_?gpt|MegatronGPT|megatrongpt", target, re.IGNORECASE):
        raise Unsupported(f"{where}: a {target.rpartition('.')[2][:100]} is not read, MegatronGPTModel is",
                          hint="NeMo's own script for this model converts it")  # fmt: skip
    if isinstance(document.get("peft"), Mapping) and document["peft"].get("restore_from_path"):
        raise Unsupported(f"{where}: an adapter, which is nothing without its base model",
                          hint="merge it with NeMo's merge_lora_weights script first")  # fmt: skip


def _resolved(document: Mapping[str, Any], value: Any) -> Any:
    """A value that only says where another one is: OmegaConf's `${.name}`."""
    for _ in range(8):
        match = _INTERPOLATION.fullmatch(value) if isinstance(value, str) else None
        if match is None or match[1] not in document:
            break
        value = document[match[1]]
    return value


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
    wrong = [
        f"{name} {values[name]!r:.100}"
        for name in _NUMBERS
        if values.get(name) is not None and (type(values[name]) not in (int, float) or not abs(values[name]) < math.inf)
    ]
    if wrong:
        raise Unsupported(f"{where}: numbers were expected for {listed(wrong)}",
                          hint="write the numbers in: OmegaConf would compute them")  # fmt: skip


_NUMBERS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "seq_length", "max_position_embeddings", "rotary_base", "rotary_percent", "seq_len_interpolation_factor",
    "rope_scaling_factor", "low_freq_factor", "high_freq_factor", "old_context_len", "layernorm_epsilon",
    "init_method_std", "vocab_size", "make_vocab_size_divisible_by", "num_moe_experts", "moe_router_topk",
    "moe_ffn_hidden_size", "moe_aux_loss_coeff",
)  # fmt: skip
_FLAGS = ("share_embeddings_and_output_weights", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
          "apply_embedding_scaling", "rotary_interleaved", "moe_router_pre_softmax")  # fmt: skip


def _check_flags(values: Mapping[str, Any], where: str) -> None:
    wrong = [f"{name} {values[name]!r:.100}" for name in _FLAGS if not isinstance(values.get(name, False), bool)]
    if wrong:
        raise Unsupported(f"{where}: true or false was expected for {listed(wrong)}")


def _check_computed(stated: Mapping[str, Any], where: str) -> None:
    other = [f"{name} {stated[name]!r:.60}" for name, value in _COMPUTED.items() if stated.get(name, value) != value]
    if other:
        raise Unsupported(f"{where}: models with {listed(other)} compute what no other format says")


# ------------------------------------------------------------------------------------------------------ one to many


def _attention(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads, hidden = stated.get("num_attention_heads"), stated.get("hidden_size")
    if type(heads) is not int or type(hidden) is not int or heads <= 0:
        return {}
    return {
        "num_query_groups": stated.get("num_query_groups") or heads,
        "kv_channels": stated.get("kv_channels") or hidden // heads,
        "ffn_hidden_size": stated.get("ffn_hidden_size") or 4 * hidden,
    }


def _norm(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    name = str(stated["normalization"]).lower()
    if name not in _NORMS:
        raise Unsupported(f"{where}: the normalization {stated['normalization']!r:.60} is not one of {listed(_NORMS)}")
    kind, is_centered = _NORMS[name]
    is_centered = is_centered or stated.get("layernorm_zero_centered_gamma") is True
    return {"normalization": kind, "layernorm_zero_centered_gamma": is_centered}


def _activation(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(stated["activation"], str) or stated["activation"] not in _ACTIVATIONS:
        raise Unsupported(f"{where}: the activation {stated['activation']!r:.60} is not one of {listed(_ACTIVATIONS)}")
    function, is_gated = _ACTIVATIONS[stated["activation"]]
    return {
        "activation_func": "openai_gelu" if stated.get("openai_gelu") is True else function,
        "gated_linear_unit": is_gated,
    }


def _window(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """NeMo counts a token's own place into its window."""
    window = stated.get("window_size")
    if isinstance(window, list) and window[:1] == [None]:  # NeMo's importer writes [null, 0] for a model without one
        return {"window_size": None}
    if not isinstance(window, list) or len(window) != 2 or type(window[0]) is not int:
        return {}
    return {"window_size": [window[0] - 1 if window[0] > 0 else window[0], window[1]]}


def _scaling(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    if stated.get("scale_positional_embedding") is not True:
        return {"rope_scaling": False}
    values = {name: stated.get(name, default) for name, default in _LLAMA31.items()}
    return {**values, "rope_scaling": True, "rope_scaling_factor": values["scale_factor"]}


def _fp8(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    if stated.get("fp8") is not True:
        return {"fp8": None}
    return {"fp8": "e4m3" if stated.get("fp8_e4m3") is True else "hybrid"}


# ------------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer that a model_config.yaml or hparams.yaml names."""
    document = megatron_settings.read_yaml(path)
    inner = document.get("cfg", document) if path.name == HPARAMS else document
    said = inner.get("tokenizer") if isinstance(inner, Mapping) else None
    said = said if isinstance(said, Mapping) else {}
    keys = {"model": "tokenizer.model", "vocab_file": "vocab.json", "merge_file": "merges.txt",
            "tokenizer_model": "tokenizer.model"}  # fmt: skip
    stated = {key: said[key] for key in keys if isinstance(said.get(key), str) and said[key] not in ("", "???")}
    found = {key: place for key, value in stated.items() if (place := _artifact(path, value)) is not None}
    if "merge_file" not in found:
        keys["vocab_file"] = TIKTOKEN if said.get("library") == "tiktoken" else ""
    files: dict[str, Path] = {}
    for key, place in found.items():
        files.setdefault(_name_here(path, place, keys[key]), place)
    hub = said.get("type")
    is_hub = said.get("library") == "huggingface" and isinstance(hub, str)
    is_plain = not (said.get("special_tokens") or said.get("additional_special_tokens"))
    lost = tuple(dict.fromkeys(stated[key][:300] for key in stated if key not in found))
    return Tokenizer(files, hub[:300] if is_hub and isinstance(hub, str) and not files else None, is_plain, lost)


TIKTOKEN = "tiktoken_vocab.json"
"""The name here of what NeMo reads with tiktoken: a list of tokens with their bytes."""
_HASH = re.compile(r"^[0-9a-f]{32}_(?=\w)")
_OTHERS = re.compile(r"(.*config|reshard|.*\.index)\.json|.*\.(safetensors|bin|pt|py)")
"""What other files of a model are called."""


def _name_here(path: Path, place: Path, usual: str) -> str:
    """What a tokenizer's file is called in an output. Raises Unsupported for the name of another part of a model."""
    kept = _HASH.sub("", place.name)
    name = "tokenizer.json" if kept.endswith("tokenizer.json") else usual or kept
    if _OTHERS.fullmatch(name):
        raise Unsupported(f"{path}: a file of the tokenizer is called {place.name!r:.300}, as no vocabulary is")
    return name


def _artifact(path: Path, said: str) -> Path | None:
    """A file beside the YAML, by `nemo:NAME` or a path of which it has the last part: nothing else is looked at."""
    name = PurePosixPath(said.removeprefix("nemo:")).name
    if not name or (path.parent / name).is_symlink() or not (path.parent / name).is_file():
        return None
    return path.parent / name


def assets(path: Path) -> dict[str, Tensor]:
    """The files of the tokenizer that a model_config.yaml names, to be carried byte for byte."""
    return {name: huggingface.asset(file) for name, file in tokenizer_of(path).files.items()}


def _lacking(found: Tokenizer) -> tuple[str, ...]:
    """What of a tokenizer that is named does not come along, in sentences."""
    said = []
    if found.lost:
        said.append(f"the YAML names files of a tokenizer that are not beside it: {listed(found.lost)}")
    if not found.files and found.hub is not None:
        said.append(
            f"the tokenizer is {found.hub} on the hub, and the archive has none of its files: only the name is taken "
            "over, and nothing tells which tokens begin and end a text"
        )
    if found.files and not found.files.keys() & {"tokenizer.model", "tokenizer.json", TIKTOKEN}:
        said.append(f"the tokenizer is {listed(found.files)}, of a kind that NeMo 2 has to be told: --tokenizer-path")
    if TIKTOKEN in found.files:
        said.append(f"the tokenizer is one of tiktoken, which transformers does not read: {TIKTOKEN} is for NeMo")
    if found.files and not found.is_plain:
        said.append("the YAML adds special tokens to those in the tokenizer's files: only the files are taken over")
    return tuple(said)


# --------------------------------------------------------------------------------------------- before Megatron-Core

_BEFORE_CORE = re.compile(r"model\.(?:module\.)*(?:language_model\.(?:encoder\.)?(?P<name>.+)|word_embeddings\.weight)")
_LAYER_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "self_attention.query_key_value.": "self_attention.linear_qkv.",
    "self_attention.dense.": "self_attention.linear_proj.",
    "post_attention_layernorm.": "mlp.linear_fc1.layer_norm_",
    "mlp.dense_h_to_4h.": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h.": "mlp.linear_fc2.",
}
_UP = ".mlp.dense_h_to_4h_2."


def is_before_core(name: str) -> bool:
    """Whether a tensor has the name that NeMo 1's own model gave it, before it had Megatron-Core's."""
    return _BEFORE_CORE.fullmatch(name) is not None


def to_core(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of one rank under Megatron-Core's names.

    The two halves of a gated MLP become one tensor, rows of the gate first. Raises Unsupported, listing all, for names
    that have no other.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        core = _core_name(name)
        if core is None and _UP not in name and not name.endswith(".inv_freq"):
            unknown.append(name)
        elif core is not None:
            up = tensors.get(name.replace(".mlp.dense_h_to_4h.", _UP)) if ".mlp.dense_h_to_4h." in name else None
            found[core] = tensor if up is None else concat([tensor, up], 0)
    if unknown:
        raise Unsupported(f"{where}: a model from before Megatron-Core, with tensors that it has no names for: "
                          f"{listed(unknown)}", hint="NeMo's convert_gpt_nemo_to_mcore.py may convert it")  # fmt: skip
    return found


def _core_name(name: str) -> str | None:
    match = _BEFORE_CORE.fullmatch(name)
    if match is None:
        return None
    if match["name"] is None:  # a tied embedding, once more on the last stage
        return "model.output_layer.weight"
    if not match["name"].startswith("layers."):
        known = ("embedding.word_embeddings.", "embedding.position_embeddings.", "output_layer.", "final_layernorm.")
        inner = "decoder." if match["name"].startswith("final_layernorm.") else ""
        return f"model.{inner}{match['name']}" if match["name"].startswith(known) else None
    _, number, rest = match["name"].split(".", 2)
    first = next((old for old in _LAYER_NAMES if rest.startswith(old)), None)
    if first is None or rest not in (f"{first}weight", f"{first}bias"):
        return None
    return f"model.decoder.layers.{number}.{_LAYER_NAMES[first]}{rest.removeprefix(first)}"


# -------------------------------------------------------------------------------------------------------- OmegaConf


def _plain(value: Any, depth: int = 0) -> Any:
    """An inert DictConfig, ListConfig or node of theirs as the values that it holds."""
    if depth > 16:
        return None
    if isinstance(value, Inert):
        content = value.attr("_content")
        return _plain(content if content is not None else value.attr("_val"), depth + 1)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else None
