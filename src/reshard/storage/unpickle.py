"""Pickles as values, with nothing imported and nothing called that the pickle names.

What a checkpoint's pickle holds comes back as plain Python values, and as these where it names something:

    torch.bfloat16                          TorchDType("bfloat16")
    torch.Size                              Size, a tuple
    a storage (persistent id)               StorageRef
    a dense tensor, a parameter             TensorRef; a quantized one QTensorRef
    any other class or function             Global(module, name)
    any other object                        Inert, an instance of the Global that made it
    DCP's metadata classes, on request      Record, which only keeps its state

The C unpickler does the work. It reaches a class only through `find_class`, so every class it can instantiate is one
of ours: a `Global` is a type (NEWOBJ accepts nothing else) whose instances record what is done to them. All that a
pickle can do to an object, BUILD included, therefore ends in an `Inert`, a `Record` or a plain container of this load;
what is shared between loads refuses to be changed.

Before that, `opcodes` checks what the C unpickler believes: lengths, memo numbers, and that dict keys can be hashed.
"""

from __future__ import annotations

import gc
import io
import pickle
import sys
import threading
from collections import OrderedDict as _OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NoReturn, cast

from reshard.errors import Corrupt, ReshardError, Unsupported
from reshard.storage.opcodes import Refused, check_nesting, is_surely_shallow, named_globals, pickle_end

__all__ = [
    "DCP_RECORDS",
    "Counter",
    "DefaultDict",
    "Global",
    "Inert",
    "OrderedDict",
    "QTensorRef",
    "Rebuilt",
    "Record",
    "Size",
    "StorageRef",
    "TensorRef",
    "TorchDType",
    "as_path",
    "globals_in",
    "is_known",
    "load",
    "load_from",
]

PersistentLoad = Callable[[object], object]

MAX_NUM_GLOBALS = 10_000
"""Distinct classes and functions per pickle; each is a type of about 1 KiB. Real checkpoints name fewer than 200."""

MAX_NAME_LENGTH = 1_000
"""Characters in a module or a qualified name."""

MAX_CHECKED_RECORDS_NBYTES = 1 << 20
"""Up to this size a pickle with records is checked for keys that cannot be hashed; others are at any size."""

DCP_RECORDS = frozenset(
    {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "_StorageInfo",
    }
)
"""Last name components of the classes in a DCP `.metadata`. The module is not looked at: writers subclass them."""

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


class _Budget(threading.local):
    left = sys.maxsize


_budget = _Budget()


def _spend(num_copied: int) -> None:
    """A pickle spends a byte on each element, so one that has more elements copied than it has bytes is a bomb."""
    _budget.left -= num_copied
    if _budget.left < 0:
        raise Refused("it copies the same values over and over")


def _refuse_state(self: object, state: object) -> NoReturn:
    """In place of the `__setstate__` that a frozen dataclass gets, which a BUILD would change shared values with."""
    raise Refused(f"it changes the state of a {type(self).__name__}")


# --------------------------------------------------------------------------------------------------------------- values


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
            raise Unsupported(f"storage class {_show(self.kind)} is not known")
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


def _show(value: object) -> str:
    """A short text for a message. Values of a hostile pickle are not printed: their repr may be endless."""
    if isinstance(value, Global):
        return f"{value.module}.{value.name}"[:200]
    return ascii(value[:100]) if type(value) is str else f"a {type(value).__name__}"


def _check_count(value: object, what: str) -> None:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise Corrupt(f"{what} holds {_show(value)}, not a count below 2**63")


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


# ------------------------------------------------------------------------------------------------- what is not imported


class Inert:
    """An object that was not made: how the pickle makes it, and what it then does to it, in order.

    Equality and hash are of the identity.
    """

    __slots__ = ("args", "changes", "constructor", "kwargs")

    constructor: str
    """`reduce`: the Global was called. `newobj`: its `__new__` was. `call`: an Inert was, the first of `args`."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any] | None
    changes: list[tuple[str, Any]]
    """("build", state), ("extend", [items]), ("setitem", (key, value)), ("add", item)"""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        if not isinstance(cls, Global):
            raise TypeError("an Inert is made by calling a Global")
        return _inert(cast(Global, cls), "newobj", args, kwargs or None)

    @property
    def maker(self) -> Global:
        """The class or function that the pickle calls."""
        return cast(Global, type(self))

    @property
    def cls(self) -> Global:
        """The object's class, or the function that returns the object."""
        maker = self.maker
        if self.constructor == "reduce" and maker.name in _CLASS_ARGUMENT and maker.module in _COPYREG:
            named = self.args[0] if self.args else None
            return named if isinstance(named, Global) else maker
        return maker

    @property
    def state(self) -> Any:
        """What the last BUILD gave; (dict or None, slots dict) as one dict. None without BUILD."""
        return _merged(_last_build(self))

    def attr(self, name: str, default: object = None) -> Any:
        """The attribute, if the state is a dict that holds it; otherwise `default`."""
        return _attribute(_last_build(self), name, default)

    def __repr__(self) -> str:
        return f"<Inert {_show(self.maker)}>"

    # The unpickler calls what follows.

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return _inert(self.maker, "call", (self, *args), kwargs or None)

    def __setstate__(self, state: object) -> None:
        self.changes.append(("build", state))

    def extend(self, items: list[object]) -> None:
        self.changes.append(("extend", items))

    def append(self, item: object) -> None:
        self.changes.append(("extend", [item]))

    def __setitem__(self, key: object, value: object) -> None:
        self.changes.append(("setitem", (key, value)))

    def add(self, item: object) -> None:
        self.changes.append(("add", item))


class Rebuilt(Inert):
    """A tensor subclass, or a tensor with attributes of its own (`torch._tensor._rebuild_from_type_v2`)."""

    __slots__ = ("inner",)

    inner: object
    """What gets the type and the state: a TensorRef, or an Inert for a wrapper subclass such as DTensor."""

    @property
    def cls(self) -> Global:
        """The type: DTensor, ShardedTensor, Parameter, ..."""
        if self.maker.name == "_rebuild_from_type_v2":
            named = self.args[1]
            return named if isinstance(named, Global) else self.maker
        return Global("torch.nn.parameter", "Parameter")

    @property
    def state(self) -> Any:
        """The attributes: given with the constructor, or by a later BUILD."""
        return _merged(self._given_state())

    def attr(self, name: str, default: object = None) -> Any:
        """The attribute, if the state is a dict that holds it; otherwise `default`."""
        return _attribute(self._given_state(), name, default)

    def _given_state(self) -> object:
        built = _last_build(self)
        return self.args[3] if built is None and len(self.args) > 3 else built


class Record:
    """An instance of a DCP metadata class, as light as it can be. Equality and hash are of the identity."""

    __slots__ = ("_state",)

    _state: Any

    def __setstate__(self, state: object) -> None:
        self._state = state

    @property
    def cls(self) -> Global:
        """Its class."""
        return cast(Global, type(self))

    @property
    def state(self) -> Any:
        """What the last BUILD gave: a dict of the attributes, for TensorProperties a tuple; None without BUILD."""
        try:
            return self._state
        except AttributeError:
            return None

    def attr(self, name: str, default: object = None) -> Any:
        """The attribute, if the state holds it; otherwise `default`."""
        return _attribute(self.state, name, default)

    def __repr__(self) -> str:
        return f"<Record {_show(type(self))}>"


class Global(type):
    """A class or a function by its name, which was not imported. Two of the same name are equal.

    Calling it records the call: the result is an `Inert`, or the value itself for what is known to be harmless.
    """

    _name: tuple[str, str]
    _build: Callable[[Global, tuple[Any, ...]], object] | None

    def __new__(metacls, module: str, name: str) -> Global:
        return _global(module, name, False)

    def __init__(cls, *args: object) -> None:
        pass

    @property
    def module(cls) -> str:
        return cls._name[0]

    @property
    def name(cls) -> str:
        """The qualified name, `Outer.Inner`."""
        return cls._name[1]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls._build is not None and not kwargs:
            return cls._build(cls, args)
        return _inert(cls, "reduce", args, kwargs or None)

    def __eq__(cls, other: object) -> bool:
        return cls is other or (isinstance(other, Global) and cls._name == other._name)

    def __hash__(cls) -> int:
        return hash(cls._name)

    def __repr__(cls) -> str:
        return f"Global({cls._name[0]!r}, {cls._name[1]!r})"

    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError(f"{cls!r} does not change")

    __delattr__ = None  # type: ignore[assignment]


def _last_build(inert: Inert) -> object:
    return next((state for kind, state in reversed(inert.changes) if kind == "build"), None)


def _state_dicts(state: object) -> tuple[dict[Any, Any], ...]:
    """The dicts that hold the attributes; slots, which come second in (dict or None, slots), first."""
    if type(state) is tuple and len(state) == 2 and isinstance(state[1], dict):
        first, slots = state
        if first is None or isinstance(first, dict):
            return (slots, first or {})
    return (state,) if isinstance(state, dict) else ()


def _merged(state: object) -> object:
    """(dict or None, slots dict) as one dict; any other state as it is."""
    dicts = _state_dicts(state)
    return {**dicts[1], **dicts[0]} if len(dicts) == 2 else state


def _attribute(state: object, name: str, default: object) -> Any:
    for attributes in _state_dicts(state):
        if name in attributes:
            return attributes[name]
    return default


def _inert(cls: Global, constructor: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Inert:
    if len(args) > 8 or kwargs:
        _spend(len(args) + len(kwargs or ()))
    made = cast(Inert, object.__new__(cast(Any, cls)))
    made.constructor, made.args, made.kwargs, made.changes = constructor, args, kwargs, []
    return made


@lru_cache(maxsize=1024)
def _global(module: str, name: str, as_record: bool) -> Global:
    """The type for a name. Shared between loads, which is safe because a Global refuses every change."""
    base: type = Record if as_record else Rebuilt if (module, name) in _REBUILT else Inert
    namespace = {
        "__slots__": (),
        "_name": (module, name),
        "_build": None if as_record else _BUILDERS.get((module, name)),
    }
    return type.__new__(Global, base.__name__, (base,), namespace)


def as_path(value: object) -> PurePosixPath | None:
    """The path that a pickled `pathlib` object means, whatever system wrote it; None for any other value."""
    if not isinstance(value, Inert) or value.cls.module not in ("pathlib", "pathlib._local"):
        return None
    if value.cls.name not in _PATHS or not all(type(part) is str for part in value.args):
        return None
    parts = [part.replace("\\", "/") if "Windows" in value.cls.name else part for part in value.args]
    return PurePosixPath(*parts)


# -------------------------------------------------------------------------------- calls that give a value, not an Inert
#
# Each takes the Global and the arguments. Arguments of an unexpected form are recorded like any other call: a user's
# leaf may be anything and must not stand in the way of the weights. Only tensors that contradict themselves raise.


def _build_size(cls: Global, args: tuple[Any, ...]) -> object:
    if len(args) == 1 and type(args[0]) is tuple and all(type(count) is int for count in args[0]):
        _spend(len(args[0]))
        return Size(args[0])
    return _inert(cls, "reduce", args)


def _build_ordered_dict(cls: Global, args: tuple[Any, ...]) -> object:
    if not args:
        return OrderedDict()
    if (
        len(args) == 1
        and type(args[0]) is list
        and all(type(pair) in (list, tuple) and len(pair) == 2 for pair in args[0])
    ):
        _spend(len(args[0]))
        return OrderedDict(args[0])  # Python 2's form
    return _inert(cls, "reduce", args)


def _build_default_dict(cls: Global, args: tuple[Any, ...]) -> object:
    if len(args) > 1:
        return _inert(cls, "reduce", args)
    made = DefaultDict()
    made.factory = args[0] if args else None
    return made


def _build_counter(cls: Global, args: tuple[Any, ...]) -> object:
    if len(args) == 1 and type(args[0]) is dict:
        _spend(len(args[0]))
        return Counter(args[0])
    return _inert(cls, "reduce", args) if args else Counter()


def _build_set(cls: Global, args: tuple[Any, ...]) -> object:
    if len(args) == 1 and type(args[0]) is list:
        _spend(len(args[0]))
        return set(args[0]) if cls.name == "set" else frozenset(args[0])
    return _inert(cls, "reduce", args)


def _latin1(args: tuple[Any, ...]) -> bytes | None:
    if len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1"):
        _spend(len(args[0]))
        return args[0].encode("latin-1")
    return None


def _build_encoded(cls: Global, args: tuple[Any, ...]) -> object:
    encoded = _latin1(args)
    return _inert(cls, "reduce", args) if encoded is None else encoded


def _build_bytes(cls: Global, args: tuple[Any, ...]) -> object:
    return _inert(cls, "reduce", args) if args else b""


def _build_bytearray(cls: Global, args: tuple[Any, ...]) -> object:
    if not args:
        return bytearray()
    if len(args) == 1 and type(args[0]) is bytes:
        _spend(len(args[0]))
        return bytearray(args[0])
    encoded = _latin1(args)
    return _inert(cls, "reduce", args) if encoded is None else bytearray(encoded)


def _build_complex(cls: Global, args: tuple[Any, ...]) -> object:
    return (
        complex(*args) if len(args) == 2 and all(type(part) is float for part in args) else _inert(cls, "reduce", args)
    )


def _build_nested_class(cls: Global, args: tuple[Any, ...]) -> object:
    """`getattr(Outer, "Inner")`, protocol 2's spelling of a nested class. No attribute of anything is looked at."""
    if len(args) == 2 and isinstance(args[0], Global) and args[0]._build is None and type(args[1]) is str:
        name = f"{args[0].name}.{args[1]}"
        if "." not in args[1] and len(name) <= MAX_NAME_LENGTH:
            return Global(args[0].module, name)
    return _inert(cls, "reduce", args)


def _build_tensor(cls: Global, args: tuple[Any, ...]) -> object:
    """_rebuild_tensor(storage, offset, size, stride)
    _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])
    _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])"""
    least, has_dtype = {"_rebuild_tensor": (4, 0), "_rebuild_tensor_v2": (6, 0), "_rebuild_tensor_v3": (7, 1)}[cls.name]
    if not least <= len(args) <= (least if least == 4 else least + 1):
        raise Refused(f"{cls.name} has {len(args)} arguments")
    storage, offset, size, stride = args[:4]
    dtype = args[6] if has_dtype else None
    if has_dtype and type(dtype) is not TorchDType:
        raise Refused(f"{cls.name} has {_show(dtype)} for a dtype")
    metadata = args[least] if len(args) > least else None
    if metadata is not None and not (type(metadata) is dict and metadata.keys() <= {"conj", "neg"}):
        return _inert(cls, "reduce", args)
    bits = metadata or {}
    return TensorRef(
        storage,
        dtype.name if type(dtype) is TorchDType else getattr(storage, "dtype", ""),
        offset,
        size,
        stride,
        requires_grad=len(args) > 4 and args[4] is True,
        conj=bits.get("conj") is True,
        neg=bits.get("neg") is True,
    )


def _build_quantized(cls: Global, args: tuple[Any, ...]) -> object:
    """_rebuild_qtensor(storage, offset, size, stride, quantizer, requires_grad, hooks)"""
    if len(args) != 7 or type(args[4]) is not tuple or not all(_is_plain(part) for part in args[4]):
        return _inert(cls, "reduce", args)
    storage, offset, size, stride, quantizer, requires_grad, _ = args
    dtype = getattr(storage, "dtype", "")
    return QTensorRef(TensorRef(storage, dtype, offset, size, stride, requires_grad is True), quantizer)


def _is_plain(part: object) -> bool:
    """Whether it is of a quantizer. Anything else could make the QTensorRef endless to hash."""
    return isinstance(part, Global) or type(part) in (int, float, TensorRef)


def _build_parameter(cls: Global, args: tuple[Any, ...]) -> object:
    """_rebuild_parameter(tensor, requires_grad, hooks)"""
    if len(args) == 3 and type(args[0]) is TensorRef:
        return replace(args[0], requires_grad=args[1] is True, is_parameter=True)
    return _rebuilt(cls, args, args[0] if args else None)


def _build_parameter_with_state(cls: Global, args: tuple[Any, ...]) -> object:
    """_rebuild_parameter_with_state(tensor, requires_grad, hooks, state)"""
    if len(args) != 4:
        raise Refused(f"{cls.name} has {len(args)} arguments")
    inner = args[0]
    if type(inner) is TensorRef:
        inner = replace(inner, requires_grad=args[1] is True, is_parameter=True)
    return _rebuilt(cls, args, inner)


def _build_typed(cls: Global, args: tuple[Any, ...]) -> object:
    """_rebuild_from_type_v2(function, type, arguments, state)"""
    if len(args) != 4 or not isinstance(args[0], Global) or type(args[2]) is not tuple:
        raise Refused(f"{cls.name} has not (a function, a type, its arguments, a state)")
    return _rebuilt(cls, args, args[0](*args[2]))


def _rebuilt(cls: Global, args: tuple[Any, ...], inner: object) -> object:
    made = _inert(cls, "reduce", args)
    assert isinstance(made, Rebuilt)
    made.inner = inner
    return made


_REBUILT = frozenset(
    {
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_parameter_with_state"),
    }
)
_BUILTINS = ("builtins", "__builtin__")
_COPYREG = ("copyreg", "copy_reg")
_CLASS_ARGUMENT = ("_reconstructor", "__newobj__", "__newobj_ex__")
_PATHS = (
    *("PurePath", "PurePosixPath", "PureWindowsPath"),
    *("Path", "PosixPath", "WindowsPath"),
)

_BUILDERS: dict[tuple[str, str], Callable[[Global, tuple[Any, ...]], object]] = {
    ("torch", "Size"): _build_size,
    ("torch._utils", "_rebuild_tensor"): _build_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _build_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _build_tensor,
    ("torch._utils", "_rebuild_qtensor"): _build_quantized,
    ("torch._utils", "_rebuild_parameter"): _build_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _build_parameter_with_state,
    ("torch._tensor", "_rebuild_from_type_v2"): _build_typed,
    ("collections", "OrderedDict"): _build_ordered_dict,
    ("collections", "defaultdict"): _build_default_dict,
    ("collections", "Counter"): _build_counter,
    ("_codecs", "encode"): _build_encoded,
    **{(module, "set"): _build_set for module in _BUILTINS},
    **{(module, "frozenset"): _build_set for module in _BUILTINS},
    **{(module, "bytes"): _build_bytes for module in _BUILTINS},
    **{(module, "bytearray"): _build_bytearray for module in _BUILTINS},
    **{(module, "complex"): _build_complex for module in _BUILTINS},
    **{(module, "getattr"): _build_nested_class for module in _BUILTINS},
}

_UNDERSTOOD_NAMES = {
    "torch": {"Size", "device", "per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams", "Tensor"}
    | TORCH_DTYPES
    | STORAGE_DTYPES.keys(),
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "torch.serialization": {"_get_layout"},
    "torch.nn.parameter": {"Parameter", "Buffer"},
    "torch._utils": {
        "_rebuild_wrapper_subclass",
        "_rebuild_sparse_tensor",
        "_rebuild_nested_tensor",
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_device_tensor_from_numpy",
        "_rebuild_device_tensor_from_cpu_tensor",
    },
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "uuid": {"UUID", "SafeUUID"},
    "argparse": {"Namespace"},
    "signal": {"Signals"},
    "types": {"SimpleNamespace"},
    "fractions": {"Fraction"},
    "decimal": {"Decimal"},
    "io": {"BytesIO"},
    "_io": {"BytesIO"},
    "pathlib": set(_PATHS),
    "pathlib._local": set(_PATHS),
    **{
        module: {"object", "dict", "list", "tuple", "int", "long", "float", "bool", "str", "unicode", "slice", "range"}
        for module in _BUILTINS
    },
    **{module: set(_CLASS_ARGUMENT) for module in _COPYREG},
}
_UNDERSTOOD_PACKAGES = (
    "torch.distributed._mesh_layout",
    "torch.distributed._shard",
    "torch.distributed._tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.remote_device",
    "torch.distributed.tensor",
    "megatron.core",
    "omegaconf",
    "typing",
)


def is_known(found: Global) -> bool:
    """Whether a name is understood here, or known to be harmless to import. What is not is shown to the user."""
    if (found.module, found.name) in _BUILDERS or found.name in _UNDERSTOOD_NAMES.get(found.module, ()):
        return True
    return any(found.module == package or found.module.startswith(package + ".") for package in _UNDERSTOOD_PACKAGES)


# ----------------------------------------------------------------------------------------------------------------- load


class _Whole(io.RawIOBase):
    """A file, as the C unpickler wants one, that shows the whole pickle at the first peek: nothing is copied."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def peek(self, _: int) -> memoryview:
        return self._data

    def read(self, _: int = -1) -> bytes:
        self._data = self._data[:0]
        return b""

    def readline(self, _: int | None = -1) -> bytes:
        return b""


class _Unpickler(pickle.Unpickler):
    """The C unpickler, with Globals for classes."""

    def __init__(self, data: memoryview, persistent_load: PersistentLoad | None, records: frozenset[str]) -> None:
        # What Python 2 wrote as str is read as torch reads it, but bytes that are no text must not stop the load.
        super().__init__(_Whole(data), encoding="utf-8", errors="surrogateescape")
        self._persistent_load = persistent_load or _load_storage
        self._records = records
        self._found: dict[tuple[str, str], object] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = self._found.get((module, name))
        if found is None:
            if len(self._found) >= MAX_NUM_GLOBALS or max(len(module), len(name)) > MAX_NAME_LENGTH:
                raise Unsupported(
                    f"it names more than {MAX_NUM_GLOBALS} classes, or one of over {MAX_NAME_LENGTH} characters"
                )
            found = self._found[module, name] = self._find(module, name)
        return found

    def _find(self, module: str, name: str) -> object:
        if module == "torch" and name in TORCH_DTYPES:
            return TorchDType(name)
        if not self._records:
            return _global(module, name, False)
        if (module, name) == ("torch", "Size"):
            return _new_tuple_of()
        return _global(module, name, name.rpartition(".")[2] in self._records)

    def persistent_load(self, pid: object) -> object:
        return self._persistent_load(pid)

    @property
    def globals(self) -> Iterator[tuple[str, str]]:
        """What was asked for so far."""
        return iter(self._found)


def _new_tuple_of() -> Callable[[object], object]:
    """torch.Size for hundreds of thousands: the tuple itself. New for each load: a BUILD can change a function."""

    def tuple_of(sizes: object) -> object:
        if type(sizes) is not tuple:
            raise Refused("a torch.Size is not made of a tuple")
        return sizes

    return tuple_of


def _load_storage(pid: object) -> object:
    """('storage', class, key, location, numel[, view]) of torch, and ('module', class, file, source) in old files."""
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Global):
        return pid[1]
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or not isinstance(pid[1], Global):
        raise Refused("a persistent id is not ('storage', class, key, location, numel)")
    if len(pid) == 6 and pid[5] is not None:
        raise Unsupported("a storage that is a view of another storage")
    return StorageRef(pid[1].name, *pid[2:5])


def load(
    data: bytes | memoryview,
    *,
    where: str,
    persistent_load: PersistentLoad | None = None,
    records: frozenset[str] = frozenset(),
) -> Any:
    """The object of a pickle; bytes after its STOP are ignored.

    Args:
        where: What is read, for messages: a path, and a member or an FQN.
        persistent_load: Gives the object for a persistent id; without it, torch's storages become StorageRefs.
        records: Last name components of the classes that become Records, `DCP_RECORDS` for a `.metadata`; `torch.Size`
            is then a plain tuple. Several times faster and smaller than Inerts.

    Raises:
        Corrupt: Whatever else is in the bytes.
        Unsupported: Opcodes that point outside the file, or a newer protocol.
    """
    return load_from(data, 0, where=where, persistent_load=persistent_load, records=records)[0]


def load_from(
    data: bytes | memoryview,
    offset: int,
    *,
    where: str,
    persistent_load: PersistentLoad | None = None,
    records: frozenset[str] = frozenset(),
) -> tuple[Any, int]:
    """The object of the pickle that begins at `offset`, and the offset after its STOP. Otherwise like `load`."""
    view = memoryview(data).cast("B")
    with _explained(where):
        end = pickle_end(view, offset)
        _check_keys(view[offset:end], bool(records))
        return _run(_Unpickler(view[offset:end], persistent_load, records), end - offset), end


def _check_keys(data: memoryview, as_records: bool) -> None:
    """Refuse a pickle whose dict keys could exhaust the stack, or never be hashed.

    Not for large pickles with records: it takes 25 us per chunk, several times what the load does. There, such a pickle
    can still kill or stop the process, though do nothing else.
    """
    if is_surely_shallow(data) or (as_records and len(data) > MAX_CHECKED_RECORDS_NBYTES):
        return
    check_nesting(data, calls_return_arguments=as_records)


def _run(unpickler: _Unpickler, nbytes: int) -> Any:
    budget, collects = _budget.left, gc.isenabled()
    _budget.left = nbytes + 1024
    gc.disable()  # a million new objects are walked over and over otherwise; none of them is garbage yet
    try:
        return unpickler.load()
    finally:
        _budget.left = budget
        if collects:
            gc.enable()


class _explained:
    """Turns whatever the unpickler raises into a Corrupt or Unsupported that says where."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception):
            return
        if isinstance(error, ReshardError) and str(error).startswith(self._where):
            return  # of a nested load
        says = (
            str(error)[:200]
            if isinstance(error, (Refused, ReshardError))
            else f"{type(error).__name__}: {str(error)[:200]}"
        )
        made: type[ReshardError] = Unsupported if isinstance(error, Unsupported) else Corrupt
        hint = error.hint if isinstance(error, ReshardError) else None
        raise made(f"{self._where}: cannot read the pickle: {says}", hint=hint) from error


def globals_in(data: bytes | memoryview, *, offset: int = 0) -> list[Global]:
    """Everything a pickle asks to import, sorted and each once; of a broken one, what it asks for up to there.

    Found by running the pickle inertly, which no detour over the stack deceives. Where that fails, a real unpickler
    might go on, so the names in the opcodes count too.
    """
    view = memoryview(data).cast("B")[offset:]
    names: set[tuple[str, str]] = set()
    for records in (DCP_RECORDS, frozenset[str]()):
        unpickler = _Unpickler(view, lambda pid: None, records)
        try:
            with _explained("audit"):
                end = pickle_end(view, 0)
                _check_keys(view[:end], bool(records))
                _run(unpickler, end)
            names.update(unpickler.globals)
            break
        except ReshardError:
            names.update(unpickler.globals)
    else:
        names.update(named_globals(view))
    return [Global(module, name) for module, name in sorted(names)]
