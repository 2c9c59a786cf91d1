"""Calls that give a value, not an Inert.

`CALLS` has a function of ours for each function and class of torch, `collections` and the builtins that the pickle of a
checkpoint calls and whose result is plain data: it computes a value and has no effects. It gets the Global that is
called and the arguments, and gives None for arguments of a form that it does not know. The call is then recorded like
any other: a user's leaf may be anything and must not stand in the way of the weights. Only tensors that contradict
themselves raise.

Source: pytorch `torch/_utils.py` and `torch/_tensor.py`, 1.6 to 2.15.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from reshard.storage.unpickle.inert import Call, Global, Inert, Rebuilt, global_named, recorded, shown
from reshard.storage.unpickle.limits import MAX_NAME_LENGTH, Refused, spend
from reshard.storage.unpickle.values import (
    Counter,
    DefaultDict,
    OrderedDict,
    QTensorRef,
    Size,
    TensorRef,
    TorchDType,
)

Arguments = tuple[Any, ...]


@lru_cache(maxsize=1024)
def global_to_call(module: str, name: str) -> Global:
    """The Global of a name, whose calls give the value where there is one."""
    key = (module, name)
    return global_named(module, name, Rebuilt if key in _REBUILT else Inert, CALLS.get(key))


# ----------------------------------------------------------------------------------------------------------- containers


def _size(_: Global, args: Arguments) -> Size | None:
    if len(args) == 1 and type(args[0]) is tuple and all(type(count) is int for count in args[0]):
        spend(len(args[0]))
        return Size(args[0])
    return None


def _ordered_dict(_: Global, args: Arguments) -> OrderedDict | None:
    if not args:
        return OrderedDict()
    if len(args) == 1 and type(args[0]) is list and all(map(_is_pair, args[0])):
        spend(len(args[0]))
        return OrderedDict(args[0])  # Python 2's form
    return None


def _is_pair(item: object) -> bool:
    return type(item) in (list, tuple) and len(item) == 2  # type: ignore[arg-type]


def _default_dict(_: Global, args: Arguments) -> DefaultDict | None:
    if len(args) > 1:
        return None
    made = DefaultDict()
    made.factory = args[0] if args else None
    return made


def _counter(_: Global, args: Arguments) -> Counter | None:
    if len(args) == 1 and type(args[0]) is dict:
        spend(len(args[0]))
        return Counter(args[0])
    return None if args else Counter()


def _set(cls: Global, args: Arguments) -> set[Any] | frozenset[Any] | None:
    if len(args) == 1 and type(args[0]) is list:
        spend(len(args[0]))
        return set(args[0]) if cls.name == "set" else frozenset(args[0])
    return None


def _encoded(_: Global, args: Arguments) -> bytes | None:
    """Protocol 2's spelling of bytes."""
    if len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1"):
        spend(len(args[0]))
        return args[0].encode("latin-1")
    return None


def _bytes(_: Global, args: Arguments) -> bytes | None:
    return None if args else b""


def _bytearray(cls: Global, args: Arguments) -> bytearray | None:
    if not args:
        return bytearray()
    if len(args) == 1 and type(args[0]) is bytes:
        spend(len(args[0]))
        return bytearray(args[0])
    encoded = _encoded(cls, args)
    return None if encoded is None else bytearray(encoded)


def _complex(_: Global, args: Arguments) -> complex | None:
    return complex(*args) if len(args) == 2 and all(type(part) is float for part in args) else None


def _nested_class(_: Global, args: Arguments) -> Global | None:
    """`getattr(Outer, "Inner")`, protocol 2's spelling of a nested class. No attribute of anything is looked at."""
    if len(args) == 2 and isinstance(args[0], Global) and not args[0].gives_value and type(args[1]) is str:
        name = f"{args[0].name}.{args[1]}"
        if "." not in args[1] and len(name) <= MAX_NAME_LENGTH:
            return Global(args[0].module, name)
    return None


# -------------------------------------------------------------------------------------------------------------- tensors


def _tensor(cls: Global, args: Arguments) -> TensorRef | None:
    """_rebuild_tensor(storage, offset, size, stride)
    _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])
    _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])"""
    least, has_dtype = {"_rebuild_tensor": (4, 0), "_rebuild_tensor_v2": (6, 0), "_rebuild_tensor_v3": (7, 1)}[cls.name]
    if not least <= len(args) <= (least if least == 4 else least + 1):
        raise Refused(f"{cls.name} has {len(args)} arguments")
    storage, offset, size, stride = args[:4]
    dtype = args[6] if has_dtype else None
    if has_dtype and type(dtype) is not TorchDType:
        raise Refused(f"{cls.name} has {shown(dtype)} for a dtype")
    metadata = args[least] if len(args) > least else None
    if metadata is not None and not (type(metadata) is dict and metadata.keys() <= {"conj", "neg"}):
        return None
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


def _quantized(_: Global, args: Arguments) -> QTensorRef | None:
    """_rebuild_qtensor(storage, offset, size, stride, quantizer, requires_grad, hooks)"""
    if len(args) != 7 or type(args[4]) is not tuple or not all(map(_is_of_a_quantizer, args[4])):
        return None
    storage, offset, size, stride, quantizer, requires_grad, _hooks = args
    dtype = getattr(storage, "dtype", "")
    return QTensorRef(TensorRef(storage, dtype, offset, size, stride, requires_grad is True), quantizer)


def _is_of_a_quantizer(part: object) -> bool:
    """Anything else could make the QTensorRef endless to hash."""
    return isinstance(part, Global) or type(part) in (int, float, TensorRef)


def _parameter(cls: Global, args: Arguments) -> TensorRef | Rebuilt:
    """_rebuild_parameter(tensor, requires_grad, hooks)"""
    if len(args) == 3 and type(args[0]) is TensorRef:
        return replace(args[0], requires_grad=args[1] is True, is_parameter=True)
    return _rebuilt(cls, args, args[0] if args else None)


def _parameter_with_state(cls: Global, args: Arguments) -> Rebuilt:
    """_rebuild_parameter_with_state(tensor, requires_grad, hooks, state)"""
    if len(args) != 4:
        raise Refused(f"{cls.name} has {len(args)} arguments")
    inner = args[0]
    if type(inner) is TensorRef:
        inner = replace(inner, requires_grad=args[1] is True, is_parameter=True)
    return _rebuilt(cls, args, inner)


def _typed(cls: Global, args: Arguments) -> Rebuilt:
    """_rebuild_from_type_v2(function, type, arguments, state)"""
    if len(args) != 4 or not isinstance(args[0], Global) or type(args[2]) is not tuple:
        raise Refused(f"{cls.name} has not (a function, a type, its arguments, a state)")
    return _rebuilt(cls, args, args[0](*args[2]))


def _rebuilt(cls: Global, args: Arguments, inner: object) -> Rebuilt:
    made = recorded(cls, "reduce", args)
    assert isinstance(made, Rebuilt)
    made.inner = inner
    return made


_REBUILT: dict[tuple[str, str], Call] = {
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter_with_state,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
}
"""Calls that may give a Rebuilt: their Global is one."""

BUILTINS = ("builtins", "__builtin__")

CALLS: dict[tuple[str, str], Call] = {
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_qtensor"): _quantized,
    **_REBUILT,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
    ("collections", "Counter"): _counter,
    ("_codecs", "encode"): _encoded,
    **{(module, "set"): _set for module in BUILTINS},
    **{(module, "frozenset"): _set for module in BUILTINS},
    **{(module, "bytes"): _bytes for module in BUILTINS},
    **{(module, "bytearray"): _bytearray for module in BUILTINS},
    **{(module, "complex"): _complex for module in BUILTINS},
    **{(module, "getattr"): _nested_class for module in BUILTINS},
}
"""By module and name."""
