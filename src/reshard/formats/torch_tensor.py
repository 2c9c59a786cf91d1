"""From what a torch pickle says of a tensor to the tensor: dtype, strides, byte order, conjugate and negative bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reshard.core.checkpoint import KeyPath
from reshard.core.compute import byteswap, conjugate, negate
from reshard.core.dtypes import dtype
from reshard.core.tensor import Extent, Stored, Tensor
from reshard.errors import Corrupt
from reshard.storage.unpickle import StorageRef, TensorRef


def check_storage(storage: StorageRef, nbytes: int, where: str) -> None:
    """Raise Corrupt unless the record of a storage has as many bytes as the pickle says."""
    claimed = storage.numel * dtype(storage.dtype).itemsize
    if claimed != nbytes:
        raise Corrupt(f"{where}: storage {storage.key} has {nbytes} bytes, the pickle says {claimed}")


def stored(ref: TensorRef, extent: Extent, byteorder: str = "little") -> Tensor:
    """The tensor that `ref` describes, its storage being `extent`.

    Raises Corrupt when it reaches past its storage, Unsupported for dtypes that are not read.
    """
    tensor: Tensor = Stored(dtype(ref.dtype), tuple(ref.size), extent, ref.offset, tuple(ref.stride))
    if byteorder == "big":
        tensor = byteswap(tensor)
    if ref.conj:
        tensor = conjugate(tensor)
    return negate(tensor) if ref.neg else tensor


def walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every leaf of a nested state dict with its path: dicts, lists and tuples are descended, keys become strings.

    Works on cycles and on any depth.
    """
    stack: list[tuple[KeyPath, Any]] = [(path, value)]
    seen: set[int] = set()
    while stack:
        where, item = stack.pop()
        if isinstance(item, dict | list | tuple) and item:
            if id(item) in seen and not isinstance(item, tuple):
                continue
            seen.add(id(item))
            children = item.items() if isinstance(item, dict) else enumerate(item)
            keys = [((*where, key if isinstance(key, int) and not isinstance(item, dict) else str(key)), child)
                    for key, child in children]  # fmt: skip
            stack.extend(reversed(keys))
        else:
            yield where, item


def fqn(path: KeyPath) -> str:
    """The FQN of a path, as DCP's planner joins them."""
    return ".".join(str(key) for key in path)
