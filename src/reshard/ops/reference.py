"""A HuggingFace model that only lends its names, dtypes, config and tokenizer: no value of it is ever read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reshard.core.box import Shape
from reshard.core.dtypes import DType
from reshard.core.tensor import Tensor
from reshard.errors import NotFound
from reshard.formats import huggingface
from reshard.storage import hub


@dataclass(frozen=True, slots=True)
class Reference:
    """What a conversion to HuggingFace goes by."""

    path: Path
    config: Mapping[str, Any]
    assets: Mapping[str, Tensor] = field(default_factory=dict)
    """Tokenizer and other files, carried byte for byte."""
    dtypes: Mapping[str, DType] = field(default_factory=dict)
    """Of every tensor; empty when there are no weights beside the config."""
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def read(name: str) -> Reference:
    """The reference at a directory or hub id, from config and headers. Raises NotFound without a config.json.

    A model that is published quantized stands for the model that it was made of.
    """
    path = hub.resolve(name, hint=_HINT) if not Path(name).is_file() else Path(name).parent
    config, assets = huggingface.companions(path)
    if config is None:
        raise NotFound(f"--hf-model {name}: there is no config.json in {path.resolve()}", hint=_HINT)
    config, methods = unquantized(config)
    notices = tuple(
        f"config.json: quantization_config {method} is left out: weights are written whole" for method in methods
    )
    tensors: Mapping[str, Tensor] = {}
    if huggingface.matches(frozenset(p.name for p in path.iterdir())):
        with suppress(NotFound):
            tensors = huggingface.open(path).tensors
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALES)}
    if any(is_packed(name, tensor.dtype) for name, tensor in tensors.items()):
        tensors = {}  # neither names nor shapes are those of the weights
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if not is_float8(tensor.dtype)}
    return Reference(path, config, assets, dtypes, {n: t.shape for n, t in tensors.items()}, notices)


_HINT = "--hf-model names a HuggingFace model: a directory with config.json in it, or a hub id"

SCALES = ("_scale_inv", ".weight_scale", ".input_scale")
"""Endings of tensors beside weights of 8 bits, whose names and shapes are those of the weights."""
_PACKED = re.compile(r".*(?:_blocks|_scales|\.qweight|\.qzeros|\.weight_packed|\.absmax|\.SCB)")


def is_packed(name: str, dtype: DType) -> bool:
    """Whether a tensor holds weights of which several share a byte, or belongs to such."""
    return bool(_PACKED.fullmatch(name)) or dtype.name in ("F4", "F8_E8M0")


def is_float8(dtype: DType) -> bool:
    """Whether a dtype is one of the floating-point types of a byte, which mean nothing without their scales."""
    return dtype.kind == "float" and dtype.itemsize == 1


def unquantized(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config of the model before it was quantized, and what to say of that."""
    methods = []
    plain: dict[str, Any] = {}
    for name, value in config.items():
        if name == "quantization_config":
            methods.append(str(value.get("quant_method", "")) if isinstance(value, Mapping) else "")
        elif name.endswith("_config") and isinstance(value, Mapping):
            plain[name], inner = unquantized(value)
            methods += inner
        else:
            plain[name] = value
    return plain, tuple(methods)
