"""The nodes that compute: casts, bit operations and weighted means.

Everything here works on the block it is asked for, in pieces that stay in the processor's cache. Movement stays exact:
what is computed is said by the type (`Cast`, `Mean`), and each rounds once, to nearest even.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import copysign, frexp, nextafter
from typing import Any, Literal

import numpy as np

from reshard.core.box import Box
from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Array, Derived, Source, Tensor
from reshard.errors import Mismatch, Unsupported

PIECE = 1 << 15
"""Elements computed at once: the working set of a cast or mean fits the level-2 cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Bits(Derived):
    """Elements passed through a function of their bits, such as a byte swap or a complex conjugation."""

    apply: Callable[[Array], None]
    """Changes a C-contiguous array of the storage type in place."""

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        block = source.scratch(box.shape, self.dtype.storage)
        self.tensor.read_into(box, block, source)
        self.apply(block)
        out[...] = block


def byteswap(tensor: Tensor) -> Tensor:
    """Big-endian elements as little-endian ones. Complex numbers are two elements each."""
    width = tensor.dtype.itemsize // (2 if tensor.dtype.kind == "complex" else 1)

    def swap(block: Array) -> None:
        block.reshape(-1).view(f"u{width}").byteswap(inplace=True)

    return tensor if width == 1 else Bits(tensor.dtype, tensor.shape, tensor, swap)


def conjugate(tensor: Tensor) -> Tensor:
    """Complex numbers with the sign of the imaginary part turned."""
    return Bits(tensor.dtype, tensor.shape, tensor, lambda block: _flip_signs(block, tensor.dtype, slice(1, None, 2)))


def negate(tensor: Tensor) -> Tensor:
    """Numbers with their sign turned."""
    if tensor.dtype.kind not in ("float", "complex"):
        raise Unsupported(f"a {tensor.dtype} tensor with torch's negative bit set")
    return Bits(tensor.dtype, tensor.shape, tensor, lambda block: _flip_signs(block, tensor.dtype, slice(None)))


def _flip_signs(block: Array, kind: DType, which: slice) -> None:
    width = kind.itemsize // (2 if kind.kind == "complex" else 1)
    numbers = block.reshape(-1).view(f"u{width}")
    numbers[which] ^= numbers.dtype.type(1 << (8 * width - 1))


@dataclass(frozen=True, slots=True, eq=False)
class Cast(Derived):
    """Floating-point numbers in another dtype, rounded to nearest even."""

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        block = source.scratch(box.shape, self.tensor.dtype.storage)
        self.tensor.read_into(box, block, source)
        numbers = block.reshape(-1).view(self.tensor.dtype.number)
        if out.flags.c_contiguous:
            round_into(numbers, out.reshape(-1), self.dtype)
        else:
            rounded = np.empty(numbers.shape, self.dtype.storage)
            round_into(numbers, rounded, self.dtype)
            out[...] = rounded.reshape(out.shape)


def cast(tensor: Tensor, to: DType) -> Tensor:
    """The tensor in dtype `to`. Integers, bools and packed types stay as they are."""
    if tensor.dtype.kind != "float" or tensor.dtype is to:
        return tensor
    if to.kind != "float":
        raise Unsupported(f"a cast from {tensor.dtype} to {to}", hint="--dtype takes floating-point types")
    if isinstance(tensor, Shift):  # one rounding, not two
        return replace(tensor, dtype=to)
    return Cast(to, tensor.shape, tensor)


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in one dtype: where they are of several floating-point types, in the narrowest that holds all exactly."""
    held = {tensor.dtype for tensor in tensors}
    if len(held) < 2 or any(one.kind != "float" or one.itemsize < 2 for one in held):
        return list(tensors)
    widest = max(held, key=lambda one: one.itemsize)
    return [cast(tensor, widest if widest.itemsize > 2 else dtype("F32")) for tensor in tensors]


@dataclass(frozen=True, slots=True, eq=False)
class Shift(Derived):
    """Floating-point numbers plus a constant, rounded once to nearest even."""

    offset: float

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        block = source.scratch(box.shape, self.tensor.dtype.storage)
        self.tensor.read_into(box, block, source)
        numbers = block.reshape(-1).view(self.tensor.dtype.number).astype(np.float64) + self.offset
        rounded = np.empty(numbers.shape, self.dtype.storage)
        round_into(numbers, rounded, self.dtype)
        out[...] = rounded.reshape(out.shape)


def shift(tensor: Tensor, offset: float) -> Tensor:
    """The tensor plus `offset`, in its own dtype. Raises Unsupported for dtypes that are not floating point."""
    if tensor.dtype.kind != "float":
        raise Unsupported(f"arithmetic on {tensor.dtype}")
    return Shift(tensor.dtype, tensor.shape, tensor, offset)


def round_into(numbers: Array, out: Array, to: DType) -> None:
    """Write 1-D `numbers` (any float type) into `out` (of `to.storage`), rounded to nearest even, NaN staying NaN."""
    target = out.view(to.number)
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, len(numbers), PIECE):
            piece = numbers[at : at + PIECE]
            if to.itemsize <= 2 and piece.dtype == np.float64:
                piece = _ready_for_bfloat16(piece) if to.name == "BF16" else _to_odd_float32(piece)
            target[at : at + PIECE] = piece


def _ready_for_bfloat16(numbers: Array) -> Array:
    """float64 as float32 that rounds to the same bfloat16: only what looks like a tie there needs care."""
    nearest = _as_float32(numbers)
    ties = _bfloat16_ties(nearest)
    if len(ties):
        nearest[ties] = _to_odd_float32(numbers[ties])
    return nearest


def _bfloat16_ties(numbers: Array) -> Array:
    """Where float32 numbers lie half-way between two bfloat16 neighbours."""
    return np.flatnonzero(np.left_shift(numbers.view(np.uint32), 16) == np.uint32(0x8000_0000))


def _to_odd_float32(numbers: Array) -> Array:
    """float64 as float32 such that a second rounding, to a type of 16 or fewer bits, equals a single one.

    Rounding to odd: what is not exact ends in an odd last bit, so it is never mistaken for a tie.
    """
    nearest: Array = numbers.astype(np.float32)
    wide = nearest.astype(np.float64)
    inexact = (wide != numbers) & np.isfinite(nearest)
    if not inexact.any():
        return nearest
    bits = nearest.view(np.uint32)
    away = inexact & (np.abs(wide) > np.abs(numbers))  # towards zero first, then make it odd
    bits -= away.astype(np.uint32)
    bits |= inexact.astype(np.uint32)
    return nearest


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
        mean = _mean_float64 if self.accumulate == "float64" else _mean_float32
        with np.errstate(over="ignore", invalid="ignore"):
            for at in range(0, box.size, PIECE):
                pieces = [b[at : at + PIECE] for b in blocks]
                total = mean(pieces, self.weights, self.dtype)
                if self.report is not None and not np.isfinite(total).all():
                    self._report(pieces)
                round_into(total, result[at : at + PIECE], self.dtype)
        if not contiguous:
            out[...] = result.reshape(out.shape)

    def _report(self, pieces: Sequence[Array]) -> None:
        assert self.report is not None
        for index, piece in enumerate(pieces):
            bad = int(np.count_nonzero(~np.isfinite(piece.astype(np.float32, copy=False))))
            if bad:
                self.report(index, bad)


class _Workspace(threading.local):
    """Arrays that each thread uses again and again: fresh memory costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self.float64 = np.empty(PIECE, np.float64)
        self.float32 = np.empty(PIECE, np.float32)
        self.pair = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)


_workspace = _Workspace()


def _plain(piece: Array, which: int) -> Array:
    """bfloat16 numbers as float32 ones, in the workspace: numpy adds those without holding on to the interpreter."""
    if piece.dtype != dtype("BF16").number:
        return piece
    numbers = _workspace.pair[which][: len(piece)]
    numbers[:] = piece
    return numbers


def _mean_float32(pieces: Sequence[Array], weights: Sequence[float], _to: DType) -> Array:
    total = _workspace.float32[: len(pieces[0])]
    equal = len(set(weights)) == 1
    for index, (piece, weight) in enumerate(zip(pieces, weights, strict=True)):
        if not equal:
            piece = piece.astype(np.float32, copy=False) * np.float32(weight)
        if index == 0:
            total[:] = piece
        else:
            np.add(total, _plain(piece, 0), out=total)
    total /= np.float32(len(weights) if equal else sum(weights))
    return total


def _mean_float64(pieces: Sequence[Array], weights: Sequence[float], to: DType) -> Array:
    """In float64; where that may have lost what decides the rounding to `to`, exactly."""
    equal = len(set(weights)) == 1
    divisor = float(len(weights) if equal else sum(weights))
    factors = [1.0 if equal else w for w in weights]
    total = _workspace.float64[: len(pieces[0])]
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


def _as_float32(numbers: Array) -> Array:
    """At most PIECE float64 numbers, rounded, in the workspace."""
    nearest = _workspace.float32[: len(numbers)]
    nearest[:] = numbers
    return nearest


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


def view_numeric(block: Array, kind: DType) -> np.ndarray[Any, Any]:
    """A storage array as the numbers it holds; as it is when numpy has no such type."""
    return block if kind.numeric is None else block.view(kind.numeric)
