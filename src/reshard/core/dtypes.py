"""Element types: how many bytes, how numpy moves and computes with them, what torch and safetensors call them.

While tensors only move, an element is opaque bytes (`storage`); `numeric` is for the few operations that compute.
Names are safetensors' (safetensors 0.8, `Dtype`) where that format has the type; `in_safetensors` is False where it
has not, and such tensors are written there as their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np

from reshard.errors import Unsupported

Kind: TypeAlias = Literal["float", "int", "bool", "complex", "packed"]


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """One element type. There is one instance per name: compare with `is`."""

    name: str
    """safetensors' spelling."""
    itemsize: int
    """Bytes of one element."""
    kind: Kind
    torch: str
    """torch's spelling, without `torch.`."""
    storage: np.dtype[Any]
    """What numpy moves: unsigned integers, whose assignment copies bits and nothing else."""
    numeric: np.dtype[Any] | None
    """What numpy computes with, or None."""
    in_safetensors: bool = True

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return dtype, (self.name,)

    @property
    def number(self) -> np.dtype[Any]:
        """`numeric`, for those who compute. Raises Unsupported when numpy has no such numbers."""
        if self.numeric is None:
            raise Unsupported(f"arithmetic on {self.torch}")
        return self.numeric

    def nbytes(self, shape: Iterable[int]) -> int:
        """Bytes of a dense tensor of this shape."""
        return self.itemsize * math.prod(shape)


_STORAGE = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}


def _dtype(name: str, itemsize: int, kind: Kind, torch: str, numeric: Any, in_safetensors: bool = True) -> DType:
    number = None if numeric is None else np.dtype(numeric)
    return DType(name, itemsize, kind, torch, np.dtype(_STORAGE[itemsize]), number, in_safetensors)


DTYPES = (
    _dtype("BOOL", 1, "bool", "bool", "bool"),
    _dtype("U8", 1, "int", "uint8", "u1"),
    _dtype("I8", 1, "int", "int8", "i1"),
    _dtype("U16", 2, "int", "uint16", "<u2"),
    _dtype("I16", 2, "int", "int16", "<i2"),
    _dtype("U32", 4, "int", "uint32", "<u4"),
    _dtype("I32", 4, "int", "int32", "<i4"),
    _dtype("U64", 8, "int", "uint64", "<u8"),
    _dtype("I64", 8, "int", "int64", "<i8"),
    _dtype("F16", 2, "float", "float16", "<f2"),
    _dtype("BF16", 2, "float", "bfloat16", ml_dtypes.bfloat16),
    _dtype("F32", 4, "float", "float32", "<f4"),
    _dtype("F64", 8, "float", "float64", "<f8"),
    _dtype("F8_E4M3", 1, "float", "float8_e4m3fn", ml_dtypes.float8_e4m3fn),
    _dtype("F8_E5M2", 1, "float", "float8_e5m2", ml_dtypes.float8_e5m2),
    _dtype("F8_E4M3FNUZ", 1, "float", "float8_e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
    _dtype("F8_E5M2FNUZ", 1, "float", "float8_e5m2fnuz", ml_dtypes.float8_e5m2fnuz),
    _dtype("F8_E8M0", 1, "packed", "float8_e8m0fnu", None),
    # torch counts pairs of 4-bit values, safetensors counts values: the last dimension is twice as long there.
    _dtype("F4", 1, "packed", "float4_e2m1fn_x2", None),
    _dtype("C64", 8, "complex", "complex64", "<c8"),
    _dtype("C32", 4, "complex", "complex32", None, in_safetensors=False),
    _dtype("C128", 16, "complex", "complex128", "<c16", in_safetensors=False),
    _dtype("QI8", 1, "packed", "qint8", None, in_safetensors=False),
    _dtype("QU8", 1, "packed", "quint8", None, in_safetensors=False),
    _dtype("QI32", 4, "packed", "qint32", None, in_safetensors=False),
)

_BY_NAME = {d.name: d for d in DTYPES} | {d.torch: d for d in DTYPES}
_SPELLINGS = {
    "fp32": "F32",
    "float": "F32",
    "fp16": "F16",
    "half": "F16",
    "bf16": "BF16",
    "fp64": "F64",
    "double": "F64",
}


def dtype(name: str) -> DType:
    """The dtype of this name, in safetensors' spelling or torch's (`BF16`, `bfloat16`, `torch.bfloat16`, `bf16`).

    Raises Unsupported when there is none.
    """
    short = name.removeprefix("torch.")
    found = _BY_NAME.get(short) or _BY_NAME.get(short.upper()) or _BY_NAME.get(_SPELLINGS.get(short.lower(), ""))
    if found is None:
        raise Unsupported(f"unknown dtype {name!r}", hint=f"known: {', '.join(d.torch for d in DTYPES)}")
    return found
