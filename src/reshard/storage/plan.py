"""Plans: which bytes go where, as a value.

A plan is made without I/O and says everything about the output: files, each tiled exactly by segments, each segment
constant bytes, a tensor's data, or a `Seal`: bytes of known length that depend on the digests of others (a zip's
checksums, our manifest). Printing a plan is the dry run; `run.py` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from reshard.core.box import Box
from reshard.core.tensor import Tensor, leaves


@dataclass(frozen=True, slots=True)
class Digest:
    """Of one segment as it was written."""

    xxh3_128: str
    """32 hexadecimal digits."""
    crc32: int = 0
    """Where the file asked for it."""


Digests: TypeAlias = Mapping[tuple[str, int], Digest]
"""By (path of the file in the plan, index of the segment in it)."""


@dataclass(frozen=True, slots=True)
class Seal:
    """Bytes that are known when the digests of other segments are."""

    nbytes: int
    make: Callable[[Digests], bytes] = field(repr=False)


Payload: TypeAlias = bytes | Tensor | Seal


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Some bytes of a file."""

    payload: Payload = field(repr=False)
    name: str = ""
    """The FQN, where the payload is a tensor of the model."""

    @property
    def nbytes(self) -> int:
        return len(self.payload) if isinstance(self.payload, bytes) else self.payload.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class FilePlan:
    """One file: segments back to back."""

    path: str
    """Relative to the output directory, with forward slashes; empty when the output is this one file."""
    segments: tuple[Segment, ...]
    crc32: bool = False
    """Whether the segments' CRC-32 are wanted too."""

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.segments)

    def placed(self) -> Iterator[tuple[int, int, Segment]]:
        """(index, offset in the file, segment)."""
        offset = 0
        for index, segment in enumerate(self.segments):
            yield index, offset, segment
            offset += segment.nbytes


@dataclass(frozen=True, eq=False)
class Plan:
    """All files of an output. A file whose path is empty is the output itself; others then lie beside it."""

    files: tuple[FilePlan, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest: the source, the options, the output's format."""

    def __post_init__(self) -> None:
        paths = [f.path for f in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError(f"two files of one path in a plan: {sorted(paths)}")

    @property
    def nbytes(self) -> int:
        """Bytes to be written."""
        return sum(f.nbytes for f in self.files)

    @property
    def is_one_file(self) -> bool:
        return any(f.path == "" for f in self.files)

    def tensors(self) -> Iterator[tuple[FilePlan, int, int, str, Tensor]]:
        """(file, segment's index, offset, FQN, tensor) of every segment that holds a tensor."""
        for file in self.files:
            for index, offset, segment in file.placed():
                if isinstance(segment.payload, Tensor):
                    yield file, index, offset, segment.name, segment.payload

    def sources(self) -> list[str]:
        """Paths of all files that the tensors are read from, sorted."""
        return sorted({path for path, _ in self._read.values()})

    def read_nbytes(self) -> int:
        """Bytes of all extents that the tensors are made of, each counted once."""
        return sum(nbytes for _, nbytes in self._read.values())

    @cached_property
    def _read(self) -> Mapping[int, tuple[str, int]]:
        """(path, bytes that are read) by identity of the extent: one walk over what may be a million leaves."""
        found: dict[int, tuple[str, int]] = {}
        for *_, tensor in self.tensors():
            for leaf in leaves(tensor):
                found[id(leaf.extent)] = (leaf.extent.path, min(leaf.extent.nbytes, leaf.nbytes))
        return found

    def explain(self) -> Iterator[str]:
        """The plan in words, a line a file."""
        for file in self.files:
            tensors = sum(isinstance(s.payload, Tensor) and bool(s.name) for s in file.segments)
            yield f"{file.path or '(output)'}: {file.nbytes} bytes, {tensors} tensors"


def blocks(tensor: Tensor, limit_nbytes: int) -> Iterator[Box]:
    """The tensor in row-major order, cut into boxes of at most `limit_nbytes`."""
    return Box.whole(tensor.shape).runs(max(limit_nbytes // tensor.dtype.itemsize, 1))
