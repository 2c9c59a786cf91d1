"""Values as torch.save archives that are planned, not written: whole `.pt` files, and the entries of `.distcp` files.

    value with Tensors in it --refer--> pickle + storages --lay_out--> pieces --segments--> segments of a FilePlan

A tensor's data is a segment of its own, which the engine fills; what depends on its CRC-32 is a Seal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from reshard.core.tensor import Tensor, row_major
from reshard.errors import Unsupported
from reshard.storage import torch_zip
from reshard.storage.pickler import dumps
from reshard.storage.plan import Digests, FilePlan, Seal, Segment
from reshard.storage.torch_zip import Piece, archive_prefix, lay_out
from reshard.storage.unpickle import STORAGE_DTYPES, StorageRef, TensorRef

STREAM_PREFIX = "archive"
"""The folder of an archive that was saved to a stream, as every entry of a `.distcp` file is."""

_STORAGE_KINDS = {name: kind for kind, name in STORAGE_DTYPES.items() if kind != "UntypedStorage"}
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True, eq=False)
class Archive:
    """One archive, laid out; the pieces tile it."""

    pieces: tuple[Piece, ...]
    storages: tuple[tuple[str, Tensor], ...]
    """(name, tensor) by number of the storage. Only tensors of a model have a name."""

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def text(self) -> bytes | None:
        """All of it, where no tensor of a model and no data to be filled in are part of it."""
        constants = [piece.data for piece in self.pieces if isinstance(piece, torch_zip.Constant)]
        is_whole = len(constants) == len(self.pieces) and not any(name for name, _ in self.storages)
        return b"".join(constants) if is_whole else None


def tensor_ref(name: str, tensor: Tensor, key: str) -> TensorRef:
    """What a pickle says of a whole, contiguous tensor whose storage is `key`. `name` is for messages.

    Raises Unsupported for quantized integers.
    """
    kind = tensor.dtype.torch
    if tensor.dtype.name.startswith("Q"):
        raise Unsupported(
            f"{name}: {kind} is not written: its scale and zero point are not part of the tensor",
            hint="leave it out, or write safetensors, where its integers are kept",
        )
    storage_kind = _STORAGE_KINDS.get(kind, "UntypedStorage")
    numel = tensor.nbytes if storage_kind == "UntypedStorage" else tensor.size
    return TensorRef(StorageRef(storage_kind, key, "cpu", numel), kind, 0, tensor.shape, row_major(tensor.shape))


def of_tensor(name: str, tensor: Tensor) -> Archive:
    """The archive of one tensor, as DCP writes it."""
    payload = dumps(tensor_ref(name, tensor, "0"))
    return Archive(tuple(lay_out(STREAM_PREFIX, payload, [tensor.nbytes])), ((name, tensor),))


def of_value(value: object, prefix: str = STREAM_PREFIX) -> Archive:
    """The archive of any inert value; Tensors may lie in its dicts, lists and tuples.

    Raises Unsupported for what cannot be pickled.
    """
    storages: list[tuple[str, Tensor]] = []
    payload = dumps(_referred(value, storages))
    pieces = lay_out(prefix, payload, [tensor.nbytes for _, tensor in storages])
    return Archive(tuple(pieces), tuple(storages))


def file_of(path: str, value: object) -> FilePlan:
    """A file that `torch.load` makes `value` of."""
    return FilePlan(path, tuple(segments(of_value(value, archive_prefix(path)), path)), crc32=True)


def segments(archive: Archive, path: str, first: int = 0) -> list[Segment]:
    """An archive as segments of the file at `path`, in which `first` others stand before them.

    Empty tensors have no place in an archive; they come last, so that every tensor has its segment.
    """
    found: list[Segment] = []
    where: dict[int, int] = {}  # storage to segment
    for piece in archive.pieces:
        match piece:
            case torch_zip.Constant(data):
                found.append(Segment(data))
            case torch_zip.Slot(index, _):
                where[index] = first + len(found)
                name, tensor = archive.storages[index]
                found.append(Segment(tensor, name))
            case torch_zip.Seal(nbytes, storages, fill):
                at = tuple(where[index] for index in storages)
                found.append(Segment(Seal(nbytes, partial(_sealed, path, at, fill))))
    return found + [Segment(tensor, name) for name, tensor in archive.storages if name and not tensor.nbytes]


def _sealed(path: str, at: Sequence[int], fill: Any, digests: Digests) -> bytes:
    sealed: bytes = fill([digests[path, index].crc32 for index in at])
    return sealed


def _referred(value: object, storages: list[tuple[str, Tensor]], depth: int = 0) -> object:
    """The value with each Tensor in it replaced by what a pickle says of it."""
    if depth > _MAX_DEPTH:
        raise Unsupported(f"a value nested more than {_MAX_DEPTH} deep is not written")
    if isinstance(value, Tensor):
        storages.append(("", value))
        return tensor_ref("a tensor in an object", value, str(len(storages) - 1))
    if type(value) is dict:
        return {key: _referred(item, storages, depth + 1) for key, item in value.items()}
    if type(value) is list:
        return [_referred(item, storages, depth + 1) for item in value]
    if type(value) is tuple:
        return tuple(_referred(item, storages, depth + 1) for item in value)
    return value
