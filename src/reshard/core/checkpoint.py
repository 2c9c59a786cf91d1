"""Checkpoints: what every format opens to and every operation takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from reshard.core.box import Box
from reshard.core.compute import view_numeric
from reshard.core.dtypes import DType
from reshard.core.tensor import Array, Deferred, Source, Tensor

KeyPath = tuple[str | int, ...]
"""How a tensor was nested in the state dict: `("model", "model.layers.0.weight")`. Keys may contain dots."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint was found and what wrote it."""

    path: Path
    """The directory or file that the format read."""
    format: str
    """The format's name, such as `dcp`."""
    writer: str = ""
    """Who wrote it, as far as its layout tells, such as `accelerate (FSDP)`."""
    step: int | None = None
    """Of training."""
    world_size: int | None = None
    """Number of ranks that wrote it."""
    placements: tuple[str, ...] = ()
    """How tensors were cut, in words, most frequent first."""
    files: tuple[Path, ...] = ()
    """The shards: what `--remove-shards` would remove and what a fingerprint covers."""


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of an open checkpoint, for people: nothing is read until `numpy()`."""

    tensor: Tensor
    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> DType:
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def __getitem__(self, index: Any) -> LazyTensor:
        """A part of it, still unread; integers, slices of step 1 and one `...`, as numpy's."""
        index = index if isinstance(index, tuple) else (index,)
        at = next((n for n, item in enumerate(index) if item is ...), None)
        if at is not None:
            rest = index[at + 1 :]
            index = (*index[:at], *[slice(None)] * (len(self.shape) - at - len(rest)), *rest)
        strange = [n for n in index if isinstance(n, bool) or not isinstance(n, int | slice | np.integer)]
        if strange:
            raise IndexError(f"{strange[0]!r} is no index of a stored tensor: integers, slices and one ... are")
        return LazyTensor(self.tensor[index], self.source)

    def numpy(self) -> Array:
        """Its elements, read now: just the bytes that this part needs. bfloat16 and fp8 are ml_dtypes' types."""
        return view_numeric(self.tensor.read(self.source, Box.whole(self.shape)), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype}, {list(self.shape)})"


@dataclass(frozen=True, slots=True)
class Checkpoint(Mapping[str, LazyTensor]):
    """A mapping of FQN to tensor, with what else lies beside the tensors.

    As a mapping it yields `LazyTensor`; `tensors` holds the nodes themselves.
    """

    tensors: Mapping[str, Tensor]
    origin: Origin
    source: Source
    """Reads the extents of the tensors; a checkpoint that is copied by operations keeps its own."""
    objects: Mapping[str, Any] = field(default_factory=dict)
    """What is not a tensor, by FQN, as inert values. May be lazy."""
    paths: Mapping[str, KeyPath] = field(default_factory=dict)
    """How each FQN was nested; `(fqn,)` where a name is missing."""
    config: Mapping[str, Any] | None = None
    """The model's config.json."""
    assets: Mapping[str, Tensor] = field(default_factory=dict)
    """Files to be carried byte for byte (tokenizer, generation config, ...) by name, as U8 tensors."""
    dialect: str = ""
    """How the weights are named and fused: `hf`, `transformers`, ... Empty when not known."""
    notices: tuple[str, ...] = ()
    """What the reader saw that the user should know."""
    locate: Callable[[Iterable[str]], Mapping[str, Tensor]] | None = field(default=None, repr=False)
    """Looks the headers of many tensors up at once, for formats that scatter them among the data."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def __getitem__(self, fqn: str) -> LazyTensor:
        return LazyTensor(self.tensors[fqn], self.source)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def path(self, fqn: str) -> KeyPath:
        """How this tensor was nested."""
        return self.paths.get(fqn, (fqn,))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        return sum(t.size for t in self.tensors.values())

    def select(self, fqns: Iterable[str]) -> Checkpoint:
        """Only these tensors, in this order."""
        return replace(self, tensors={fqn: self.tensors[fqn] for fqn in fqns})

    def located(self) -> Checkpoint:
        """The same with every header read, so that all that headers can reveal has been checked."""
        if self.locate is None:
            return self
        waiting = [fqn for fqn, tensor in self.tensors.items() if isinstance(tensor, Deferred)]
        return replace(self, tensors={**self.tensors, **self.locate(waiting)}, locate=None)


def same_bytes(a: Tensor, b: Tensor, source: Source, limit: int = 1 << 18) -> bool:
    """Whether two tensors hold the same bits, read block by block until they differ."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    for box in Box.whole(a.shape).runs(limit // a.dtype.itemsize):
        if not np.array_equal(a.read(source, box).reshape(-1).view("u1"), b.read(source, box).reshape(-1).view("u1")):
            return False
    return True
