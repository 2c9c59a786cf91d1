"""The load: CPython's C unpickler, with ours for every class and storage that it asks for.

    opcodes     what they claim is checked; then the unpickler runs them and asks for
    classes     find_class: a TorchDType, a Record where they were asked for, otherwise a Global
    storages    persistent_load: a StorageRef, unless the caller knows better

Whatever goes wrong comes out as one of our errors, which says where.
"""

from __future__ import annotations

import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

from reshard.errors import Corrupt, ReshardError, Unsupported
from reshard.storage.unpickle.calls import global_to_call
from reshard.storage.unpickle.inert import Global, Record, global_named
from reshard.storage.unpickle.limits import MAX_NAME_LENGTH, MAX_NUM_GLOBALS, Refused, allow
from reshard.storage.unpickle.opcodes import check_nesting, is_surely_shallow, pickle_end
from reshard.storage.unpickle.values import TORCH_DTYPES, StorageRef, TorchDType

PersistentLoad = Callable[[object], object]

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


def names_asked_for(data: memoryview, records: frozenset[str]) -> tuple[set[tuple[str, str]], bool]:
    """Module and name of all that a load asks for, and whether it came to its end."""
    unpickler = _Unpickler(data, lambda pid: None, records)
    try:
        with _explained("audit"):
            end = pickle_end(data, 0)
            _check_keys(data[:end], bool(records))
            _run(unpickler, end)
    except ReshardError:
        return set(unpickler.found), False
    return set(unpickler.found), True


def _check_keys(data: memoryview, as_records: bool) -> None:
    """Refuse a pickle whose dict keys could exhaust the stack, or never be hashed.

    Not for large pickles with records: it takes 25 us per chunk, several times what the load does. There, such a pickle
    can still kill or stop the process, though do nothing else.
    """
    if is_surely_shallow(data) or (as_records and len(data) > MAX_CHECKED_RECORDS_NBYTES):
        return
    check_nesting(data, calls_return_arguments=as_records)


def _run(unpickler: _Unpickler, nbytes: int) -> Any:
    collects, before = gc.isenabled(), allow(nbytes + 1024)
    gc.disable()  # a million new objects are walked over and over otherwise; none of them is garbage yet
    try:
        return unpickler.load()
    finally:
        allow(before)
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
        self.found: dict[tuple[str, str], object] = {}
        """What was asked for so far, by module and name."""

    def find_class(self, module: str, name: str) -> Any:
        found = self.found.get((module, name))
        if found is None:
            if len(self.found) >= MAX_NUM_GLOBALS or max(len(module), len(name)) > MAX_NAME_LENGTH:
                raise Unsupported(
                    f"it names more than {MAX_NUM_GLOBALS} classes, or one of over {MAX_NAME_LENGTH} characters"
                )
            found = self.found[module, name] = self._find(module, name)
        return found

    def _find(self, module: str, name: str) -> object:
        if module == "torch" and name in TORCH_DTYPES:
            return TorchDType(name)
        if not self._records:
            return global_to_call(module, name)
        if (module, name) == ("torch", "Size"):
            return _new_tuple_of()
        if name.rpartition(".")[2] in self._records:
            return global_named(module, name, Record)
        return global_to_call(module, name)

    def persistent_load(self, pid: object) -> object:
        return self._persistent_load(pid)


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
