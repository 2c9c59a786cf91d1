"""The weighted mean of tensors, each element rounded once to nearest even.

Where the numbers are short a sum in float32 is nearly always exact, and known to be: see `sums.py`. What is left, and
everything else, is summed in float64, which has bits to spare; and what even that may round wrongly in twice its
precision, or as fractions.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import copysign, frexp, nextafter
from typing import Any, Literal

import numpy as np

from reshard.core import sums
from reshard.core.box import Box
from reshard.core.compute import PIECE, round_into
from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Array, Source, Tensor
from reshard.errors import Mismatch


@dataclass(frozen=True, slots=True, eq=False)
class Mean(Tensor):
    """The weighted mean of tensors of one shape, rounded once."""

    tensors: tuple[Tensor, ...]
    weights: tuple[float, ...]
    """They are divided by their sum."""
    accumulate: Literal["float64", "float32"] = "float64"
    report: Callable[[int, int], None] | None = field(default=None, repr=False)
    """Called with (index of the tensor, number of NaN and infinite elements) when a block has any."""

    def __post_init__(self) -> None:
        if len(self.tensors) != len(self.weights) or not self.tensors:
            raise ValueError(f"{len(self.weights)} weights for {len(self.tensors)} tensors")
        if any(t.shape != self.shape for t in self.tensors):
            raise Mismatch(f"the mean of shapes {', '.join(str(list(t.shape)) for t in self.tensors)}")

    @property
    def _factors(self) -> tuple[float, ...]:
        """What the tensors are multiplied with before their sum is divided by that of these."""
        return (1.0,) * len(self.weights) if len(set(self.weights)) == 1 else self.weights

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.tensors

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        blocks = []
        for tensor in self.tensors:
            block = source.scratch(box.shape, tensor.dtype.storage)
            tensor.read_into(box, block, source)
            blocks.append(block.reshape(-1).view(tensor.dtype.number))
        contiguous = out.flags.c_contiguous
        result = out.reshape(-1) if contiguous else np.empty(box.size, self.dtype.storage)
        with np.errstate(over="ignore", invalid="ignore"):
            write = self._write_short if self._is_short() else self._write
            write(blocks, result)
        if not contiguous:
            out[...] = result.reshape(out.shape)

    def _is_short(self) -> bool:
        """Whether float32 holds most sums, and its quotients may be rounded once more."""
        kinds = [tensor.dtype for tensor in self.tensors]
        return self.accumulate == "float64" and self.dtype.itemsize <= 4 and sums.are_short(kinds, self._factors)

    def _write_short(self, blocks: Sequence[Array], out: Array) -> None:
        """Write the mean of 1-D blocks from float32, and then once more where that may have lost something."""
        lossy = [np.empty(0, np.intp)]
        for piece in _pieces(out, sums.MOST):
            parts = [block[piece] for block in blocks]
            round_into(_mean_float32(parts, self._factors), out[piece], self.dtype)
            lossy.append(piece.start + sums.inexact(parts, self._factors))
        again = np.concatenate(lossy)
        if len(again):
            mended = np.empty(len(again), out.dtype)
            self._write([block[again] for block in blocks], mended)
            out[again] = mended

    def _write(self, blocks: Sequence[Array], out: Array) -> None:
        """Write the mean of 1-D blocks, in as many bits as was asked for."""
        in_float64 = self.accumulate == "float64"
        for piece in _pieces(out, PIECE if in_float64 else sums.MOST):
            parts = [block[piece] for block in blocks]
            if in_float64:
                mean = _mean_float64(parts, self._factors, self.dtype)
            else:
                mean = _mean_float32(parts, self._factors)
            if self.report is not None and not (np.isfinite(mean.min()) and np.isfinite(mean.max())):
                self._report(parts)
            round_into(mean, out[piece], self.dtype)

    def _report(self, pieces: Sequence[Array]) -> None:
        assert self.report is not None
        for index, piece in enumerate(pieces):
            bad = int(np.count_nonzero(~np.isfinite(piece.astype(np.float32, copy=False))))
            if bad:
                self.report(index, bad)


def _pieces(block: Array, size: int) -> list[slice]:
    """Slices of a size that a workspace holds."""
    return [slice(at, at + size) for at in range(0, len(block), size)]


class _Workspace(threading.local):
    """As that of `sums.py`, for what is summed in float64."""

    def __init__(self) -> None:
        self.total = np.empty(PIECE, np.float64)
        self.pair = np.empty((2, PIECE), np.float32)


_workspace = _Workspace()


def _mean_float32(pieces: Sequence[Array], factors: Sequence[float]) -> Array:
    mean = sums.float32_sum(pieces, factors)
    mean /= np.float32(sum(factors))
    return mean


def _mean_float64(pieces: Sequence[Array], factors: Sequence[float], to: DType) -> Array:
    """In float64; where that may have lost what decides the rounding to `to`, exactly."""
    divisor = float(sum(factors))
    total = _workspace.total[: len(pieces[0])]
    if len(pieces) > 1 and factors[0] == factors[1] == 1.0:
        np.add(_plain(pieces[0], 0), _plain(pieces[1], 1), out=total, dtype=np.float64)
        begun = 2
    else:
        total[:] = 0
        begun = 0
    for piece, factor in zip(pieces[begun:], factors[begun:], strict=True):
        np.add(total, _plain(piece, 0) if factor == 1.0 else piece.astype(np.float64) * factor, out=total)
    if frexp(divisor)[0] == 0.5:
        total *= 1 / divisor  # exact
    else:
        total /= divisor
    if not _is_exact(pieces, factors):
        doubtful = _doubtful(total, pieces, factors, divisor, to)
        if len(doubtful):
            total[doubtful] = _mean_exact([p[doubtful] for p in pieces], factors, divisor)
    return total


def _plain(piece: Array, which: int) -> Array:
    """bfloat16 numbers as float32 ones, in the workspace: numpy adds those without holding on to the interpreter."""
    if piece.dtype != dtype("BF16").number:
        return piece
    numbers: Array = _workspace.pair[which][: len(piece)]
    numbers[:] = piece
    return numbers


def _is_exact(pieces: Sequence[Array], factors: Sequence[float]) -> bool:
    """Whether float64 sums of these numbers lose nothing: their exponents lie close enough together.

    A sum of n terms of p bits, d binary orders apart, needs p + d + log2(n) of float64's 53 bits. Where two more are
    left, a quotient by n that is no tie lies further from one than half a unit, so rounding cannot make it one.
    """
    if not _may_be_exact(pieces, factors):
        return False
    bits, mantissa = _LAYOUTS[pieces[0].dtype]
    magnitudes = [p.view(bits) & bits(_MAGNITUDE[bits]) for p in pieces]
    largest = max(int(m.max()) for m in magnitudes)
    smallest = min(int((m - bits(1)).min()) for m in magnitudes) + 1  # zeros wrap to the largest
    return (largest >> mantissa) - (smallest >> mantissa) <= _spread(mantissa, factors)


def _exact_ones(pieces: Sequence[Array], factors: Sequence[float]) -> Array:
    """The same for each element on its own."""
    if not _may_be_exact(pieces, factors):
        return np.zeros(len(pieces[0]), np.bool_)
    bits, mantissa = _LAYOUTS[pieces[0].dtype]
    magnitudes = np.stack([p.view(bits) & bits(_MAGNITUDE[bits]) for p in pieces]).astype(np.int64)
    smallest = np.where(magnitudes == 0, 1 << 62, magnitudes).min(axis=0)
    return np.asarray((magnitudes.max(axis=0) >> mantissa) - (smallest >> mantissa) <= _spread(mantissa, factors))


def _may_be_exact(pieces: Sequence[Array], factors: Sequence[float]) -> bool:
    kinds = {p.dtype for p in pieces}
    return len(pieces) <= 16 and len(kinds) == 1 and kinds <= set(_LAYOUTS) and all(w in range(1, 17) for w in factors)


def _spread(mantissa: int, factors: Sequence[float]) -> int:
    """How many binary orders the terms of an exact sum may be apart."""
    return 51 - (mantissa + 1) - 4 - (0 if set(factors) == {1.0} else 4)


_LAYOUTS: dict[np.dtype[Any], tuple[Any, int]] = {
    dtype("BF16").number: (np.uint16, 7),
    dtype("F32").number: (np.uint32, 23),
}
"""How the numbers of a type lie: unsigned integers of the same size, and the bits of the mantissa among them."""
_MAGNITUDE = {np.uint16: 0x7FFF, np.uint32: 0x7FFF_FFFF}


def _doubtful(total: Array, pieces: Sequence[Array], factors: Sequence[float], divisor: float, to: DType) -> Array:
    """Where the float64 mean may round to another `to` than the exact one: next to a tie, or after cancellation."""
    magnitude = np.zeros(len(total), np.float64)
    for piece, factor in zip(pieces, factors, strict=True):
        magnitude += np.abs(piece.astype(np.float64)) * factor
    cancelled = magnitude > _CANCELLATION * divisor * np.abs(total)
    found: Array = np.flatnonzero(cancelled | _near_ties(total, to))
    return found[~_exact_ones([p[found] for p in pieces], factors)]


_CANCELLATION = 1 << 10
"""Terms may be so many times as large as their sum before the error of the sum leaves the window of `_near_ties`."""


def _near_ties(numbers: Array, to: DType) -> Array:
    """Whether float64 numbers lie within 2**14 units of a tie of the dtype, each."""
    dropped = {"F32": 29, "BF16": 45, "F16": 42}.get(to.name)
    if dropped is None:
        return np.ones(len(numbers), np.bool_) if to.name != "F64" else np.zeros(len(numbers), np.bool_)
    window, half = np.uint64(1 << 14), np.uint64(1 << (dropped - 1))
    low = (numbers.view(np.uint64) - half + window) & np.uint64((1 << dropped) - 1)
    smallest_normal = 2.0**-14 if to.name == "F16" else 2.0**-126
    return np.asarray((low <= 2 * window) | (np.abs(numbers) < smallest_normal))  # subnormals have ties elsewhere


def _mean_exact(pieces: Sequence[Array], factors: Sequence[float], divisor: float) -> Array:
    """The mean in twice float64's precision, and exactly where even that cannot tell; as float64 rounded to odd."""
    high: Array = np.zeros(len(pieces[0]), np.float64)
    low, magnitude = np.zeros_like(high), np.zeros_like(high)
    for piece, factor in zip(pieces, factors, strict=True):
        product, error = _two_product(piece.astype(np.float64), factor)
        total = high + product
        back = total - high
        low += (high - (total - back)) + (product - back) + error
        high = total
        magnitude += np.abs(product)
    first = (high + low) / divisor
    product, error = _two_product(first, divisor)
    correction = (((high - product) - error) + low) / divisor
    quotient: Array = first + correction
    rest = correction - (quotient - first)
    bits = quotient.view(np.uint64)
    inexact = (rest != 0) & np.isfinite(quotient)
    toward_zero = inexact & ((rest < 0) == (quotient > 0)) & (quotient != 0)
    bits -= toward_zero.astype(np.uint64)
    bits |= inexact.astype(np.uint64)
    unsure = np.isfinite(quotient) & (np.abs(rest) <= (magnitude / divisor) * 2.0**-98)
    for index in np.flatnonzero(unsure):
        exact = sum(
            (Fraction(float(p[index])) * Fraction(w) for p, w in zip(pieces, factors, strict=True)), Fraction(0)
        )
        quotient[index] = _rounded_to_odd(exact / Fraction(divisor))
    return quotient


def _rounded_to_odd(number: Fraction) -> float:
    nearest = float(number)
    if Fraction(nearest) == number:
        return nearest
    magnitude = abs(nearest)
    if Fraction(magnitude) > abs(number):
        magnitude = nextafter(magnitude, 0.0)
    (bits,) = struct.unpack("<Q", struct.pack("<d", magnitude))
    odd: float = struct.unpack("<d", struct.pack("<Q", bits | 1))[0]
    return copysign(odd, -1.0 if number < 0 else 1.0)


def _two_product(a: Array, b: float) -> tuple[Array, Array]:
    """a * b and its rounding error, exactly (Dekker)."""
    split = 134217729.0  # 2**27 + 1
    product = a * b
    big = a * split
    a_high = big - (big - a)
    a_low = a - a_high
    b_high = b * split - (b * split - b)
    b_low = b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
