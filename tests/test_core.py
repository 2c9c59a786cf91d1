"""The algebra of tensors: every composition of nodes reads what numpy would, for every box; arithmetic rounds once."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reshard.core.box import Box
from reshard.core.compute import Cast, byteswap, cast, conjugate, negate, round_into
from reshard.core.dtypes import DTYPES, dtype
from reshard.core.tensor import (
    Array,
    Concat,
    Extent,
    Filled,
    Literal,
    Stored,
    Tensor,
    concat,
    leaves,
    row_major,
    stack,
    tiling_problem,
    unsqueeze,
)
from reshard.errors import Corrupt, Incomplete, Unsupported
from reshard.storage.plan import blocks

U16 = dtype("U16")


class Memory:
    """A source whose files are arrays."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def add(self, data: bytes, before: int = 0) -> Extent:
        path = f"file {len(self.files)}"
        self.files[path] = b"\xaa" * before + data
        return Extent(path, before, len(data))

    def read(self, extent: Extent, offset: int, out: Array) -> None:
        assert offset >= 0
        assert offset + out.nbytes <= extent.nbytes
        data = self.files[extent.path][extent.offset + offset :][: out.nbytes]
        out.reshape(-1).view("u1")[:] = np.frombuffer(data, "u1")

    def scratch(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.full(shape, 0xEEEE, dtype)


SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)


@st.composite
def stored(draw: st.DrawFn, memory: Memory) -> tuple[Tensor, Array]:
    """A leaf and its elements: contiguous, transposed in the file, or a part of a larger storage."""
    shape = draw(SHAPES)
    values = np.frombuffer(draw(st.randoms(use_true_random=False)).randbytes(2 * math.prod(shape)), "<u2")
    values = values.reshape(shape)
    order = draw(st.permutations(range(len(shape))))
    offset, step = draw(st.integers(0, 3)), draw(st.integers(1, 2))
    strides = [0] * len(shape)
    for dim, stride in zip(order, row_major([shape[d] for d in order]), strict=True):
        strides[dim] = stride * step
    storage = np.zeros(offset + step * math.prod(shape), "<u2")
    np.lib.stride_tricks.as_strided(storage[offset:], shape, [2 * s for s in strides])[...] = values
    extent = memory.add(storage.tobytes(), draw(st.integers(0, 3)))
    return Stored(U16, shape, extent, offset, tuple(strides)), values


@st.composite
def composed(draw: st.DrawFn, memory: Memory) -> tuple[Tensor, Array]:
    """A composition of nodes and what it holds."""
    tensor, values = draw(stored(memory))
    for _ in range(draw(st.integers(0, 6))):
        rank = values.ndim
        match draw(
            st.sampled_from(["slice", "index", "permute", "flatten", "unflatten", "concat", "stack", "new", "byteswap"])
        ):
            case "slice" if rank:
                where = []
                for n in values.shape:
                    a = draw(st.integers(0, n - 1)) if n else 0
                    where.append(slice(a, draw(st.integers(a + 1, n)) if n else 0))
                tensor, values = tensor[tuple(where)], values[tuple(where)]
            case "index" if rank:
                i = draw(st.integers(-values.shape[0], values.shape[0] - 1))
                tensor, values = tensor[i], values[i]
            case "permute" if rank:
                dims = draw(st.permutations(range(rank)))
                tensor, values = tensor.permute(*dims), values.transpose(dims)
            case "flatten" if rank:
                first = draw(st.integers(0, rank - 1))
                last = draw(st.integers(first, rank - 1))
                shape = (*values.shape[:first], -1, *values.shape[last + 1 :])
                tensor, values = tensor.flatten(first, last), values.reshape(shape)
            case "unflatten" if rank and rank < 6:
                dim = draw(st.integers(0, rank - 1))
                size = values.shape[dim]
                a = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
                sizes = (a, size // a)
                tensor = tensor.unflatten(dim, sizes)
                values = values.reshape(*values.shape[:dim], *sizes, *values.shape[dim + 1 :])
            case "concat" if rank and values.size < 400:
                dim = draw(st.integers(0, rank - 1))
                tensor, values = concat([tensor, tensor[:]], dim), np.concatenate([values, values], dim)
            case "stack" if rank < 5 and values.size < 400:
                dim = draw(st.integers(0, rank))
                tensor, values = stack([tensor, tensor], dim), np.stack([values, values], dim)
            case "new" if rank < 5:
                dim = draw(st.integers(0, rank))
                tensor, values = unsqueeze(tensor, dim), np.expand_dims(values, dim)
            case "byteswap":
                tensor, values = byteswap(tensor), values.byteswap()
    return tensor, values


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    start = [draw(st.integers(0, n)) for n in shape]
    return Box(tuple(start), tuple(draw(st.integers(a, n)) for a, n in zip(start, shape, strict=True)))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_composition_reads_any_box_as_numpy_does(data: st.DataObject) -> None:
    memory = Memory()
    tensor, values = data.draw(composed(memory))
    assert tensor.shape == values.shape
    assert np.array_equal(tensor.read(memory), values)
    box = data.draw(boxes(tensor.shape))
    assert np.array_equal(tensor.read(memory, box), values[box.slices])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_destination_may_have_any_strides(data: st.DataObject) -> None:
    memory = Memory()
    tensor, values = data.draw(composed(memory))
    assume(values.ndim and values.size)
    dims = data.draw(st.permutations(range(values.ndim)))
    room = np.zeros([2 * values.shape[d] for d in dims], "<u2")
    out = room[tuple(slice(None, None, 2) for _ in dims)].transpose(np.argsort(dims))
    tensor.read_into(Box.whole(tensor.shape), out, memory)
    assert np.array_equal(out, values)
    assert np.count_nonzero(room) <= values.size  # and nothing beside it was written


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_blocks_of_any_size_make_the_whole(data: st.DataObject) -> None:
    memory = Memory()
    tensor, values = data.draw(composed(memory))
    limit = data.draw(st.integers(1, 64))
    parts = [tensor.read(memory, box) for box in blocks(tensor, limit)]
    assert all(part.nbytes <= max(limit, 2) for part in parts)
    assert b"".join(part.tobytes() for part in parts) == values.tobytes()


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_leaves_are_all_that_is_read(data: st.DataObject) -> None:
    memory = Memory()
    tensor, _ = data.draw(composed(memory))
    assert {leaf.extent.path for leaf in leaves(tensor)} <= set(memory.files)


# --------------------------------------------------------------------------------------------------------- tiling


@st.composite
def cuts(draw: st.DrawFn, box: Box, depth: int = 4) -> list[Box]:
    """A box cut into boxes, again and again."""
    dims = [d for d, n in enumerate(box.shape) if n > 1]
    if not depth or not dims or draw(st.booleans()):
        return [box]
    dim = draw(st.sampled_from(dims))
    at = draw(st.integers(box.start[dim] + 1, box.stop[dim] - 1))
    low = Box(box.start, (*box.stop[:dim], at, *box.stop[dim + 1 :]))
    high = Box((*box.start[:dim], at, *box.start[dim + 1 :]), box.stop)
    return [*draw(cuts(low, depth - 1)), *draw(cuts(high, depth - 1))]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_concat_of_any_tiling_is_the_whole(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    memory = Memory()
    values = np.arange(math.prod(shape), dtype="<u2").reshape(shape)
    pieces = data.draw(st.permutations(data.draw(cuts(Box.whole(shape)))))
    parts = []
    for box in pieces:
        piece = np.ascontiguousarray(values[box.slices])
        parts.append((box, Stored(U16, piece.shape, memory.add(piece.tobytes()), 0, row_major(piece.shape))))
    tensor = Concat(U16, shape, tuple(parts))
    box = data.draw(boxes(shape))
    assert np.array_equal(tensor.read(memory, box), values[box.slices])


def counted(shape: tuple[int, ...], pieces: list[Box]) -> np.ndarray[Any, Any]:
    """How many boxes each element is in."""
    count = np.zeros(shape, int)
    for box in pieces:
        count[box.slices] += 1
    return count


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_holes_overlaps_and_strays_are_told_from_tilings(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    pieces = list(data.draw(cuts(Box.whole(shape))))
    change = data.draw(st.sampled_from(["none", "drop", "twice", "move", "grow"]))
    which = data.draw(st.integers(0, len(pieces) - 1))
    dim = data.draw(st.integers(0, len(shape) - 1))
    step = [int(d == dim) for d in range(len(shape))]
    if change == "drop":
        del pieces[which]
    elif change == "twice":
        pieces.append(pieces[which])
    elif change == "move":
        pieces[which] = pieces[which].shift([data.draw(st.sampled_from([-1, 1])) * s for s in step])
    elif change == "grow":
        box = pieces[which]
        pieces[which] = Box(box.start, tuple(b + s for b, s in zip(box.stop, step, strict=True)))
    pieces.sort(key=lambda b: b.start)
    problem = tiling_problem(shape, pieces)
    inside = all(b in Box.whole(shape) for b in pieces)
    count = counted(shape, pieces) if inside else None
    if count is None or (count > 1).any():
        assert isinstance(problem, Corrupt)
    elif (count == 0).any():
        assert isinstance(problem, Incomplete)
    else:
        assert problem is None


def test_a_part_of_another_dtype_or_size_cannot_be_placed() -> None:
    with pytest.raises(Corrupt):
        Concat(U16, (4,), ((Box((0,), (4,)), Filled(dtype("I16"), (4,), b"\0\0")),))
    with pytest.raises(Corrupt):
        Concat(U16, (4,), ((Box((0,), (4,)), Filled(U16, (3,), b"\0\0")),))


@pytest.mark.parametrize("kind", DTYPES, ids=lambda d: d.name)
def test_elements_of_every_dtype_are_moved_bit_for_bit(kind: Any) -> None:
    data = np.random.default_rng(0).bytes(6 * kind.itemsize)  # NaN payloads and denormals among them
    tensor = Literal(kind, (2, 3), data).permute(1, 0).permute(1, 0)
    assert tensor.read(Memory()).tobytes() == data


# ---------------------------------------------------------------------------------------------------------- casts

FLOATS = [d for d in DTYPES if d.kind == "float"]


def numbers(kind: Any, count: int, seed: int = 0) -> Array:
    """Bit patterns of all kinds: every 16-bit one for the small types, random ones and edges for the large."""
    if kind.itemsize <= 2:
        return np.arange(1 << 8 * kind.itemsize, dtype=kind.storage).view(kind.number)
    return np.frombuffer(np.random.default_rng(seed).bytes(count * kind.itemsize), kind.number)


def rounded(value: float, to: Any) -> float:
    """The nearest number of a dtype, ties to even, by exact arithmetic over all or nearby numbers of it."""
    finfo = ml_dtypes.finfo(to.number)
    exact = Fraction(value)
    exponent = max(math.frexp(value)[1] - 1, int(finfo.minexp)) if value else int(finfo.minexp)
    unit = Fraction(2) ** (exponent - int(finfo.nmant))
    quotient = exact / unit
    low = quotient.numerator // quotient.denominator
    rest = quotient - low
    low += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1)
    result = low * unit
    return math.copysign(math.inf, value) if abs(result) > Fraction(float(finfo.max)) else float(result)


@pytest.mark.parametrize("to", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("of", FLOATS, ids=lambda d: d.name)
def test_a_cast_is_what_ml_dtypes_gives(of: Any, to: Any) -> None:
    values = numbers(of, 1 << 14)
    out = np.empty(len(values), to.storage)
    round_into(values, out, to)
    with np.errstate(all="ignore"):
        if of.name == "F64" and to.itemsize <= 2:
            wanted = np.array([_once(float(v), to) for v in values[:2000]], to.number)
            out = out[:2000]
        else:
            wanted = values.astype(to.number)
    found = out.view(to.number)
    with np.errstate(invalid="ignore"):  # signalling NaN
        nan = np.isnan(wanted.astype(np.float64))
        assert np.array_equal(np.isnan(found.astype(np.float64)), nan)
    assert np.array_equal(found.view(to.storage)[~nan], wanted.view(to.storage)[~nan])


def _once(value: float, to: Any) -> float:
    """A float64 rounded to a small type by way of exact arithmetic; what overflows by ml_dtypes' own rule."""
    if not math.isfinite(value) or value == 0:
        return value
    near = rounded(value, to)
    return value if math.isinf(near) else math.copysign(near, value)


TIES = st.builds(
    lambda bits, nudge, sign: (
        sign * float(np.nextafter(np.uint32(bits | 0x8000).view(np.float32).astype(np.float64), nudge))
    ),
    st.integers(0x0001_0000, 0x7F7E_0000).map(lambda b: b & 0xFFFF_0000),
    st.sampled_from([-math.inf, math.inf]),
    st.sampled_from([-1.0, 1.0]),
)


@given(st.lists(TIES, min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_float64_next_to_a_tie_is_rounded_once(values: list[float]) -> None:
    out = np.empty(len(values), np.uint16)
    round_into(np.array(values), out, dtype("BF16"))
    assert [float(x) for x in out.view(ml_dtypes.bfloat16)] == [rounded(v, dtype("BF16")) for v in values]


def test_integers_and_packed_types_are_not_cast() -> None:
    for name in ("I64", "BOOL", "U8", "F8_E8M0", "F4", "C64"):
        tensor = Filled(dtype(name), (2,), bytes(dtype(name).itemsize))
        assert cast(tensor, dtype("BF16")) is tensor
    with pytest.raises(Unsupported):
        cast(Filled(dtype("F32"), (2,), bytes(4)), dtype("I8"))
    assert isinstance(cast(Filled(dtype("F32"), (2,), bytes(4)), dtype("BF16")), Cast)


def test_signs_are_bits() -> None:
    value = np.array([1 + 2j, -0.0 - 3j, complex(math.nan, math.nan)], np.complex64)
    tensor = Literal(dtype("C64"), (3,), value.tobytes())
    read = conjugate(tensor).read(Memory()).view(np.complex64)
    assert np.array_equal(read.view("u4"), np.conj(value).view("u4"))
    numbers = np.array([1.0, -0.0, math.nan], np.float32)
    read = negate(Literal(dtype("F32"), (3,), numbers.tobytes())).read(Memory())
    assert np.array_equal(read, (-numbers).view("u4"))
