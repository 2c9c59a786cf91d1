"""A HuggingFace model that only lends its names, dtypes, config and tokenizer: no value of it is ever read."""

from __future__ import annotations

from collections.abc import Mapping
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


def read(name: str) -> Reference:
    """The reference at a directory or hub id, from config and headers. Raises NotFound without a config.json."""
    path = hub.resolve(name)
    config, assets = huggingface.companions(path)
    if config is None:
        raise NotFound(f"{path} has no config.json", hint="--hf-model names a HuggingFace model directory or hub id")
    if not huggingface.matches(frozenset(p.name for p in path.iterdir())):
        return Reference(path, config, assets)
    try:
        tensors = huggingface.open(path).tensors
    except NotFound:
        return Reference(path, config, assets)
    return Reference(
        path, config, assets, {n: t.dtype for n, t in tensors.items()}, {n: t.shape for n, t in tensors.items()}
    )
