"""Meshes and placements: which part of a tensor one rank holds.

The rules are torch's (`torch.distributed.tensor`, 2.4 to 2.15): `Shard(d)` cuts like `torch.chunk`, pieces of
`ceil(n / k)` of which the last are short or empty. A `StridedShard(d, split)` first cuts what is left into `split`
pieces, each of those into `k`, and takes one of each: the rows are not contiguous. When the axes after it shard the
same dimension `split` ways, it means *those cut first* (tensor parallel, then FSDP over it). The two readings differ
only for sizes that do not divide: training does the second, `distribute_tensor` on such placements does the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from reshard.core.box import Box, Shape


@dataclass(frozen=True, slots=True)
class Shard:
    """Cut along a dimension."""

    dim: int


@dataclass(frozen=True, slots=True)
class StridedShard:
    """Cut along a dimension that is already thought of as `split` pieces."""

    dim: int
    split: int


@dataclass(frozen=True, slots=True)
class Replicate:
    """The same on every rank of the axis."""


Placement: TypeAlias = Shard | StridedShard | Replicate


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes of ranks, outermost first."""

    sizes: Shape
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.sizes, default=1) < 1:
            raise ValueError(f"mesh of sizes {list(self.sizes)}")

    @property
    def num_ranks(self) -> int:
        return math.prod(self.sizes)

    def __str__(self) -> str:
        names = self.names or tuple(f"axis{i}" for i in range(len(self.sizes)))
        return " x ".join(f"{name}={size}" for name, size in zip(names, self.sizes, strict=True))


Ranges: TypeAlias = list[tuple[int, int]]
"""Half-open index ranges of one dimension, in the order in which a rank stores them."""


def shard(
    shape: Shape, mesh: Mesh, placements: Sequence[Placement], coordinate: Sequence[int], *, literal: bool = False
) -> list[tuple[Box, Box]]:
    """What the rank at `coordinate` holds of a tensor: pairs of (place in the tensor, place in the rank's own).

    With `literal`, every StridedShard cuts as it says, from left to right; without, some mean *the later axes first*.
    """
    ranges: list[Ranges] = [[(0, n)] for n in shape]
    for axis in range(len(placements)) if literal else _order(placements, mesh):
        placement, k, c = placements[axis], mesh.sizes[axis], coordinate[axis]
        match placement:
            case Replicate():
                pass
            case Shard(dim):
                ranges[dim] = _chunk(ranges[dim], k, c)
            case StridedShard(dim, _) if not literal and _is_plain(placement, axis, placements, mesh):
                ranges[dim] = _chunk(ranges[dim], k, c)
            case StridedShard(dim, split):
                pieces = [_chunk(ranges[dim], split, i) for i in range(split)]
                ranges[dim] = [r for piece in pieces for r in _chunk(piece, k, c)]
            case _:
                raise AssertionError(placement)
    return list(_boxes(ranges))


def local_shape(pieces: Sequence[tuple[Box, Box]], shape: Shape) -> Shape:
    """The shape that holds all `pieces` of `shard`'s answer; zeros when there are none."""
    if not pieces:
        return (0,) * len(shape)
    return tuple(max(mine.stop[d] for _, mine in pieces) for d in range(len(shape)))


def _order(placements: Sequence[Placement], mesh: Mesh) -> list[int]:
    """Axes in the order in which they cut: strided ones that stand for *the later axes first* come after those."""
    late = [i for i, p in enumerate(placements) if isinstance(p, StridedShard) and _is_plain(p, i, placements, mesh)]
    return [i for i in range(len(placements)) if i not in late] + late[::-1]


def _is_plain(placement: Placement, axis: int, placements: Sequence[Placement], mesh: Mesh) -> bool:
    if not isinstance(placement, StridedShard):
        return True
    later = [i for i in range(axis + 1, len(placements)) if getattr(placements[i], "dim", None) == placement.dim]
    return bool(later) and math.prod(mesh.sizes[i] for i in later) == placement.split


def _chunk(ranges: Ranges, k: int, index: int) -> Ranges:
    """Piece `index` of `k`, cut as torch.chunk does, of the concatenation of the ranges."""
    length = sum(b - a for a, b in ranges)
    size = -(-length // k)
    first, last = min(index * size, length), min((index + 1) * size, length)
    out, at = [], 0
    for a, b in ranges:
        lo, hi = max(first, at), min(last, at + b - a)
        if lo < hi:
            out.append((a + lo - at, a + hi - at))
        at += b - a
    return out


def _boxes(ranges: list[Ranges]) -> Iterator[tuple[Box, Box]]:
    """Boxes of all combinations of ranges, and where each lies in the rank's own tensor."""
    placed = []
    for dim in ranges:
        starts = itertools.accumulate((b - a for a, b in dim), initial=0)
        placed.append([(a, b, at) for (a, b), at in zip(dim, starts, strict=False)])
    for combination in itertools.product(*placed):
        there = Box(tuple(a for a, _, _ in combination), tuple(b for _, b, _ in combination))
        here = Box.at(tuple(at for _, _, at in combination), there.shape)
        yield there, here
