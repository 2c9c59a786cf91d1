"""Values as a pickle: the mirror of `unpickle`.

What `unpickle.load` gives is written so that a real unpickler makes of it what it would have made of the original:
Globals by their names, Inerts by the calls and changes that they recorded, shared and cyclic references as such.
Tensors are written as `torch.save` writes them, so `torch.load(weights_only=True)` takes a dict of them.

    0x80 p                                             protocol
    opcodes of the object                              each object once; then a memo reference
    `.`                                                STOP

Each `_write_...` emits opcodes and yields the objects that belong in between; `dumps` keeps the unfinished ones on a
list, so nesting is bounded by memory only. Source of the opcodes: CPython `Lib/pickle.py`.
"""

from __future__ import annotations

import collections
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from reshard.errors import Unsupported
from reshard.storage.unpickle import (
    Counter,
    DefaultDict,
    Global,
    Inert,
    OrderedDict,
    QTensorRef,
    Record,
    Size,
    StorageRef,
    TensorRef,
    TorchDType,
)

__all__ = ["dumps"]

T = TypeVar("T")
PersistentId = Callable[[object], object]
Children = Iterator[object]

BATCH = 1_000
"""Items per APPENDS or SETITEMS, as CPython batches them."""


def dumps(obj: object, *, persistent_id: PersistentId | None = None, protocol: int = 2) -> bytes:
    """The pickle of `obj`.

    Args:
        persistent_id: Called with each object; what it returns, unless None, is written as the object's persistent id.
            A StorageRef that it leaves alone gets torch's: ('storage', class, key, location, numel).
        protocol: 2, which `torch.save` uses, or 4.

    Raises:
        Unsupported: A value of a type that is not written.
    """
    if protocol not in (2, 4):
        raise Unsupported(f"pickle protocol {protocol} is not written, only 2 and 4")
    writer = _Writer(persistent_id, protocol)
    unfinished = [writer.write(obj)]
    while unfinished:
        for child in unfinished[-1]:
            unfinished.append(writer.write(child))
            break
        else:
            unfinished.pop()
    return b"\x80" + bytes([protocol]) + b"".join(writer.out) + b"."


class _Writer:
    def __init__(self, persistent_id: PersistentId | None, protocol: int) -> None:
        self.out: list[bytes] = []
        self._persistent_id = persistent_id
        self._protocol = protocol
        self._memo: dict[int, int] = {}
        self._names: dict[Global, int] = {}
        self._kept: list[object] = []  # what has a memo number must live, or its id is given to another

    # ------------------------------------------------------------------------------------------------------------- memo

    def _emit(self, *opcodes: bytes) -> None:
        self.out.extend(opcodes)

    def _next_number(self) -> int:
        number = len(self._kept)
        self._emit(_numbered(b"q", b"r", number))
        return number

    def _memoize(self, obj: object) -> None:
        """Number the object on top of the stack."""
        self._memo[id(obj)] = self._next_number()
        self._kept.append(obj)

    def _recall(self, obj: object) -> bool:
        """Push the object if it has a number."""
        number = self._memo.get(id(obj))
        if number is not None:
            self._emit(_numbered(b"h", b"j", number))
        return number is not None

    # -------------------------------------------------------------------------------------------------------- any value

    def write(self, obj: object) -> Children:
        """Emit what pushes `obj`; yields what must be pushed meanwhile."""
        if self._persistent_id is not None:
            pid = self._persistent_id(obj)
            if pid is not None:
                return self._write_persistent(pid)
        kind = type(obj)
        if isinstance(obj, Global):
            return self._write_global(obj)
        if kind in _ATOMS:
            self._emit(_ATOMS[kind](obj))
            return iter(())
        if kind is not StorageRef and self._recall(obj):
            return iter(())
        write: Callable[[Any], Children] | None = getattr(self, _WRITERS.get(kind, ""), None)
        if write is not None:
            return write(obj)
        if isinstance(obj, Inert):
            return self._write_inert(obj)
        if isinstance(obj, Record):
            return self._write_record(obj)
        raise Unsupported(f"a {kind.__module__}.{kind.__qualname__} cannot be written into a pickle")

    def _write_persistent(self, pid: object) -> Children:
        yield pid
        self._emit(b"Q")

    def _write_storage(self, ref: StorageRef) -> Children:
        module = "torch.storage" if ref.kind == "UntypedStorage" else "torch"
        yield ("storage", Global(module, ref.kind), ref.key, ref.location, ref.numel)
        self._emit(b"Q")

    def _write_str(self, text: str) -> Children:
        encoded = text.encode("utf-8", "surrogatepass")
        self._emit(_sized(b"X", b"\x8d", encoded))
        self._memoize(text)
        return iter(())

    def _write_bytes(self, data: bytes) -> Children:
        if self._protocol >= 3:
            self._emit(b"C" + bytes([len(data)]) + data if len(data) < 256 else _sized(b"B", b"\x8e", data))
            self._memoize(data)
            return iter(())
        if not data:
            return self._call(data, Global("__builtin__", "bytes"), ())
        return self._call(data, Global("_codecs", "encode"), (data.decode("latin-1"), "latin1"))

    def _write_bytearray(self, data: bytearray) -> Children:
        return self._call(data, self._builtin("bytearray"), (bytes(data),) if data else ())

    def _write_complex(self, value: complex) -> Children:
        return self._call(value, self._builtin("complex"), (value.real, value.imag))

    # ------------------------------------------------------------------------------------------------------- containers

    def _write_tuple(self, items: tuple[object, ...]) -> Children:
        if not items:
            self._emit(b")")
            return
        if len(items) > 3:
            self._emit(b"(")
        yield from items
        if id(items) in self._memo:  # one of the items holds the tuple, and has written it
            self._emit(b"1" if len(items) > 3 else b"0" * len(items))
            self._recall(items)
            return
        self._emit((b"\x85", b"\x86", b"\x87")[len(items) - 1] if len(items) <= 3 else b"t")
        self._memoize(items)

    def _write_size(self, size: Size) -> Children:
        return self._call(size, Global("torch", "Size"), (tuple(size),))

    def _write_list(self, items: list[object]) -> Children:
        self._emit(b"]")
        self._memoize(items)
        yield from self._append(items)

    def _write_set(self, items: set[object] | frozenset[object]) -> Children:
        return self._call(items, self._builtin(type(items).__name__), (list(items),))

    def _write_dict(self, items: dict[object, object]) -> Children:
        self._emit(b"}")
        self._memoize(items)
        yield from self._set(items.items())

    def _write_ordered_dict(self, items: collections.OrderedDict[object, object]) -> Children:
        state = items.state if isinstance(items, OrderedDict) else vars(items)
        yield from self._call(items, Global("collections", "OrderedDict"), ())
        yield from self._set(items.items())
        if state:
            yield state
            self._emit(b"b")

    def _write_default_dict(self, items: DefaultDict | collections.defaultdict[object, object]) -> Children:
        factory = items.factory if isinstance(items, DefaultDict) else items.default_factory
        yield from self._call(items, Global("collections", "defaultdict"), () if factory is None else (factory,))
        yield from self._set(items.items())

    def _write_counter(self, items: dict[object, object]) -> Children:
        return self._call(items, Global("collections", "Counter"), (dict(items),))

    def _append(self, items: Iterable[object]) -> Children:
        for batch in _batches(items):
            self._emit(b"(" if len(batch) > 1 else b"")
            yield from batch
            self._emit(b"e" if len(batch) > 1 else b"a")

    def _set(self, pairs: Iterable[tuple[object, object]]) -> Children:
        for batch in _batches(pairs):
            self._emit(b"(" if len(batch) > 1 else b"")
            for key, value in batch:
                yield key
                yield value
            self._emit(b"u" if len(batch) > 1 else b"s")

    # -------------------------------------------------------------------------------------------------- names and calls

    def _builtin(self, name: str) -> Global:
        return Global("__builtin__" if self._protocol < 3 else "builtins", name)

    def _write_dtype(self, dtype: TorchDType) -> Children:
        return self._write_global(Global("torch", dtype.name))

    def _write_global(self, found: Global) -> Children:
        if self._protocol >= 3:
            found = _python_3_name(found)
        number = self._names.get(found)
        if number is not None:
            self._emit(_numbered(b"h", b"j", number))
            return
        outer, _, inner = found.name.rpartition(".")
        if self._protocol >= 4:
            # one object for equal names, whoever made them: else the bytes depend on what the process did before
            yield from (sys.intern(found.module), sys.intern(found.name))
            self._emit(b"\x93")
        elif outer:
            yield from self._reduce(self._builtin("getattr"), (Global(found.module, outer), inner))
        else:
            self._emit(_name_lines(found))
        self._names[found] = self._next_number()
        self._kept.append(found)

    def _reduce(self, function: object, args: tuple[object, ...]) -> Children:
        yield function
        yield args
        self._emit(b"R")

    def _call(self, obj: object, function: object, args: tuple[object, ...], opcode: bytes = b"R") -> Children:
        """Push what `function(*args)` returns, which is `obj`."""
        yield function
        yield args
        if id(obj) in self._memo:  # the arguments hold the object, and have written it
            self._emit(b"00")
            self._recall(obj)
            return
        self._emit(opcode)
        self._memoize(obj)

    # ---------------------------------------------------------------------------------------------------------- tensors

    def _write_tensor(self, ref: TensorRef) -> Children:
        if ref.is_parameter:
            data = TensorRef(ref.storage, ref.dtype, ref.offset, ref.size, ref.stride, conj=ref.conj, neg=ref.neg)
            args = (data, ref.requires_grad, OrderedDict())
            return self._call(ref, Global("torch._utils", "_rebuild_parameter"), args)
        strided = (ref.storage, ref.offset, tuple(ref.size), tuple(ref.stride), ref.requires_grad, OrderedDict())
        bits = {name: True for name, is_set in (("conj", ref.conj), ("neg", ref.neg)) if is_set}
        metadata = (bits,) if bits else ()
        if ref.dtype == ref.storage.dtype:
            return self._call(ref, Global("torch._utils", "_rebuild_tensor_v2"), (*strided, *metadata))
        args_v3 = (*strided, TorchDType(ref.dtype), *metadata)
        return self._call(ref, Global("torch._utils", "_rebuild_tensor_v3"), args_v3)

    def _write_quantized(self, ref: QTensorRef) -> Children:
        tensor = ref.tensor
        strided = (tensor.storage, tensor.offset, tensor.size, tensor.stride)
        args = (*strided, ref.quantizer, tensor.requires_grad, OrderedDict())
        return self._call(ref, Global("torch._utils", "_rebuild_qtensor"), args)

    # ---------------------------------------------------------------------------------------------------------- records

    def _write_inert(self, inert: Inert) -> Children:
        if inert.constructor == "reduce":
            yield from self._call(inert, inert.maker, inert.args)
        elif inert.constructor == "call":
            yield from self._call(inert, inert.args[0], inert.args[1:])
        elif inert.kwargs is None:
            yield from self._call(inert, inert.maker, inert.args, b"\x81")
        else:
            args = (inert.maker, inert.args, inert.kwargs)
            yield from self._call(inert, Global("copyreg", "__newobj_ex__"), args)
        for kind, change in _merged_changes(inert.changes):
            yield from self._change(kind, change)

    def _change(self, kind: str, change: Any) -> Children:
        if kind == "build":
            yield change
            self._emit(b"b")
        elif kind == "extend":
            yield from self._append(change)
        elif kind == "setitem":
            yield from self._set(change)
        else:
            self._emit(b"(")
            yield from change
            self._emit(b"\x90")

    def _write_record(self, record: Record) -> Children:
        yield from self._call(record, record.cls, (), b"\x81")
        if record.state is not None:
            yield record.state
            self._emit(b"b")


_WRITERS: dict[type, str] = {
    str: "_write_str",
    bytes: "_write_bytes",
    bytearray: "_write_bytearray",
    complex: "_write_complex",
    tuple: "_write_tuple",
    list: "_write_list",
    set: "_write_set",
    frozenset: "_write_set",
    dict: "_write_dict",
    OrderedDict: "_write_ordered_dict",
    collections.OrderedDict: "_write_ordered_dict",
    DefaultDict: "_write_default_dict",
    collections.defaultdict: "_write_default_dict",
    Counter: "_write_counter",
    collections.Counter: "_write_counter",
    Size: "_write_size",
    TorchDType: "_write_dtype",
    StorageRef: "_write_storage",
    TensorRef: "_write_tensor",
    QTensorRef: "_write_quantized",
}


def _merged_changes(changes: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Runs of items that were set or added as one change each, with the items in a list."""
    run: tuple[str, list[Any]] | None = None
    for kind, change in changes:
        if run is not None and run[0] != kind:
            yield run
            run = None
        if kind in ("setitem", "add"):
            run = run or (kind, [])
            run[1].append(change)
        else:
            yield kind, change
    if run is not None:
        yield run


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def _numbered(short: bytes, long: bytes, number: int) -> bytes:
    return short + bytes([number]) if number < 256 else long + struct.pack("<I", number)


def _sized(opcode: bytes, large_opcode: bytes, data: bytes) -> bytes:
    if len(data) < 1 << 32:
        return opcode + struct.pack("<I", len(data)) + data
    return large_opcode + struct.pack("<Q", len(data)) + data


def _int(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -1 << 31 <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    nbytes = (value.bit_length() >> 3) + 1
    encoded = value.to_bytes(nbytes, "little", signed=True)
    if value < 0 and nbytes > 1 and encoded[-1] == 0xFF and encoded[-2] & 0x80:
        encoded = encoded[:-1]
    return b"\x8a" + bytes([len(encoded)]) + encoded if len(encoded) < 256 else _sized(b"\x8b", b"", encoded)


_ATOMS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"\x88" if value else b"\x89",
    int: _int,
    float: lambda value: b"G" + struct.pack(">d", value),
}


def _python_3_name(found: Global) -> Global:
    """Unpicklers translate Python 2's names only below protocol 3, where picklers write them to this day."""
    if found.module == "copy_reg":
        return Global("copyreg", found.name)
    if found.module == "__builtin__":
        return Global("builtins", {"xrange": "range", "unicode": "str", "long": "int"}.get(found.name, found.name))
    return found


def _name_lines(found: Global) -> bytes:
    """GLOBAL, which holds names as two lines."""
    if "\n" in found.module + found.name or not (found.module and found.name):
        raise Unsupported(f"a class name that is not one line: {found.module[:50]!r} {found.name[:50]!r}")
    try:
        return f"c{found.module}\n{found.name}\n".encode()
    except UnicodeEncodeError:
        raise Unsupported("a class name that is not text cannot be written") from None
