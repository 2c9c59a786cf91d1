"""Sums in float32, and where they are exact: for bfloat16 and float16 almost everywhere.

A sum loses nothing while its bits fit. Let the terms of an element have p significant bits (8 and 11) and lie d binary
orders apart, zeros aside. Each is a multiple of the last bit of the smallest, and so is each partial sum, which is less
than 2**(p + d) of these units times the sum of the factors, L bits: nothing is rounded, in whatever order they are
added, while p + d + L is at most float32's 24. That is read off the numbers' bits, whose order is that of magnitudes.

The quotient q of an exact sum and the whole number n may be rounded twice, to float32 and then to the 11 or fewer bits
of a smaller type. That would differ from a single rounding only if q were no tie of that type but float32 made it one.
Let u be the unit above and 2**j the last bit of the tie, of which it has at most 12 without trailing zeros. Then q and
the tie are at least min(u, 2**j) / n apart. Rounding moves q by less than q / 2**24, hence less than u / n; and where
2**j is less, by less than 2**j / 2**12, or in denormal numbers 2**-150: less than 2**j / n while n is at most 2**12.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Array

MOST = 1 << 18
"""Elements summed at once: of bfloat16, a block. Threads let go of the interpreter in each step, and steps shorter than
it takes to wake another thread keep all but one of them waiting."""

_LAYOUTS: dict[np.dtype[Any], tuple[int, int]] = {
    dtype("BF16").number: (7, 0x7F80),
    dtype("F16").number: (10, 0x7C00),
}
"""Bits of the mantissa, and how infinity is written."""

_LEAST_SPREAD = 4
"""With fewer orders to spare most elements would be in doubt. It keeps the sum of the factors within 2**12."""


class _Workspace(threading.local):
    """Arrays that each thread uses again and again: fresh memory costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self.total, self.term = np.empty((2, MOST), np.float32)
        self.bits, self.largest, self.smallest = np.empty((3, MOST), np.uint16)
        self.doubtful = np.empty(MOST, np.bool_)


_workspace = _Workspace()


def float32_sum(pieces: Sequence[Array], factors: Sequence[float]) -> Array:
    """Of at most MOST elements each, times its factor, added in order; in memory that the next sum uses again."""
    total, term = (a[: len(pieces[0])] for a in (_workspace.total, _workspace.term))
    for index, (piece, factor) in enumerate(zip(pieces, factors, strict=True)):
        wide = term if index else total
        wide[:] = piece
        if factor != 1:
            wide *= np.float32(factor)
        if index:
            total += term
    return total


def are_short(kinds: Sequence[DType], factors: Sequence[float]) -> bool:
    """Whether `inexact` can tell anything: bfloat16 or float16 numbers, times whole numbers, and not too many."""
    if len(set(kinds)) > 1 or kinds[0].numeric not in _LAYOUTS:
        return False
    mantissa, _ = _LAYOUTS[kinds[0].number]
    whole = all(factor >= 1 and float(factor).is_integer() for factor in factors)
    return whole and _spread(mantissa, factors) >= _LEAST_SPREAD


def inexact(pieces: Sequence[Array], factors: Sequence[float]) -> Array:
    """The indices where `float32_sum` of short numbers may have rounded or overflowed, or something is not finite."""
    mantissa, infinity = _LAYOUTS[pieces[0].dtype]
    bits, largest, smallest = (a[: len(pieces[0])] for a in (_workspace.bits, _workspace.largest, _workspace.smallest))
    np.bitwise_and(pieces[0].view(np.uint16), 0x7FFF, out=largest)
    np.subtract(largest, 1, out=smallest)  # zeros wrap, and are never the smallest
    for piece in pieces[1:]:
        np.bitwise_and(piece.view(np.uint16), 0x7FFF, out=bits)
        np.maximum(largest, bits, out=largest)
        bits -= 1
        np.minimum(smallest, bits, out=smallest)
    apart = np.subtract(largest, smallest, out=smallest)  # and 1 where all are zeros
    doubtful = _workspace.doubtful[: len(apart)]
    np.greater(apart, _spread(mantissa, factors) << mantissa, out=doubtful)
    huge = infinity - (_num_bits(factors) << mantissa)
    if largest.max() >= huge:
        doubtful |= largest >= huge
    return np.flatnonzero(doubtful)


def _spread(mantissa: int, factors: Sequence[float]) -> int:
    """How many binary orders the terms of an exact sum may be apart."""
    return 24 - (mantissa + 1) - _num_bits(factors)


def _num_bits(factors: Sequence[float]) -> int:
    """By which a sum may be longer than its largest term."""
    return (int(sum(factors)) - 1).bit_length()
