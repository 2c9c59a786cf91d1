"""Means: correctly rounded, whatever way the arithmetic takes; held against fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.core import sums
from reshard.core.box import Box
from reshard.core.dtypes import dtype
from reshard.core.mean import Mean
from reshard.core.tensor import Filled, Literal
from reshard.errors import Mismatch
from reshard.storage.files import Reader

MEANS = [dtype("BF16"), dtype("F16"), dtype("F32")]


def bit_patterns(kind: Any) -> st.SearchStrategy[int]:
    """Finite numbers: of all sizes, near one another, denormal, with long runs of zeros and ones."""
    width = 8 * kind.itemsize
    mantissa = int(ml_dtypes.finfo(kind.number).nmant)
    one = int(np.ones(1, kind.number).view(kind.storage)[0])
    top = int(np.array([ml_dtypes.finfo(kind.number).max], kind.number).view(kind.storage)[0])
    magnitude = st.one_of(
        st.integers(0, top),
        st.integers(one - (2 << mantissa), one + (2 << mantissa)),
        st.integers(0, 1 << mantissa),
        st.sampled_from([0, 1, one, one + 1, one - 1, top, 1 << mantissa]),
    )
    return st.builds(lambda m, s: m | s << (width - 1), magnitude, st.integers(0, 1))


def mean_of(kind: Any, rows: list[list[int]], weights: list[float], to: Any) -> list[float]:
    parts = tuple(Literal(kind, (len(row),), np.array(row, kind.storage).tobytes()) for row in rows)
    tensor = Mean(to, (len(rows[0]),), parts, tuple(weights))
    return [float(x) for x in tensor.read(Reader()).view(to.number)]


def exact_mean(kind: Any, row: list[int], weights: list[float], to: Any) -> float:
    values = [Fraction(float(np.array([b], kind.storage).view(kind.number)[0])) for b in row]
    mean = sum(v * Fraction(w) for v, w in zip(values, weights, strict=True)) / sum(map(Fraction, weights))
    return rounded_fraction(mean, to)


def rounded_fraction(exact: Fraction, to: Any) -> float:
    finfo = ml_dtypes.finfo(to.number)
    if not exact:
        return 0.0
    exponent = exact.numerator.__abs__().bit_length() - exact.denominator.bit_length()
    while Fraction(2) ** exponent > abs(exact):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(exact):
        exponent += 1
    unit = Fraction(2) ** (max(exponent, int(finfo.minexp)) - int(finfo.nmant))
    quotient = exact / unit
    low, rest = divmod(quotient, 1)
    low += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1)
    result = low * unit
    return math.copysign(math.inf, exact) if abs(result) > Fraction(float(finfo.max)) else float(result)


@pytest.mark.parametrize("kind", MEANS, ids=lambda d: d.name)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_mean_of_equal_weights_is_correctly_rounded(kind: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 7))
    row = [data.draw(bit_patterns(kind)) for _ in range(count)]
    weight = data.draw(st.sampled_from([1.0, 0.1, 3.0]))
    found = mean_of(kind, [[bits] for bits in row], [weight] * count, kind)
    assert found == [exact_mean(kind, row, [1.0] * count, kind)]


@pytest.mark.parametrize("kind", MEANS, ids=lambda d: d.name)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_weighted_mean_is_correctly_rounded(kind: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 5))
    row = [data.draw(bit_patterns(kind)) for _ in range(count)]
    weights = [data.draw(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0])) for _ in range(count)]
    assert mean_of(kind, [[bits] for bits in row], weights, kind) == [exact_mean(kind, row, weights, kind)]


@pytest.mark.parametrize("to", MEANS, ids=lambda d: d.name)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_mean_of_two_neighbours_is_a_tie_and_goes_to_even(to: Any, data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, (1 << 8 * to.itemsize - 2) - 1))
    assert mean_of(to, [[bits], [bits + 1]], [1.0, 1.0], to) == [exact_mean(to, [bits, bits + 1], [1, 1], to)]
    far = data.draw(st.integers(1, 40))  # a third number that only the exact sum sees
    row = [bits, bits, bits + 1, bits + 1, far]
    assert mean_of(to, [[b] for b in row], [1.0] * 5, to) == [exact_mean(to, row, [1] * 5, to)]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_mean_may_be_cast_on_the_way(data: st.DataObject) -> None:
    kind, to = dtype("F32"), dtype("BF16")
    row = [data.draw(bit_patterns(kind)) for _ in range(3)]
    assert mean_of(kind, [[b] for b in row], [1.0] * 3, to) == [exact_mean(kind, row, [1] * 3, to)]


def test_the_mean_of_one_is_itself() -> None:
    for kind in MEANS:
        values = np.frombuffer(np.random.default_rng(0).bytes(kind.itemsize << 12), kind.number)
        with np.errstate(invalid="ignore"):  # signalling NaN
            values = values[np.isfinite(values.astype(np.float64))]
        tensor = Mean(kind, values.shape, (Literal(kind, values.shape, values.tobytes()),), (3.0,))
        read = tensor.read(Reader()).view(kind.number)
        assert np.array_equal(read.astype(np.float64), values.astype(np.float64))


def test_nan_and_infinity_go_through_a_mean_and_are_reported() -> None:
    seen = []
    rows = [np.array([1, math.nan, math.inf, math.inf], np.float32), np.array([3, 1, 1, -math.inf], np.float32)]
    parts = tuple(Literal(dtype("F32"), (4,), row.tobytes()) for row in rows)
    tensor = Mean(dtype("F32"), (4,), parts, (1.0, 1.0), report=lambda index, count: seen.append((index, count)))
    read = tensor.read(Reader()).view(np.float32)
    assert read[0] == 2
    assert np.isnan(read[1])
    assert read[2] == math.inf
    assert np.isnan(read[3])
    assert seen == [(0, 3), (1, 1)]


def test_a_mean_of_different_shapes_is_refused() -> None:
    kind = dtype("U16")
    with pytest.raises(Mismatch):
        Mean(kind, (2,), (Filled(kind, (2,), b"\0\0"), Filled(kind, (3,), b"\0\0")), (1.0, 1.0))


# ----------------------------------------------------------------------------------------------- sums in float32

SHORT = [dtype("BF16"), dtype("F16")]


def numbers_of(kind: Any, rows: Any) -> list[Any]:
    """Bit patterns as the arrays that are summed."""
    return [np.array(row, kind.storage).view(kind.number) for row in rows]


@st.composite
def companions(draw: st.DrawFn, kind: Any, count: int) -> list[int]:
    """Bit patterns that go badly together: opposites, neighbours, and some that are just too small to be seen."""
    bits = draw(st.lists(bit_patterns(kind), min_size=count, max_size=count))
    mantissa, sign = int(ml_dtypes.finfo(kind.number).nmant), 1 << 8 * kind.itemsize - 1
    for index in range(1, count):
        orders = draw(st.integers(0, 24 - mantissa))
        match draw(st.sampled_from(["any", "opposite", "neighbour", "small"])):
            case "opposite":
                bits[index] = bits[index - 1] ^ sign
            case "neighbour":
                bits[index] = max(0, (bits[index - 1] & sign - 1) - 1) | ~bits[index - 1] & sign
            case "small":
                bits[index] = max(0, (bits[0] & sign - 1) - (orders << mantissa)) | bits[index] & sign
    return bits


@pytest.mark.parametrize("to", MEANS, ids=lambda d: d.name)
@pytest.mark.parametrize("kind", SHORT, ids=lambda d: d.name)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_short_numbers_that_go_badly_together_have_a_correctly_rounded_mean(
    kind: Any, to: Any, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 9))
    columns = [data.draw(companions(kind, count)) for _ in range(data.draw(st.integers(1, 4)))]
    whole = st.lists(st.sampled_from([1.0, 2.0, 3.0, 7.0, 60.0]), min_size=count, max_size=count)
    weights = data.draw(st.one_of(st.just([1.0] * count), whole))
    rows = [list(row) for row in zip(*columns, strict=True)]
    assert mean_of(kind, rows, weights, to) == [exact_mean(kind, column, weights, to) for column in columns]


@pytest.mark.parametrize("kind", SHORT, ids=lambda d: d.name)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_float32_sum_that_is_not_named_is_exact(kind: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    pieces = numbers_of(kind, [[bits] for bits in data.draw(companions(kind, count))])
    factors = data.draw(st.lists(st.sampled_from([1.0, 2.0, 3.0, 7.0]), min_size=count, max_size=count))
    if sums.are_short([kind] * count, factors) and not len(sums.inexact(pieces, factors)):
        exact = sum(Fraction(float(p[0])) * Fraction(f) for p, f in zip(pieces, factors, strict=True))
        assert Fraction(float(sums.float32_sum(pieces, factors)[0])) == exact


@pytest.mark.parametrize("to", SHORT, ids=lambda d: d.name)
@pytest.mark.parametrize("count", [3, 4, 5, 6, 7])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_quotient_next_to_a_tie_is_rounded_once(count: int, to: Any, data: st.DataObject) -> None:
    """A sum of 21 bits, one unit beside `count` times a tie, in three numbers of at most 8 bits."""
    digits = int(ml_dtypes.finfo(to.number).nmant) + 2
    tie = data.draw(st.integers(1 << digits - 2, (1 << digits - 1) - 1)) * 2 + 1
    total = (tie * count << 21 - (tie * count).bit_length()) + data.draw(st.sampled_from([-1, 0, 1]))
    scale = data.draw(st.sampled_from([2.0**-133, 2.0**-126, 2.0**-40, 2.0**-30, 1.0, 2.0**100]))
    sign = data.draw(st.sampled_from([-1, 1]))
    terms = [total >> 14 << 14, total >> 7 & 0x7F, total & 0x7F]
    terms[1] <<= 7
    row = np.array([sign * term * scale for term in terms] + [0.0] * (count - 3), ml_dtypes.bfloat16).view(np.uint16)
    assert sum(abs(row.view(ml_dtypes.bfloat16).astype(np.float64))) == total * scale
    bits, kind = [int(b) for b in row], dtype("BF16")
    assert mean_of(kind, [[b] for b in bits], [1.0] * count, to) == [exact_mean(kind, bits, [1.0] * count, to)]


def test_sums_as_long_as_float32_are_exact_and_one_order_more_is_in_doubt() -> None:
    pieces = numbers_of(dtype("BF16"), [[0x3F80, 0x3F80, 0, 0], [0x3F80 - (14 << 7) + 1, 0x3F80 - (14 << 7) - 1, 0, 1]])
    assert list(sums.inexact([*pieces, pieces[0], pieces[0]], [1.0] * 4)) == [1]


def test_what_float32_cannot_hold_is_found_in_every_piece() -> None:
    kind, count = dtype("BF16"), sums.MOST + 100
    rows = np.full((4, count), 0x3F80, np.uint16)
    odd = {0: 0x0001, 7: 0x7F7F, sums.MOST - 1: 0x3301, sums.MOST: 0x3F81, sums.MOST + 99: 0xB300}
    for index, bits in odd.items():
        rows[:3, index] = bits
    read = np.array(mean_of(kind, rows.tolist(), [1.0] * 4, kind))
    for index in odd:
        column = [int(bits) for bits in rows[:, index]]
        assert read[index] == exact_mean(kind, column, [1.0] * 4, kind)
    assert (np.delete(read, list(odd)) == 1).all()


@pytest.mark.parametrize("kind", SHORT, ids=lambda d: d.name)
def test_nan_and_infinity_among_short_numbers_are_reported(kind: Any) -> None:
    infinity, nan = (int(np.array([x], kind.number).view(kind.storage)[0]) for x in (math.inf, math.nan))
    rows = np.ones((3, sums.MOST + 10), kind.number).view(kind.storage)
    rows[0, [0, sums.MOST + 1]] = infinity
    rows[2, [5, sums.MOST + 1]] = nan, infinity | 1 << 15
    seen: dict[int, int] = {}
    parts = tuple(Literal(kind, row.shape, row.tobytes()) for row in rows)
    mean = Mean(kind, rows[0].shape, parts, (1.0,) * 3, report=lambda index, n: seen.update({index: n}))
    read = mean.read(Reader()).view(kind.number).astype(np.float64)
    assert seen == {0: 2, 2: 2}
    assert read[0] == math.inf
    assert np.isnan(read[[5, sums.MOST + 1]]).all()
    assert np.count_nonzero(read == 1) == len(read) - 3


@pytest.mark.parametrize("kind", SHORT, ids=lambda d: d.name)
def test_zeros_keep_their_sign_where_they_agree(kind: Any) -> None:
    found = mean_of(kind, [[0, 1 << 15, 0], [0, 1 << 15, 1 << 15]], [1.0, 1.0], kind)
    assert [math.copysign(1, x) for x in found] == [1, -1, 1]


def test_the_mean_of_nothing_is_nothing() -> None:
    kind = dtype("BF16")
    part = Literal(kind, (0, 3), b"")
    for accumulate in ("float64", "float32"):
        out = np.empty((0, 3), kind.storage)
        Mean(kind, (0, 3), (part, part), (1.0, 1.0), accumulate).read_into(Box.whole((0, 3)), out, Reader())
