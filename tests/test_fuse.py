"""Fuses against rows counted one by one in numpy; the one that computes against exact fractions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.core.box import Box
from reshard.core.compute import cast, shift
from reshard.core.dtypes import dtype
from reshard.core.tensor import Array, Literal, Tensor
from reshard.dialects import fuse
from reshard.dialects.fuse import (
    Beside,
    Chained,
    Glu,
    HalvesSwapped,
    HeadQkv,
    Interleaved,
    InterleavedGlu,
    OneRow,
    PackedQkv,
    Padded,
    Qkv,
    Rotary,
    Rows,
    Same,
    Stacked,
    Transposed,
    ZeroCentred,
)
from reshard.errors import Mismatch, Unsupported

U16, BF16, F16, F32 = dtype("U16"), dtype("BF16"), dtype("F16"), dtype("F32")


class Nowhere:
    """A source for tensors that lie in memory."""

    def read(self, extent: Any, offset: int, out: Array) -> None:
        raise AssertionError("nothing here is stored")

    def scratch(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.full(shape, 0xEE, dtype)


def held(values: Array, kind: Any = U16) -> Tensor:
    """A tensor of these elements."""
    return Literal(kind, values.shape, np.ascontiguousarray(values).tobytes())


@dataclass(frozen=True)
class Case:
    """A fuse with parts of the hub and what they are in the dialect."""

    fuse: fuse.Fuse
    sizes: Mapping[str, int]
    parts: tuple[Array, ...]
    whole: Array
    counted: bool = True
    """Whether the sizes say how many rows there must be."""


Order = Iterable[tuple[int, int]]
"""(part, row) for each row of the whole."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    build: Callable[[st.DrawFn, tuple[int, ...]], Case] = draw(st.sampled_from(list(BUILDERS.values())))
    return build(draw, draw(st.sampled_from([(), (1,), (3,), (1, 4)])))


_COUNT = count(1)


def numbers(*shape: int) -> Array:
    """Elements of which no two in a case are alike."""
    return np.fromiter((n % 65521 for n in islice(_COUNT, math.prod(shape))), "<u2").reshape(shape)


def picked(parts: tuple[Array, ...], order: Order) -> Array:
    return np.stack([parts[part][row] for part, row in order])


def grouping(draw: st.DrawFn) -> dict[str, int]:
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return {"heads": groups * per_group, "groups": groups, "head_dim": draw(st.integers(1, 4))}


def qkv_order(sizes: Mapping[str, int]) -> Order:
    heads, groups, size = sizes["heads"], sizes["groups"], sizes["head_dim"]
    for group in range(groups):
        for head in range(heads):
            if head // (heads // groups) == group:
                yield from ((0, head * size + i) for i in range(size))
        yield from ((1, group * size + i) for i in range(size))
        yield from ((2, group * size + i) for i in range(size))


def gated_order(sizes: Mapping[str, int]) -> Order:
    heads, groups, size = sizes["heads"], sizes["groups"], sizes["head_dim"]
    for group in range(groups):
        for gate in (0, 1):
            for head in range(heads):
                if head // (heads // groups) == group:
                    yield from ((0, (2 * head + gate) * size + i) for i in range(size))
        yield from ((1, group * size + i) for i in range(size))
        yield from ((2, group * size + i) for i in range(size))


def qkv(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    sizes, gated = grouping(draw), draw(st.booleans())
    rows_q, rows_k = sizes["heads"] * sizes["head_dim"] * (1 + gated), sizes["groups"] * sizes["head_dim"]
    parts = numbers(rows_q, *tail), numbers(rows_k, *tail), numbers(rows_k, *tail)
    return Case(Qkv(gated), sizes, parts, picked(parts, gated_order(sizes) if gated else qkv_order(sizes)))


def packed_qkv(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    sizes = grouping(draw)
    starts = np.cumsum([0, sizes["heads"] * sizes["head_dim"], sizes["groups"] * sizes["head_dim"]])
    part = numbers(int(starts[2]) + sizes["groups"] * sizes["head_dim"], *tail)
    order = ((0, int(starts[part]) + row) for part, row in qkv_order(sizes))
    return Case(PackedQkv(), sizes, (part,), picked((part,), order))


def head_qkv(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    heads, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    part = numbers(3 * heads * size, *tail)
    order = ((0, (kind * heads + head) * size + i) for head in range(heads) for kind in range(3) for i in range(size))
    return Case(HeadQkv("vision_heads"), {"vision_heads": heads}, (part,), picked((part,), order))


def glu(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    half = draw(st.integers(1, 6))
    gate, up = numbers(half, *tail), numbers(half, *tail)
    whole = np.concatenate([gate, up])
    return Case(Glu(packed=True), {}, (whole,), whole) if draw(st.booleans()) else Case(Glu(), {}, (gate, up), whole)


def interleaved_glu(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    half = draw(st.integers(1, 6))
    part = numbers(3, 2 * half) if tail else numbers(2 * half)
    rows = part.T
    whole = np.stack([*(rows[2 * i] for i in range(half)), *(rows[2 * i + 1] for i in range(half))])
    return Case(InterleavedGlu(), {}, (part,), whole, counted=not tail)


def rows(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    sizes = {name: draw(st.integers(1, 5)) for name in "abc"}
    parts = numbers(sizes["a"], *tail), numbers(sizes["b"] + sizes["c"], *tail), numbers(sizes["a"], *tail)
    return Case(Rows(("a", "b+c", "a")), sizes, parts, np.concatenate(parts))


def interleaved(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    heads = draw(st.integers(1, 3))
    per_head = {name: draw(st.integers(1, 3)) for name in "qvzb"}
    inside = (("q", "v", "z"), ("b", "b"))
    parts = tuple(numbers(heads * sum(per_head[name] for name in names), *tail) for names in inside)
    order = []
    for which, names in enumerate(inside):
        step = sum(per_head[name] for name in names)
        for at, name in enumerate(names):
            before = sum(per_head[name] for name in names[:at])
            order += [(which, head * step + before + i) for head in range(heads) for i in range(per_head[name])]
    sizes = {name: heads * n for name, n in per_head.items()} | {"key_heads": heads}
    return Case(Interleaved("key_heads", inside), sizes, parts, picked(parts, order))


def padded(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    vocab, padding = draw(st.integers(1, 6)), draw(st.sampled_from([None, 0, 3]))
    part = numbers(vocab, *tail)
    sizes = {"vocab": vocab} | ({} if padding is None else {"padded_vocab": vocab + padding})
    return Case(Padded(), sizes, (part,), np.concatenate([part, np.zeros((padding or 0, *tail), "<u2")]))


def moved(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    part = numbers(draw(st.integers(1, 5)), *tail)
    if draw(st.booleans()):
        return Case(Transposed(), {}, (part,), part.swapaxes(-1, -2) if tail else part, counted=False)
    return Case(Same(), {}, (part,), part, counted=False)


def one_row(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    part = numbers(1, draw(st.integers(1, 5)))
    return Case(OneRow(), {}, (part,), part[0], counted=False)


def beside(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    shape, num_parts = (draw(st.integers(1, 4)), *tail), draw(st.integers(1, 3))
    parts = tuple(numbers(*shape) for _ in range(num_parts))
    return Case(Beside(num_parts), {}, parts, np.concatenate(parts, -1), counted=False)


def by_pairs(part: int, heads: int, size: int) -> Order:
    """Rows of a head 0, size / 2, 1, size / 2 + 1, ..."""
    for head in range(heads):
        for i in range(size // 2):
            yield from ((part, head * size + i), (part, head * size + size // 2 + i))


def rotary(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    heads, size = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 3))
    part = numbers(heads * size, *tail)
    return Case(Rotary("heads"), {"heads": heads}, (part,), picked((part,), by_pairs(0, heads, size)))


def rotary_qkv(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    sizes = grouping(draw)
    sizes["head_dim"] *= 2
    heads, groups, size = sizes["heads"], sizes["groups"], sizes["head_dim"]
    q, k, v = numbers(heads * size, *tail), numbers(groups * size, *tail), numbers(groups * size, *tail)
    paired = picked((q,), by_pairs(0, heads, size)), picked((k,), by_pairs(0, groups, size)), v
    chained = Chained(Qkv(), (Rotary("heads"), Rotary("groups"), Same()))
    return Case(chained, sizes, (q, k, v), picked(paired, qkv_order(sizes)))


def stacked(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    experts, half, gated = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.booleans())
    parts = tuple(numbers(half, *tail) for _ in range(experts * (1 + gated)))
    whole = np.stack([np.concatenate(parts[expert::experts]) for expert in range(experts)])
    of = Stacked(Glu(), 2, whole.ndim) if gated else Stacked(Same(), 1, whole.ndim)
    return Case(of, {}, parts, whole, counted=False)


def halves_swapped(draw: st.DrawFn, tail: tuple[int, ...]) -> Case:
    half = draw(st.integers(1, 4))
    part = numbers(draw(st.integers(1, 4)), 2 * half)
    whole = np.stack([part[:, (i + half) % (2 * half)] for i in range(2 * half)], axis=1)
    return Case(HalvesSwapped(), {}, (part,), whole, counted=False)


BUILDERS: dict[str, Callable[[st.DrawFn, tuple[int, ...]], Case]] = {
    "Qkv": qkv,
    "PackedQkv": packed_qkv,
    "HeadQkv": head_qkv,
    "Glu": glu,
    "InterleavedGlu": interleaved_glu,
    "Rows": rows,
    "Interleaved": interleaved,
    "Padded": padded,
    "Same": moved,
    "Transposed": moved,
    "HalvesSwapped": halves_swapped,
    "OneRow": one_row,
    "Beside": beside,
    "Rotary": rotary,
    "Chained": rotary_qkv,
    "Stacked": stacked,
}


def joined(case: Case) -> Tensor:
    return case.fuse.join([held(part) for part in case.parts], case.sizes)


def test_every_fuse_is_drawn_here() -> None:
    of_module = {
        name
        for name, kind in inspect.getmembers(fuse, inspect.isclass)
        if kind.__module__ == fuse.__name__ and hasattr(kind, "join") and name != "Fuse"
    }
    assert of_module == {*BUILDERS, "ZeroCentred", "Dropped"}


@given(cases())
@settings(max_examples=150, deadline=None)
def test_join_is_what_counting_rows_gives(case: Case) -> None:
    assert np.array_equal(joined(case).read(Nowhere()), case.whole)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_split_undoes_join(case: Case) -> None:
    parts = case.fuse.split(joined(case), case.sizes)
    assert [part.shape for part in parts] == [part.shape for part in case.parts]
    assert all(np.array_equal(ours.read(Nowhere()), part) for ours, part in zip(parts, case.parts, strict=True))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_box_of_either_side_reads_as_numpy_does(data: st.DataObject) -> None:
    case = data.draw(cases())
    sides = [(joined(case), case.whole)]
    sides += zip(case.fuse.split(held(case.whole), case.sizes), case.parts, strict=True)
    tensor, values = data.draw(st.sampled_from(sides))
    start = [data.draw(st.integers(0, n - 1)) for n in values.shape]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, values.shape, strict=True)]
    box = Box(tuple(start), tuple(stop))
    assert np.array_equal(tensor.read(Nowhere(), box), values[box.slices])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_row_too_many_is_a_mismatch_that_names_the_rows(data: st.DataObject) -> None:
    case = data.draw(cases().filter(lambda case: case.counted))
    which = data.draw(st.integers(0, len(case.parts) - 1))
    parts = list(case.parts)
    parts[which] = np.concatenate([parts[which], parts[which][:1]])
    with pytest.raises(Mismatch, match=str(len(parts[which]))):
        case.fuse.join([held(part) for part in parts], case.sizes)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_dialects_tensor_with_a_row_too_few_is_a_mismatch_that_names_the_rows(data: st.DataObject) -> None:
    case = data.draw(cases().filter(lambda case: case.counted))
    short = case.whole[: case.sizes["vocab"] - 1] if isinstance(case.fuse, Padded) else case.whole[:-1]
    with pytest.raises(Mismatch, match=str(len(short))):
        case.fuse.split(held(short), case.sizes)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_parts_of_other_widths_or_dtypes_are_a_mismatch(data: st.DataObject) -> None:
    case = data.draw(cases().filter(lambda case: len(case.parts) > 1 and case.parts[0].ndim > 1))
    *others, last = map(held, case.parts)
    wider = held(np.concatenate([case.parts[-1], case.parts[-1]], axis=-1))
    for wrong in (wider, held(case.parts[-1], BF16), last[:, 0]):
        with pytest.raises(Mismatch, match="not"):
            case.fuse.join([*others, wrong], case.sizes)


@pytest.mark.parametrize(
    "of",
    [
        Qkv(),
        PackedQkv(),
        HeadQkv("heads"),
        Glu(),
        Glu(packed=True),
        InterleavedGlu(),
        Padded(),
        Rotary("heads"),
        Beside(1),
    ],
)
def test_a_scalar_is_a_mismatch_and_no_crash(of: fuse.Fuse) -> None:
    sizes = {"heads": 2, "groups": 1, "head_dim": 2, "vocab": 3}
    count = 3 if isinstance(of, Qkv) else 2 if of == Glu() else 1
    with pytest.raises(Mismatch):
        of.join([held(np.zeros((), "<u2"))] * count, sizes)


@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (2, 2, 2)])
def test_what_is_no_matrix_of_two_inputs_is_a_mismatch(shape: tuple[int, ...]) -> None:
    with pytest.raises(Mismatch, match=r"is not a matrix of two inputs"):
        HalvesSwapped().split(held(np.zeros(shape, "<u2")), {})


def test_heads_that_groups_do_not_divide_are_a_mismatch() -> None:
    sizes = {"heads": 4, "groups": 3, "head_dim": 2}
    with pytest.raises(Mismatch, match="4 query heads in 3 groups"):
        Qkv().split(held(numbers(20, 1)), sizes)


def test_rows_that_key_heads_do_not_divide_are_a_mismatch() -> None:
    with pytest.raises(Mismatch, match="5 rows of q for 2 heads"):
        Interleaved("heads", (("q",),)).join([held(numbers(5, 1))], {"heads": 2, "q": 5})


def test_a_vocabulary_larger_than_its_padding_is_a_mismatch() -> None:
    with pytest.raises(Mismatch, match="a vocabulary of 5 does not go into 4 rows"):
        Padded().join([held(numbers(5, 1))], {"vocab": 5, "padded_vocab": 4})


# ---------------------------------------------------------------------------------------------------------- shift


@dataclass(frozen=True)
class Kind:
    """A binary floating-point format."""

    name: str
    numpy: Any
    precision: int
    lowest: int
    """The exponent of the smallest normal number."""
    highest: int
    """The exponent of the largest."""


KINDS = (
    Kind("BF16", ml_dtypes.bfloat16, 8, -126, 127),
    Kind("F16", np.float16, 11, -14, 15),
    Kind("F32", np.float32, 24, -126, 127),
)


def nearest_even(value: Fraction, kind: Kind) -> float:
    """The number of a format nearest to a fraction, ties to even."""
    if value == 0:
        return 0.0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, kind.lowest) - kind.precision + 1)
    rounded = round(value / unit) * unit
    if abs(rounded) >= Fraction(2) ** (kind.highest + 1):
        return math.copysign(math.inf, rounded)
    return float(rounded)


def shifted(values: Array, kind: Kind, offset: float) -> Array:
    tensor = shift(held(values, dtype(kind.name)), offset)
    return tensor.read(Nowhere()).view(kind.numpy)


def all_bfloat16() -> Array:
    values = np.arange(1 << 16, dtype="<u2").view(ml_dtypes.bfloat16)
    return values[np.isfinite(values.astype(np.float32))]


@pytest.mark.parametrize("offset", [1.0, -1.0])
def test_a_shift_of_every_bfloat16_is_the_exact_sum_rounded_once(offset: float) -> None:
    values = all_bfloat16()
    expected = [nearest_even(Fraction(float(x)) + Fraction(offset), KINDS[0]) for x in values]
    assert shifted(values, KINDS[0], offset).astype(np.float64).tolist() == expected


@given(st.sampled_from(KINDS[1:]), st.integers(0, (1 << 32) - 1), st.sampled_from([1.0, -1.0]))
@settings(max_examples=300, deadline=None)
def test_a_shift_is_the_exact_sum_rounded_once(kind: Kind, bits: int, offset: float) -> None:
    value = np.frombuffer(bits.to_bytes(4, "little")[: np.dtype(kind.numpy).itemsize], kind.numpy)
    if np.isfinite(value[0]):
        expected = nearest_even(Fraction(float(value[0])) + Fraction(offset), kind)
        assert float(shifted(value, kind, offset)[0]) == expected


@given(st.integers(0, (1 << 16) - 1))
@settings(max_examples=150, deadline=None)
def test_a_cast_of_a_shift_rounds_once(bits: int) -> None:
    value = np.array([bits], "<u2").view(ml_dtypes.bfloat16)
    if np.isfinite(value.astype(np.float32)[0]):
        tensor = cast(shift(held(value, BF16), 1.0), F32)
        expected = nearest_even(Fraction(float(value[0])) + 1, KINDS[2])
        assert float(tensor.read(Nowhere()).view(np.float32)[0]) == expected


def test_infinities_and_nan_stay_what_they_are() -> None:
    values = np.array([math.inf, -math.inf, math.nan], ml_dtypes.bfloat16)
    assert str(shifted(values, KINDS[0], 1.0).tolist()) == "[inf, -inf, nan]"


def test_integers_are_not_shifted() -> None:
    with pytest.raises(Unsupported, match="arithmetic on U16"):
        ZeroCentred().join([held(numbers(3))], {})


def test_zero_centred_norms_come_back_exactly_between_a_half_and_two() -> None:
    values = all_bfloat16()
    weights = values[(values.astype(np.float32) >= 0.5) & (values.astype(np.float32) <= 2)]
    centred = ZeroCentred().join([held(weights, BF16)], {})
    (back,) = ZeroCentred().split(centred, {})
    assert len(weights) == 257
    assert np.array_equal(back.read(Nowhere()), weights.view("<u2"))


@given(st.floats(0.25, 4, width=32), st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None)
def test_the_way_back_is_at_most_a_unit_off_elsewhere(weight: float, kind: Kind) -> None:
    values = np.array([weight]).astype(kind.numpy)
    centred = ZeroCentred().join([held(values, dtype(kind.name))], {})
    back = ZeroCentred().split(centred, {})[0].read(Nowhere()).view(kind.numpy)
    unit = 2.0 ** (1 - kind.precision) * 2
    assert abs(float(back[0]) - float(values[0])) <= unit
