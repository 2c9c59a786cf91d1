"""Half-open hyper-rectangles, the coordinates of every read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """The elements `start <= index < stop` of a tensor. An empty box has `start == stop` somewhere."""

    start: Shape
    stop: Shape

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"box of rank {len(self.start)} and {len(self.stop)}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box of all elements of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def at(cls, start: Sequence[int], shape: Sequence[int]) -> Box:
        """The box of this shape whose first element is `start`."""
        return cls(tuple(start), tuple([a + n for a, n in zip(start, shape, strict=True)]))

    @property
    def shape(self) -> Shape:
        return tuple([b - a for a, b in zip(self.start, self.stop)])  # noqa: B905 (hot, and equal by construction)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes a numpy array to this box."""
        return tuple([slice(a, b) for a, b in zip(self.start, self.stop)])  # noqa: B905

    def __and__(self, other: Box) -> Box | None:
        """The common elements, or None when there are none."""
        start = tuple([a if a > b else b for a, b in zip(self.start, other.start)])  # noqa: B905
        stop = tuple([a if a < b else b for a, b in zip(self.stop, other.stop)])  # noqa: B905
        for a, b in zip(start, stop):  # noqa: B905
            if a >= b:
                return None
        return Box(start, stop)

    def __contains__(self, other: Box) -> bool:
        return all(a <= c and d <= b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True))

    def shift(self, offset: Sequence[int]) -> Box:
        """The same box seen from an origin moved by `offset`: coordinates grow by it."""
        return Box(
            tuple([a + o for a, o in zip(self.start, offset)]),  # noqa: B905
            tuple([b + o for b, o in zip(self.stop, offset)]),  # noqa: B905
        )

    def permute(self, dims: Sequence[int]) -> Box:
        """The box in coordinates reordered as `dims` says."""
        return Box(tuple(self.start[d] for d in dims), tuple(self.stop[d] for d in dims))

    def runs(self, limit: int) -> Iterator[Box]:
        """This box in row-major order, cut into boxes of at most `limit` elements, each contiguous in that order."""
        shape = self.shape
        if math.prod(shape) <= max(limit, 1):
            if math.prod(shape) or not shape:
                yield self
            return
        dim, inner = len(shape) - 1, 1
        while inner * shape[dim] <= limit:
            inner *= shape[dim]
            dim -= 1
        step = max(limit // inner, 1)
        for outer in _indices(self.start[:dim], self.stop[:dim]):
            for first in range(self.start[dim], self.stop[dim], step):
                last = min(first + step, self.stop[dim])
                yield Box(
                    (*outer, first, *self.start[dim + 1 :]),
                    (*(i + 1 for i in outer), last, *self.stop[dim + 1 :]),
                )


def _indices(start: Shape, stop: Shape) -> Iterator[Shape]:
    if not start:
        yield ()
        return
    for head in range(start[0], stop[0]):
        for tail in _indices(start[1:], stop[1:]):
            yield (head, *tail)
