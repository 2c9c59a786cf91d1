"""From what a torch pickle says of a tensor to the tensor: dtype, strides, byte order, conjugate and negative bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reshard.core.checkpoint import KeyPath
from reshard.core.compute import byteswap, conjugate, negate
from reshard.core.dtypes import dtype
from reshard.core.tensor import Extent, Stored, Tensor
from reshard.errors import Corrupt, Unsupported
from reshard.storage.unpickle import StorageRef, TensorRef

MAX_NUM_DIMS = 64
"""What numpy and torch can handle."""


def check_storage(storage: StorageRef, nbytes: int, where: str) -> None:
    """Raise Corrupt unless the record of a storage has as many bytes as the pickle says."""
    claimed = storage.numel * dtype(storage.dtype).itemsize
    if claimed != nbytes:
        raise Corrupt(f"{where}: storage {storage.key} has {nbytes} bytes, the pickle says {claimed}")


def stored(ref: TensorRef, extent: Extent, byteorder: str = "little") -> Tensor:
    """The tensor that `ref` describes, its storage being `extent`.

    Raises Corrupt when it reaches past its storage, Unsupported for dtypes that are not read.
    """
    if len(ref.size) > MAX_NUM_DIMS:
        raise Unsupported(f"{extent.path}: a tensor of {len(ref.size)} dimensions")
    tensor: Tensor = Stored(dtype(ref.dtype), tuple(ref.size), extent, ref.offset, tuple(ref.stride))
    if byteorder == "big":
        tensor = byteswap(tensor)
    if ref.conj:
        tensor = conjugate(tensor)
    return negate(tensor) if ref.neg else tensor


def walk(
    value: Any, path: KeyPath = (), expand: Callable[[Any], Mapping[str, Any] | None] = lambda _: None
) -> Iterator[tuple[KeyPath, Any]]:
    """Every leaf of a nested state dict with its path: dicts, lists and tuples are descended, keys become text.

    A sequence of plain values (text, numbers) is one leaf, and so is an empty container. `expand` may show the entries
    of other values. What two names refer to is listed under both; what holds itself is not entered again. Raises
    Corrupt when references to the same few values multiply without bounds.
    """
    seen: set[int] = set()
    repeats = 0
    ancestors: list[int] = []
    stack: list[Iterator[tuple[KeyPath, Any]]] = [iter([(path, value)])]
    while stack:
        for where, item in stack[-1]:
            entries = _entries(item, expand)
            if entries is None:
                yield where, item
            elif id(item) not in ancestors:
                if id(item) in seen:
                    repeats += len(entries)
                    if repeats > MAX_NUM_REPEATS:
                        raise Corrupt(f"values under {fqn(where)[:200]} refer to each other over and over")
                seen.add(id(item))
                ancestors.append(id(item))
                stack.append(iter([((*where, key), child) for key, child in entries]))
                break
        else:
            stack.pop()
            if ancestors:
                ancestors.pop()


MAX_NUM_REPEATS = 1 << 19
"""Entries that are listed again because a second name refers to the same container."""
_PLAIN = (str, bytes, int, float, complex, type(None))


class Key(str):
    """A dict's key that is no text, as an FQN spells it. Optimizers count their parameters with numbers."""

    __slots__ = ("value",)

    value: int | float | None

    @classmethod
    def of(cls, value: int | float | None, text: str) -> Key:
        key = cls(text)
        key.value = value
        return key


def _entries(item: Any, expand: Callable[[Any], Mapping[str, Any] | None]) -> list[tuple[str | int, Any]] | None:
    """The entries of a container by key; None for a leaf."""
    if isinstance(item, dict):
        return [(_key(key), child) for key, child in item.items()] or None
    if isinstance(item, list | tuple):
        return None if all(isinstance(child, _PLAIN) for child in item) else list(enumerate(item))
    shown = expand(item)
    return None if shown is None else list(shown.items())


def _key(key: Any) -> str:
    """A dict key in an FQN. Values of a hostile pickle are not printed unless they are short."""
    if isinstance(key, str):
        return key
    if isinstance(key, int):
        return Key.of(key, str(key) if key.bit_length() <= 64 else hex(key))
    if isinstance(key, float | None):
        return Key.of(key, str(key))
    name = getattr(key, "name", None)
    return name if isinstance(name, str) else f"<{type(key).__name__}>"


def fqn(path: KeyPath) -> str:
    """The FQN of a path, as DCP's planner joins them."""
    return ".".join(str(key) for key in path)
