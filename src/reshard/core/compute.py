"""The nodes that compute: casts, bit operations and sums with a constant. Means are in `mean.py`.

Everything here works on the block it is asked for, in pieces that stay in the processor's cache. Movement stays exact:
what is computed is said by the type (`Cast`, `Shift`), and each rounds once, to nearest even.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reshard.core.box import Box
from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Array, Derived, Source, Tensor
from reshard.errors import Unsupported

PIECE = 1 << 15
"""Elements computed at once: the working set fits the level-2 cache."""


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


class Count:
    """A number that threads add to."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self.value += number


_NARROW = ("F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Types whose largest number weights may well pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Cast(Derived):
    """Floating-point numbers in another dtype, rounded to nearest even."""

    lost: Count = field(default_factory=Count, repr=False)
    """Of the numbers read so far, those that a narrow dtype had no room for: they became infinite, or NaN."""

    def read_into(self, box: Box, out: Array, source: Source) -> None:
        block = source.scratch(box.shape, self.tensor.dtype.storage)
        self.tensor.read_into(box, block, source)
        numbers = block.reshape(-1).view(self.tensor.dtype.number)
        if out.flags.c_contiguous:
            rounded = out.reshape(-1)
            round_into(numbers, rounded, self.dtype)
        else:
            rounded = np.empty(numbers.shape, self.dtype.storage)
            round_into(numbers, rounded, self.dtype)
            out[...] = rounded.reshape(out.shape)
        if self.dtype.name in _NARROW:
            self._count_lost(numbers, rounded.view(self.dtype.number))

    def _count_lost(self, numbers: Array, rounded: Array) -> None:
        gone = np.flatnonzero(~np.isfinite(rounded))
        if len(gone):
            self.lost.add(int(np.count_nonzero(np.isfinite(numbers[gone]))))


def lost_by(tensor: Tensor) -> int:
    """How many numbers of the casts in a tensor that has been read had no room in their dtype."""
    if isinstance(tensor, Cast):
        return tensor.lost.value
    return sum(map(lost_by, tensor.inputs))


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


class _Workspace(threading.local):
    """Memory that each thread uses again and again: fresh memory costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self.float32 = np.empty(PIECE, np.float32)


_workspace = _Workspace()


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
    """At most PIECE float64 numbers as float32 ones that round to the same bfloat16, in the workspace.

    Only what looks like a tie there needs care.
    """
    nearest: Array = _workspace.float32[: len(numbers)]
    nearest[:] = numbers
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


def view_numeric(block: Array, kind: DType) -> np.ndarray[Any, Any]:
    """A storage array as the numbers it holds; as it is when numpy has no such type."""
    return block if kind.numeric is None else block.view(kind.numeric)
