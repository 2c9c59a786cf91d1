"""Tensors: a dtype, a shape and one verb, *fill this box of yourself into this buffer*.

    tensor.read_into(box, out, source)

`box` is in the tensor's own coordinates. `out` is a writable numpy view of exactly the box's shape in the dtype's
`storage` type, owned by the caller, of any strides; every element of it is written exactly once. `source` shows the
bytes of extents. The destination travels down: each node hands views of `out` to its inputs, so numpy's strides do the
placing and nothing is copied twice.

    leaves      Stored (bytes of a file) · Filled (one value)
    movement    Slice · Concat (of boxes) · Permute · Flatten · Unflatten
    arithmetic  in `compute.py` and `mean.py`

Nodes are immutable and check themselves when they are made. In particular a Concat whose parts leave a hole or overlap
cannot exist, which is the proof that every output element has exactly one source.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from reshard.core.box import Box, Shape
from reshard.core.dtypes import DType
from reshard.errors import Corrupt, Incomplete

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Bytes of a file. Extents are compared by identity: a record that two tensors share is one Extent."""

    path: str
    offset: int
    """From the start of the file, in bytes."""
    nbytes: int
    crc32: int | None = None
    """Of all `nbytes`, where the container states it."""

    def __post_init__(self) -> None:
        if self.offset < 0 or self.nbytes < 0:
            raise Corrupt(f"{self.path}: an extent of {self.nbytes} bytes at offset {self.offset}")


class Source(Protocol):
    """Whoever can show bytes."""

    def read(self, extent: Extent, offset: int, out: Array) -> None:
        """Fill `out` (C-contiguous, any dtype) with the extent's bytes from `offset` on."""

    def scratch(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """A C-contiguous array to read into; its content is undefined."""


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """What every node is."""

    dtype: DType
    shape: Shape

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        """Fill `out` with the elements of `box`. See the module's docstring."""
        raise NotImplementedError

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that this one reads."""
        return ()

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self, source: Source, box: Box | None = None) -> Array:
        """The box (all of it by default) as a new array of the dtype's storage type."""
        box = box or Box.whole(self.shape)
        out: Array = np.empty(box.shape, self.dtype.storage)
        if box.size:
            self.read_into(box, out, source)
        return out

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> Tensor:
        """Basic indexing with step 1, as numpy's: an integer drops its dimension."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > len(self.shape):
            raise IndexError(f"{len(index)} indices for a tensor of shape {list(self.shape)}")
        start, stop, dropped = [], [], []
        for dim, size in enumerate(self.shape):
            item = index[dim] if dim < len(index) else slice(None)
            if isinstance(item, slice):
                first, last, step = item.indices(size)
                if step != 1:
                    raise IndexError("slices of a stored tensor have step 1")
                start.append(first)
                stop.append(max(first, last))
            else:
                if not -size <= item < size:
                    raise IndexError(f"index {item} is out of range for dimension {dim} of size {size}")
                start.append(item % size)
                stop.append(item % size + 1)
                dropped.append(dim)
        box = Box(tuple(start), tuple(stop))
        tensor: Tensor = self if box == Box.whole(self.shape) else Slice(self.dtype, box.shape, self, box.start)
        for dim in reversed(dropped):
            tensor = squeeze(tensor, dim)
        return tensor

    def permute(self, *dims: int) -> Tensor:
        """Dimensions reordered as `numpy.transpose` does."""
        if sorted(dims) != list(range(len(self.shape))):
            raise ValueError(f"permute{dims} of a tensor of shape {list(self.shape)}")
        if list(dims) == sorted(dims):
            return self
        return Permute(self.dtype, tuple(self.shape[d] for d in dims), self, dims)

    def flatten(self, first: int = 0, last: int = -1) -> Tensor:
        """Dimensions `first` to `last` (inclusive) merged into one, row-major."""
        last = last % len(self.shape) if self.shape else 0
        if not self.shape or first == last:
            return self if self.shape else Unflatten(self.dtype, (1,), self, 0, (1,))
        merged = math.prod(self.shape[first : last + 1])
        return Flatten(self.dtype, (*self.shape[:first], merged, *self.shape[last + 1 :]), self, first, last)

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Tensor:
        """Dimension `dim` cut into dimensions of `sizes`, row-major."""
        if not sizes or math.prod(sizes) != self.shape[dim]:
            raise ValueError(f"dimension {dim} of shape {list(self.shape)} into {list(sizes)}")
        shape = (*self.shape[:dim], *sizes, *self.shape[dim + 1 :])
        return Unflatten(self.dtype, shape, self, dim, tuple(sizes))

    def reshape(self, shape: Sequence[int]) -> Tensor:
        """Any other shape of the same number of elements, row-major."""
        shape = tuple(shape)
        if math.prod(shape) != self.size:
            raise ValueError(f"shape {list(self.shape)} into {list(shape)}")
        if shape == self.shape:
            return self
        flat = self.flatten() if len(self.shape) != 1 else self
        if shape == flat.shape:
            return flat
        return flat.unflatten(0, shape) if shape else squeeze(flat, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Stored(Tensor):
    """Elements that lie in a file, with any strides."""

    extent: Extent
    offset: int = 0
    """Of the first element, in elements from the start of the extent."""
    strides: Shape = ()
    """In elements; row-major by default."""
    dense: bool = field(init=False, repr=False, default=False)
    """Row-major and all of the extent: the hot path."""

    def __post_init__(self) -> None:
        contiguous = row_major(self.shape)
        if not self.strides or _is_row_major(self.shape, self.strides):  # of a dimension of 1 any stride will do
            object.__setattr__(self, "strides", contiguous)
        if len(self.strides) != len(self.shape):
            raise Corrupt(f"{self.extent.path}: {len(self.strides)} strides for shape {list(self.shape)}")
        if self.offset < 0 or min(self.strides, default=0) < 0:
            raise Corrupt(f"{self.extent.path}: negative stride or offset")
        if math.prod(self.shape):
            last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
            if (last + 1) * self.dtype.itemsize > self.extent.nbytes:
                raise Corrupt(
                    f"{self.extent.path}: a {self.dtype} tensor of shape {list(self.shape)}, strides "
                    f"{list(self.strides)} and offset {self.offset} reaches past its {self.extent.nbytes} stored bytes"
                )
        dense = self.strides == contiguous and self.offset == 0 and self.nbytes == self.extent.nbytes
        object.__setattr__(self, "dense", dense)

    def over(self, extent: Extent) -> Stored:
        """The same layout over another extent of as many bytes, checked already."""
        if extent.nbytes != self.extent.nbytes:
            raise Corrupt(f"{extent.path}: {extent.nbytes} bytes stored, {self.extent.nbytes} expected")
        twin = object.__new__(Stored)
        put = object.__setattr__  # the fields are frozen, and checked: this is made for each chunk of a checkpoint
        put(twin, "dtype", self.dtype)
        put(twin, "shape", self.shape)
        put(twin, "extent", extent)
        put(twin, "offset", self.offset)
        put(twin, "strides", self.strides)
        put(twin, "dense", self.dense)
        return twin

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        if self.dense and box.shape == self.shape and out.flags.c_contiguous:
            source.read(self.extent, 0, out)
            return
        self._read_span(box, out, source)

    def _read_span(self, box: Box, out: Array, source: Source) -> None:
        """Read from the box's first to its last element at once, unless that is mostly bytes of others: then halve."""
        shape, strides, itemsize = box.shape, self.strides, self.dtype.itemsize
        first, reach = self.offset, 1
        for start, n, stride in zip(box.start, shape, strides, strict=True):
            first += start * stride
            reach += (n - 1) * stride
        wanted = math.prod(shape)
        if wanted == 0:
            return
        if reach == wanted and out.flags.c_contiguous and _is_row_major(shape, strides):
            source.read(self.extent, first * itemsize, out)
        elif reach * itemsize <= _SPAN_NBYTES or reach <= 2 * wanted:
            span = source.scratch((reach,), self.dtype.storage)
            source.read(self.extent, first * itemsize, span)
            byte_strides = tuple(s * itemsize for s in strides)
            out[...] = np.lib.stride_tricks.as_strided(span, shape, byte_strides, writeable=False)
        else:
            dim = max((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: strides[d] * (shape[d] - 1))
            middle = box.start[dim] + shape[dim] // 2
            for part in _halves(box, dim, middle):
                self._read_span(part, out[part.shift([-a for a in box.start]).slices], source)


_SPAN_NBYTES = 1 << 18
"""A span of no more bytes than this is read whole, however few of them are wanted."""


@dataclass(frozen=True, slots=True, eq=False)
class Filled(Tensor):
    """One element, everywhere."""

    element: bytes

    def __post_init__(self) -> None:
        if len(self.element) != self.dtype.itemsize:
            raise ValueError(f"{len(self.element)} bytes for one {self.dtype}")

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        out[...] = np.frombuffer(self.element, self.dtype.storage)[0]


@dataclass(frozen=True, slots=True, eq=False)
class Literal(Tensor):
    """Elements held in memory, row-major: small things that have no extent of their own."""

    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.data) != self.nbytes:
            raise ValueError(f"{len(self.data)} bytes for {self.dtype} of shape {list(self.shape)}")

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        out[...] = np.frombuffer(self.data, self.dtype.storage).reshape(self.shape)[box.slices]


@dataclass(frozen=True, slots=True, eq=False)
class Derived(Tensor):
    """What every node that is made of one other tensor is."""

    tensor: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.tensor,)


@dataclass(frozen=True, slots=True, eq=False)
class Slice(Derived):
    """A box of another tensor."""

    start: Shape

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        self.tensor.read_into(box.shift(self.start), out, source)


@dataclass(frozen=True, slots=True, eq=False)
class Concat(Tensor):
    """Tensors laid at places of one larger tensor, which they tile exactly."""

    parts: tuple[tuple[Box, Tensor], ...]
    """In row-major order of their places; empty parts left out."""
    reach: tuple[int, ...] = field(init=False, repr=False, default=())
    """For each part the furthest end in dimension 0 of it and all before it: where a search may begin."""

    def __post_init__(self) -> None:
        parts = tuple(sorted((p for p in self.parts if 0 not in p[1].shape), key=lambda p: p[0].start))
        for box, part in parts:
            if box.shape != part.shape or part.dtype is not self.dtype:
                raise Corrupt(
                    f"a {part.dtype} part of shape {list(part.shape)} laid at {_place(box)} of a {self.dtype} tensor"
                )
        problem = tiling_problem(self.shape, [box for box, _ in parts])
        if problem:
            raise problem
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "reach", tuple(accumulate((b.stop[0] for b, _ in parts if b.stop), max)))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(part for _, part in self.parts)

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        if not self.shape:
            for _, part in self.parts:
                part.read_into(box, out, source)
            return
        if box.shape == self.shape:
            for place, part in self.parts:
                part.read_into(Box.whole(part.shape), out[place.slices], source)
            return
        origin = [-a for a in box.start]
        last = box.stop[0]
        for place, part in self.parts[bisect_right(self.reach, box.start[0]) :]:
            if place.start[0] >= last:
                break
            common = place & box
            if common is not None:
                part.read_into(common.shift([-a for a in place.start]), out[common.shift(origin).slices], source)


@dataclass(frozen=True, slots=True, eq=False)
class Permute(Derived):
    """Dimensions reordered."""

    dims: Shape

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        inverse = tuple(int(d) for d in np.argsort(self.dims))
        self.tensor.read_into(box.permute(inverse), out.transpose(inverse), source)


@dataclass(frozen=True, slots=True, eq=False)
class Flatten(Derived):
    """Neighbouring dimensions merged into one, row-major."""

    first: int
    last: int

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        first, last = self.first, self.last
        sizes = self.tensor.shape[first : last + 1]
        before, after = (slice(None),) * first, box.shape[first + 1 :]
        for start, piece in _range_as_boxes(box.start[first], box.stop[first], sizes):
            inner = Box(
                (*box.start[:first], *piece.start, *box.start[first + 1 :]),
                (*box.stop[:first], *piece.stop, *box.stop[first + 1 :]),
            )
            at = start - box.start[first]
            view = out[(*before, slice(at, at + piece.size))]
            self.tensor.read_into(inner, view.reshape(*out.shape[:first], *piece.shape, *after, copy=False), source)


@dataclass(frozen=True, slots=True, eq=False)
class Unflatten(Derived):
    """One dimension cut into several, row-major."""

    dim: int
    sizes: Shape

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        dim, rank = self.dim, len(self.sizes)
        if not self.tensor.shape:
            self.tensor.read_into(Box((), ()), out.reshape(()), source)
            return
        cut = Box(box.start[dim : dim + rank], box.stop[dim : dim + rank])
        outer, shape = box.start[:dim], out.shape
        for place, first, length in _box_as_ranges(cut, self.sizes):
            inner = Box(
                (*outer, first, *box.start[dim + rank :]),
                (*box.stop[:dim], first + length, *box.stop[dim + rank :]),
            )
            view = out[(slice(None),) * dim + tuple(slice(a, b) for a, b in zip(place.start, place.stop, strict=True))]
            merged = (*shape[:dim], length, *shape[dim + rank :])
            try:
                view = view.reshape(merged, copy=False)
            except ValueError:  # the destination's strides do not merge: go through a row-major copy
                whole = source.scratch(merged, self.dtype.storage)
                self.tensor.read_into(inner, whole, source)
                view[...] = whole.reshape(view.shape)
            else:
                self.tensor.read_into(inner, view, source)


@dataclass(frozen=True, slots=True, eq=False)
class Deferred(Tensor):
    """A tensor whose bytes are looked for only when someone wants them."""

    find: Callable[[], Tensor]

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        self.find().read_into(box, out, source)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.find(),)


def concat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors one after the other along `dim`."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    parts, at = [], 0
    for tensor in tensors:
        start = (0,) * dim + (at,) + (0,) * (len(first.shape) - dim - 1)
        parts.append((Box.at(start, tensor.shape), tensor))
        at += tensor.shape[dim]
    return Concat(first.dtype, (*first.shape[:dim], at, *first.shape[dim + 1 :]), tuple(parts))


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors of one shape along a new dimension."""
    return concat([unsqueeze(t, dim) for t in tensors], dim)


def squeeze(tensor: Tensor, dim: int) -> Tensor:
    """Without dimension `dim`, which has size 1."""
    if tensor.shape[dim] != 1:
        raise ValueError(f"squeeze of dimension {dim} of shape {list(tensor.shape)}")
    return Squeeze(tensor.dtype, (*tensor.shape[:dim], *tensor.shape[dim + 1 :]), tensor, dim)


def unsqueeze(tensor: Tensor, dim: int) -> Tensor:
    """With a new dimension of size 1 at `dim`."""
    return Unsqueeze(tensor.dtype, (*tensor.shape[:dim], 1, *tensor.shape[dim:]), tensor, dim)


@dataclass(frozen=True, slots=True, eq=False)
class Squeeze(Derived):
    """A dimension of size 1 dropped."""

    dim: int

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        d = self.dim
        inner = Box((*box.start[:d], 0, *box.start[d:]), (*box.stop[:d], 1, *box.stop[d:]))
        self.tensor.read_into(inner, np.expand_dims(out, d), source)


@dataclass(frozen=True, slots=True, eq=False)
class Unsqueeze(Derived):
    """A dimension of size 1 added."""

    dim: int

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        d = self.dim
        inner = Box((*box.start[:d], *box.start[d + 1 :]), (*box.stop[:d], *box.stop[d + 1 :]))
        self.tensor.read_into(inner, out[(slice(None),) * d + (0, ...)], source)


def leaves(tensor: Tensor) -> Iterator[Stored]:
    """Every stored tensor that `tensor` is made of."""
    if isinstance(tensor, Stored):
        yield tensor
    for part in tensor.inputs:
        yield from leaves(part)


def row_major(shape: Sequence[int]) -> Shape:
    """Strides, in elements, of a dense row-major tensor."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def tiling_problem(shape: Shape, boxes: Sequence[Box]) -> Corrupt | Incomplete | None:
    """Why these non-empty boxes, sorted by their start, do not tile a tensor of this shape; None when they do."""
    if shape and _rows_tile(shape, boxes):
        return None
    for box in boxes:
        if len(box.start) != len(shape) or any(
            a < 0 or b > n for a, b, n in zip(box.start, box.stop, shape, strict=True)
        ):
            return Corrupt(f"a chunk at {_place(box)} lies outside the shape {list(shape)}")
    covered, size = sum(box.size for box in boxes), math.prod(shape)
    overlap = _overlap(shape, boxes)
    if overlap:
        return Corrupt(f"chunks overlap: {_place(overlap[0])} and {_place(overlap[1])} of the shape {list(shape)}")
    if covered != size:
        return Incomplete(
            f"{size - covered} of {size} elements of the shape {list(shape)} are in no chunk"
            f" ({len(boxes)} chunks: {'; '.join(_place(b) for b in boxes[:4])}{' ...' if len(boxes) > 4 else ''})"
        )
    return None


def _rows_tile(shape: Shape, boxes: Sequence[Box]) -> bool:
    """The usual case, quickly: boxes cut dimension 0 and nothing else, one after the other."""
    at, rest = 0, shape[1:]
    for box in boxes:
        if box.start[0] != at or box.stop[1:] != rest or any(box.start[1:]) or box.stop[0] <= at:
            return False
        at = box.stop[0]
    return at == shape[0]


def _overlap(shape: Shape, boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    cut = [d for d in range(len(shape)) if any(b.start[d] or b.stop[d] != shape[d] for b in boxes)]
    if not cut:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    if len(cut) == 1:
        d = cut[0]
        return next(((a, b) for a, b in pairwise(boxes) if b.start[d] < a.stop[d]), None)
    active: list[Box] = []  # a sweep along the first dimension that is cut
    d = cut[0]
    for box in sorted(boxes, key=lambda b: b.start[d]):
        active = [a for a in active if a.stop[d] > box.start[d]]
        for other in active:
            if other & box:
                return other, box
        active.append(box)
    return None


def _place(box: Box) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(box.start, box.stop, strict=True)) + "]"


def _halves(box: Box, dim: int, middle: int) -> tuple[Box, Box]:
    low = (*box.stop[:dim], middle, *box.stop[dim + 1 :])
    high = (*box.start[:dim], middle, *box.start[dim + 1 :])
    return Box(box.start, low), Box(high, box.stop)


def _is_row_major(shape: Shape, strides: Shape) -> bool:
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


def _range_as_boxes(start: int, stop: int, sizes: Shape) -> Iterator[tuple[int, Box]]:
    """Boxes of a row-major tensor of `sizes` that together are its flat elements start to stop, in order."""
    if len(sizes) == 1:
        if stop > start:
            yield start, Box((start,), (stop,))
        return
    inner = math.prod(sizes[1:])
    while start < stop:
        row, within = divmod(start, inner)
        if within == 0 and stop - start >= inner:
            rows = (stop - start) // inner
            yield start, Box((row, *(0 for _ in sizes[1:])), (row + rows, *sizes[1:]))
            start += rows * inner
        else:
            end = min(stop, (row + 1) * inner)
            for at, box in _range_as_boxes(within, end - row * inner, sizes[1:]):
                yield row * inner + at, Box((row, *box.start), (row + 1, *box.stop))
            start = end


def _box_as_ranges(box: Box, sizes: Shape) -> Iterator[tuple[Box, int, int]]:
    """The flat ranges of a row-major tensor of `sizes` that a box is: (place in the box, first, length)."""
    strides = row_major(sizes)
    shape = box.shape
    whole = len(sizes)
    while whole > 0 and shape[whole - 1] == sizes[whole - 1]:
        whole -= 1
    whole = max(whole - 1, 0)  # dimensions from `whole` on are one run
    length = math.prod(shape[whole:])
    if not length:
        return
    for outer in np.ndindex(*shape[:whole]):
        first = sum((a + i) * s for a, i, s in zip(box.start, outer, strides, strict=False))
        first += sum(a * s for a, s in zip(box.start[whole:], strides[whole:], strict=True))
        place = Box((*outer, *(0 for _ in shape[whole:])), (*(i + 1 for i in outer), *shape[whole:]))
        yield place, first, length
