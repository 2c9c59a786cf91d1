"""What a Megatron model is, as plain values under one vocabulary, whoever wrote them down.

    run_config.yaml          Megatron-Bridge: the provider under `model:`
    context/model.yaml       NeMo 2: the config under `config:`
    transformer_config.json  verl
    args                     Megatron-LM: an argparse.Namespace in the checkpoint itself

The vocabulary is run_config.yaml's, which is Megatron-Core's `TransformerConfig` and what `GPTModelProvider` adds to
it. Classes, functions and enums that a file names become the last part of their name (`torch.nn.functional.silu` is
"silu", `torch.bfloat16` "bfloat16"), enums with a number that number or its name. Nothing is imported.

Source: Megatron-Bridge `training/utils/config_utils.py` and `utils/instantiate_utils.py`, Megatron-LM
`megatron/training/arguments.py:core_transformer_config_from_args`, core 0.8 to 0.20.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from reshard.errors import Corrupt, Unsupported
from reshard.formats.yaml_bounds import MAX_DEPTH, loaded
from reshard.storage.unpickle import Global, Inert, TensorRef, TorchDType

LIMIT_NBYTES = 16 << 20
"""Of a settings file; real ones have some 20 KiB."""
_MAX_NUM_VALUES = 1 << 17
"""Of a settings file with all aliases followed."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The mesh of the run that wrote a checkpoint, as its settings say."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    """Model chunks of a pipeline stage."""
    expert: int = 1
    expert_tensor: int | None = None
    context: int = 1

    def __str__(self) -> str:
        axes = {
            "tp": self.tensor, "pp": self.pipeline, "vpp": self.virtual_pipeline, "ep": self.expert,
            "etp": self.expert_tensor, "cp": self.context,
        }  # fmt: skip
        if axes["etp"] == self.tensor:
            del axes["etp"]
        return ", ".join(f"{axis} {n}" for axis, n in axes.items() if n is not None and n > 1) or "one rank's model"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a model, and what else they tell about the run."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """By run_config.yaml's names; empty when the checkpoint states none."""
    source: str = ""
    """`run_config.yaml`, `model.yaml`, `transformer_config.json`, `args`, or empty."""
    layout: Layout | None = None
    hf_model_id: str | None = None
    """The HuggingFace model that it was made from."""
    vocab_size: int | None = None
    """Of the tokenizer, where that is stated for certain: tensors may have more rows than this."""
    tokenizer: str | None = None
    """The name on the hub of a tokenizer whose files are not in the checkpoint."""
    notices: tuple[str, ...] = ()
    """What the reader saw that the user should know."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    def size(self, name: str) -> int | None:
        """A setting that counts something; None when it is not stated. Raises Corrupt when it is no such number."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < 1 << 48:
            raise Corrupt(f"the model's {name} is {value!r:.100} ({self.source}), a number was expected")
        return value


# --------------------------------------------------------------------------------------------------------- files


def of_run_config(path: Path) -> Settings:
    """Of Megatron-Bridge's run_config.yaml. Raises Corrupt when it is not one."""
    document = read_yaml(path)
    model, tokenizer = _mapping(document, "model", path), document.get("tokenizer")
    stated = tokenizer.get("vocab_size") if isinstance(tokenizer, Mapping) else None
    vocab_size = stated if type(stated) is int else None
    if vocab_size is None and model.get("should_pad_vocab") is False and type(model.get("vocab_size")) is int:
        vocab_size = model["vocab_size"]
    return settings(model, path.name, vocab_size)


def of_model_yaml(path: Path) -> Settings:
    """Of NeMo 2's context/model.yaml. Raises Corrupt when it is not one."""
    document = read_yaml(path)
    values = dict(_mapping(document, "config", path))
    if isinstance(document.get("_target_"), str):
        values["model_class"] = document["_target_"]
    return settings(values, path.name, None)


def of_transformer_config(path: Path) -> Settings:
    """Of verl's transformer_config.json. Raises Corrupt when it is not one."""
    try:
        document = json.loads(_bounded(path))
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise Corrupt(f"{path} holds a {type(document).__name__}, an object was expected")
    return settings(plain(document), path.name, None)


def settings(values: Mapping[str, Any], source: str, vocab_size: int | None) -> Settings:
    """Settings, with what they say of the mesh and of the model on the hub."""
    model_id = values.get("hf_model_id")
    return Settings(values, source, _layout(values), model_id if isinstance(model_id, str) else None, vocab_size)


def _layout(values: Mapping[str, Any]) -> Layout | None:
    def size(name: str) -> int | None:
        value = values.get(name)
        return value if type(value) is int and value > 0 else None

    if size("tensor_model_parallel_size") is None:
        return None
    return Layout(
        size("tensor_model_parallel_size") or 1,
        size("pipeline_model_parallel_size") or 1,
        size("virtual_pipeline_model_parallel_size"),
        size("expert_model_parallel_size") or 1,
        size("expert_tensor_parallel_size"),
        size("context_parallel_size") or 1,
    )


def _bounded(path: Path) -> bytes:
    if path.stat().st_size > LIMIT_NBYTES:
        raise Unsupported(f"{path} has {path.stat().st_size} bytes, settings have a few thousand")
    return path.read_bytes()


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The document, reduced to plain values. Tags that name Python objects are looked through, never followed."""
    try:
        document = plain(loaded(_bounded(path), _Loader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Corrupt(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise Corrupt(f"{path} holds a {type(document).__name__}, a mapping was expected")
    return document


def _mapping(document: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    found = document.get(name)
    if not isinstance(found, Mapping):
        raise Corrupt(f"{path} has no mapping `{name}:`: {', '.join(map(str, list(document)[:10]))}")
    return found


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A safe loader that takes `1e-6` for a number, as YAML 1.2 does, and knows no tag as anything but its value."""


def _untagged(loader: Any, _: str, node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


_Loader.add_multi_constructor("", _untagged)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


# ------------------------------------------------------------------------------------------------------ plain values


def plain(value: Any) -> Any:
    """A value of YAML, JSON or an inert pickle as plain Python. Raises ValueError when it is without bounds."""
    left = _MAX_NUM_VALUES

    def reduced(item: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise ValueError("its values refer to each other over and over")
        if isinstance(item, Mapping):
            inner = {str(key): reduced(child, depth + 1) for key, child in item.items()}
            return _target(inner) if "_target_" in inner else inner
        if isinstance(item, list | tuple | set | frozenset):
            return [reduced(child, depth + 1) for child in item]
        return _scalar(item)

    return reduced(value, 0)


def _target(made: dict[str, Any]) -> Any:
    """What `_target_` would make: an enum's name or number, a class or function's own name; else its arguments."""
    target, args = made["_target_"], made.get("_args_")
    if not isinstance(target, str):
        return made
    if isinstance(made.get("_name_"), str):
        return made["_name_"]
    if made.keys() <= {"_target_", "_args_", "_call_", "_partial_", "_name_"}:
        only = args[0] if isinstance(args, list) and len(args) == 1 else None
        return only if isinstance(only, str | int | float) else target.rpartition(".")[2]
    return made


def _scalar(item: Any) -> Any:
    if isinstance(item, TorchDType):
        return item.name
    if isinstance(item, Global):
        return item.name.rpartition(".")[2]
    if isinstance(item, TensorRef):
        return None
    if isinstance(
        item, Inert
    ):  # an enum is made by calling its class with a number; paths and the like have no use here
        only = item.args[0] if len(item.args) == 1 else None
        return only if isinstance(only, str | int | float) else item.cls.name.rpartition(".")[2]
    return item if isinstance(item, str | int | float | bool | None) else str(item)[:100]


# -------------------------------------------------------------------------------------------------------------- args

_RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
    "hybrid_override_pattern": "hybrid_layer_pattern",
}
"""Megatron-LM's argument: the setting. Arguments that are not listed have the setting's own name."""

_NEGATED = {
    "untie_embeddings_and_output_weights": "share_embeddings_and_output_weights",
    "disable_bias_linear": "add_bias_linear",
}

_ACTIVATIONS = (
    ("swiglu", "silu", True),
    ("quick_geglu", "quick_gelu", True),
    ("squared_relu", "squared_relu", False),
    ("openai_gelu", "openai_gelu", False),
)
"""(flag, activation_func, gated_linear_unit); GELU without a gate when none is set."""

_OTHERS = frozenset({"vocab_size", "rank", "local_rank"})
"""Arguments that mean something else than the setting of that name, or nothing to a model."""


def of_args(args: Any) -> Settings:
    """Of Megatron-LM's arguments, a Namespace read inert or a dict.

    `padded_vocab_size` is the number of rows of the embedding; the tokenizer's own number is not among the arguments
    unless the tokenizer needs no files.
    """
    state = args.state if isinstance(args, Inert) else args
    if not isinstance(state, Mapping):
        raise Corrupt(f"the checkpoint's args are a {type(args).__name__} without values, a Namespace was expected")
    try:
        given: dict[str, Any] = {str(name): plain(value) for name, value in state.items()}
    except ValueError as error:
        raise Corrupt(f"the checkpoint's args: {error}") from error
    values = {name: value for name, value in given.items() if name not in _OTHERS | _RENAMED.keys() | _NEGATED.keys()}
    values |= {
        new: given[old]
        for old, new in _RENAMED.items()
        if given.get(old) is not None or (old in given and new not in given)
    }
    values |= {new: not given[old] for old, new in _NEGATED.items() if isinstance(given.get(old), bool)}
    for derive in (_activation, _attention, _positions):
        values |= derive(given)
    return Settings(values, "args", _layout(values), None, _null_vocabulary(given))


def _activation(given: Mapping[str, Any]) -> dict[str, Any]:
    if not any(flag in given for flag, *_ in _ACTIVATIONS):
        return {}
    flag = next((row for row in _ACTIVATIONS if given.get(row[0]) is True), None)
    _, function, gated = flag or ("", "gelu", False)
    return {"activation_func": function, "gated_linear_unit": gated}


def _attention(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without grouped queries `num_query_groups` is 1 and means nothing: there is a group for each head."""
    found: dict[str, Any] = {}
    heads, hidden = given.get("num_attention_heads"), given.get("hidden_size")
    if given.get("group_query_attention") is False and type(heads) is int:
        found["num_query_groups"] = heads
    if given.get("kv_channels") is None and type(heads) is int and type(hidden) is int and heads > 0:
        found["kv_channels"] = hidden // heads
    if given.get("ffn_hidden_size") is None and type(hidden) is int:
        found["ffn_hidden_size"] = 4 * hidden
    return found


def _positions(given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("use_rotary_position_embeddings") is True:
        return {"position_embedding_type": "rope"}
    return {}


def _null_vocabulary(given: Mapping[str, Any]) -> int | None:
    """NullTokenizer is told its size, and has one token more, for the end of a document."""
    stated, padded = given.get("vocab_size"), given.get("padded_vocab_size")
    if given.get("tokenizer_type") != "NullTokenizer" or type(stated) is not int:
        return None
    return None if type(padded) is int and stated >= padded else stated + 1


def first_stated(*candidates: tuple[Path | None, Callable[[Path], Settings]]) -> Settings | None:
    """The settings of the first file that is there."""
    return next((read(path) for path, read in candidates if path is not None), None)
