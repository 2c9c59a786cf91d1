"""The values that stand for what torch and Python pickle: dtypes, storages, tensors, containers and paths.

They are data. Nothing is allocated for a shape, and what contradicts itself is refused when it is made. Those that may
be shared between loads are frozen, down to the `__setstate__` that a BUILD would change them with.
"""

from __future__ import annotations

from collections import OrderedDict as _OrderedDict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NoReturn

from reshard.errors import Corrupt, Unsupported
from reshard.storage.unpickle.inert import Inert, shown
from reshard.storage.unpickle.limits import Refused

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}
"""The dtype of each storage class; `UntypedStorage` counts bytes, and another dtype may be named beside it."""

TORCH_DTYPES = frozenset(
    name
    for names in (
        "float64 double float32 float float16 half bfloat16 complex32 chalf complex64 cfloat complex128 cdouble bool",
        "int64 long int32 int int16 short int8 uint8 uint16 uint32 uint64 qint8 quint8 qint32 quint4x2 quint2x4",
        "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2",
        "bits1x8 bits2x4 bits4x2 bits8 bits16 int1 int2 int3 int4 int5 int6 int7",
        "uint1 uint2 uint3 uint4 uint5 uint6 uint7",
    )
    for name in names.split()
)
"""Names of `torch` that are dtypes."""


PATHS = ("PurePath", "PurePosixPath", "PureWindowsPath", "Path", "PosixPath", "WindowsPath")
"""The classes of `pathlib`."""


def _refuse_state(self: object, state: object) -> NoReturn:
    """In place of the `__setstate__` that a frozen dataclass gets, which a BUILD would change shared values with."""
    raise Refused(f"it changes the state of a {type(self).__name__}")


@dataclass(frozen=True, slots=True)
class TorchDType:
    """`torch.<name>`, by its torch name."""

    name: str

    __setstate__ = _refuse_state

    def __reduce__(self) -> tuple[Any, ...]:
        return TorchDType, (self.name,)


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage that the pickle points at: `torch.save`'s persistent id."""

    kind: str
    """The class name, `FloatStorage` or `UntypedStorage`."""
    key: str
    """Which record holds the bytes."""
    location: str
    """Where it lived, `cpu` or `cuda:3`."""
    numel: int
    """Elements of the kind's dtype; bytes for `UntypedStorage`."""

    __setstate__ = _refuse_state

    def __post_init__(self) -> None:
        if self.kind not in STORAGE_DTYPES:
            raise Unsupported(f"storage class {shown(self.kind)} is not known")
        if type(self.key) is not str or type(self.location) is not str:
            raise Corrupt("a storage's key and location are text")
        _check_count(self.numel, "a storage's numel")

    def __reduce__(self) -> tuple[Any, ...]:
        return StorageRef, (self.kind, self.key, self.location, self.numel)

    @property
    def dtype(self) -> str:
        """The torch name of the dtype that the storage class implies."""
        return STORAGE_DTYPES[self.kind]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A dense tensor: strided elements of a storage. `offset` and `stride` count elements of `dtype`."""

    storage: StorageRef
    dtype: str
    """Torch name."""
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    is_parameter: bool = False
    conj: bool = False
    """The bytes are of the conjugate: not yet applied."""
    neg: bool = False
    """The bytes are of the negative: not yet applied."""

    __setstate__ = _refuse_state

    def __post_init__(self) -> None:
        if type(self.storage) is not StorageRef:
            raise Corrupt(f"a tensor's storage is a {type(self.storage).__name__}")
        _check_count(self.offset, "a tensor's storage offset")
        for what, counts in (("size", self.size), ("stride", self.stride)):
            if not isinstance(counts, tuple):
                raise Corrupt(f"a tensor's {what} is a {type(counts).__name__}, not a tuple")
            for count in counts:
                _check_count(count, f"a tensor's {what}")
        if len(self.size) != len(self.stride):
            raise Corrupt(f"a tensor has {len(self.size)} dims and {len(self.stride)} strides")

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorRef, tuple(getattr(self, name) for name in TensorRef.__slots__)


@dataclass(frozen=True, slots=True)
class QTensorRef:
    """A quantized tensor: the integers, and what turns them into values."""

    tensor: TensorRef
    """The stored integers; the dtype is qint8, quint8, ..."""
    quantizer: tuple[object, ...]
    """(scheme, scale, zero point), or (scheme, scales, zero points, dim) with tensors."""

    __setstate__ = _refuse_state

    def __reduce__(self) -> tuple[Any, ...]:
        return QTensorRef, (self.tensor, self.quantizer)


def _check_count(value: object, what: str) -> None:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise Corrupt(f"{what} holds {shown(value)}, not a count below 2**63")


class Size(tuple[int, ...]):
    """A `torch.Size`."""

    __slots__ = ()


class OrderedDict(_OrderedDict[Any, Any]):
    """A `collections.OrderedDict` that keeps its pickled attributes apart, where they cannot shadow a method."""

    _state: dict[object, object] | None = None

    def __setstate__(self, state: object) -> None:
        if type(state) is not dict:
            raise Refused("the state of an OrderedDict is not a dict")
        _OrderedDict.__setattr__(self, "_state", state)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an OrderedDict from a pickle has no attribute {name[:100]!r} to set")

    @property
    def state(self) -> dict[object, object] | None:
        """The attributes, as pickled."""
        return self._state

    @property
    def _metadata(self) -> object:
        """What `module.state_dict()` hangs on its result: module path to {'version': n}."""
        return (self._state or {}).get("_metadata")


class DefaultDict(dict[Any, Any]):
    """A `collections.defaultdict`, as a dict that invents no values."""

    __slots__ = ("factory",)

    factory: object


class Counter(dict[Any, Any]):
    """A `collections.Counter`, as a dict."""

    __slots__ = ()


def as_path(value: object) -> PurePosixPath | None:
    """The path that a pickled `pathlib` object means, whatever system wrote it; None for any other value."""
    if not isinstance(value, Inert) or value.cls.module not in ("pathlib", "pathlib._local"):
        return None
    if value.cls.name not in PATHS or not all(type(part) is str for part in value.args):
        return None
    parts = [part.replace("\\", "/") if "Windows" in value.cls.name else part for part in value.args]
    return PurePosixPath(*parts)
