"""The writing half of DCP: a directory that `torch.distributed.checkpoint.load` reads; `dcp.py` is the reading half.

    DIR/__0_<k>.distcp      entries back to back: objects first, then tensors; each a torch.save archive
    DIR/.metadata           a pickled Metadata: per FQN dtype, shape and chunks, per chunk the file, offset and length

Each tensor is one chunk, however many ranks will read it: DCP reads what a rank wants of a chunk. `<k>` counts files
where a largest size is asked for, as `FileSystemWriter(thread_count=n)` counts them. All offsets follow from dtypes,
shapes and the pickles of the objects, so nothing is read to plan.

Source: pytorch `torch/distributed/checkpoint/{metadata,filesystem,default_planner}.py`, 2.13. Metadata of this release
is read by 2.4 and later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, cast

from reshard.core.box import Shape
from reshard.core.checkpoint import KeyPath
from reshard.core.dtypes import DType
from reshard.core.tensor import Tensor
from reshard.errors import Incomplete, Unsupported
from reshard.formats.torch_archive import Archive, of_tensor, of_value, segments
from reshard.storage.files import gc_paused
from reshard.storage.pickler import dumps
from reshard.storage.plan import FilePlan, Segment
from reshard.storage.unpickle import Global, Size, TorchDType

METADATA = ".metadata"
VERSION = "1.0.0"
"""Of the metadata, since PyTorch 2.9."""

_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA = Global(_MODULE, "Metadata")
_STORAGE_META = Global(_MODULE, "StorageMeta")
_TENSOR = Global(_MODULE, "TensorStorageMetadata")
_BYTES = Global(_MODULE, "BytesStorageMetadata")
_CHUNK = Global(_MODULE, "ChunkStorageMetadata")
_INDEX = Global(_MODULE, "MetadataIndex")
_PROPERTIES = Global(_MODULE, "TensorProperties")
_MEMORY_FORMAT = Global(_MODULE, "_MEM_FORMAT_ENCODING")
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_LAYOUT = Global("torch.serialization", "_get_layout")


@dataclass(frozen=True, slots=True, eq=False)
class ByteItem:
    """What is not a tensor: an inert value, as `unpickle` gives it. Tensors may lie in its dicts, lists and tuples."""

    value: Any


Entries: TypeAlias = Mapping[str, Tensor | ByteItem]
"""By FQN, in the order in which they are written."""


class _Placed(NamedTuple):
    """Where one entry lies."""

    file: str
    offset: int
    nbytes: int


def plan(
    entries: Entries,
    *,
    directory: str = "",
    paths: Mapping[str, KeyPath] | None = None,
    max_file_nbytes: int | None = None,
) -> tuple[FilePlan, ...]:
    """The files of a DCP directory; `.metadata` is the last.

    Args:
        directory: Where they lie in the output, such as `iter_0000000`.
        paths: How each FQN was nested, `(fqn,)` where one is missing. None as with `flatten_state_dict=False`.
        max_file_nbytes: A file is closed when the next tensor would make it larger; a tensor is never cut.

    Raises Incomplete when there is nothing to write, Unsupported for what torch.save does not write.
    """
    if not entries:
        raise Incomplete(f"nothing to write into {directory or 'a DCP directory'}")
    if max_file_nbytes is not None and max_file_nbytes <= 0:
        raise Unsupported(f"shard files of {max_file_nbytes} bytes")
    files: list[FilePlan] = []
    placed: dict[str, _Placed] = {}
    with gc_paused():
        for number, archives in enumerate(_fill_files(_archives(entries), max_file_nbytes)):
            files.append(_file(directory, f"__0_{number}.distcp", archives, placed))
        metadata = dumps(_metadata(entries, placed, paths), protocol=4)
    return (*files, FilePlan(_inside(directory, METADATA), (Segment(metadata),)))


def _inside(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


# -------------------------------------------------------------------------------------------------------- entries


_Named: TypeAlias = tuple[str, Archive, int]
"""(FQN, archive, its bytes)."""


def _archives(entries: Entries) -> Iterator[_Named]:
    """Objects first, as torch's writer sorts them."""
    written: dict[int, tuple[Archive, int]] = {}  # Megatron has many names for one empty object
    for name, entry in entries.items():
        if isinstance(entry, ByteItem):
            if id(entry) not in written:
                archive = of_value(entry.value)
                written[id(entry)] = archive, archive.nbytes
            yield name, *written[id(entry)]
    laid_out: dict[tuple[DType, Shape], tuple[Archive, int]] = {}
    for name, entry in entries.items():
        if isinstance(entry, Tensor):
            known = laid_out.get((entry.dtype, entry.shape))
            if known is None:  # all but the CRCs is the same for tensors of one dtype and shape
                archive = of_tensor(name, entry)
                known = laid_out[entry.dtype, entry.shape] = archive, archive.nbytes
            yield name, replace(known[0], storages=((name, entry),)), known[1]


def _fill_files(archives: Iterator[_Named], max_nbytes: int | None) -> Iterator[list[_Named]]:
    """Archives by file, in order."""
    current: list[_Named] = []
    nbytes = 0
    for item in archives:
        if max_nbytes is not None and current and nbytes + item[2] > max_nbytes:
            yield current
            current, nbytes = [], 0
        current.append(item)
        nbytes += item[2]
    yield current


def _file(directory: str, name: str, archives: Sequence[_Named], placed: dict[str, _Placed]) -> FilePlan:
    """One file; adds to `placed` where each entry lies in it."""
    path, offset = _inside(directory, name), 0
    found: list[Segment] = []
    text = bytearray()  # of objects that hold no data to be filled in: they are many and small, one segment is enough
    for fqn, archive, nbytes in archives:
        placed[fqn] = _Placed(name, offset, nbytes)
        offset += nbytes
        if archive.text is not None:
            text += archive.text
            continue
        if text:
            found.append(Segment(bytes(text)))
            text.clear()
        found += segments(archive, path, len(found))
    return FilePlan(path, (*found, Segment(bytes(text))) if text else tuple(found), crc32=True)


# ------------------------------------------------------------------------------------------------------- metadata


def _metadata(entries: Entries, placed: Mapping[str, _Placed], paths: Mapping[str, KeyPath] | None) -> Any:
    """The Metadata object that torch's planner and writer would leave behind."""
    described = _Described()
    return instance(
        _METADATA,
        {
            "state_dict_metadata": {name: described.entry(entry) for name, entry in entries.items()},
            "planner_data": None if paths is None else {name: paths.get(name, (name,)) for name in entries},
            "storage_data": {
                described.index(name, entries[name]): instance(
                    _INFO, {"relative_path": at.file, "offset": at.offset, "length": at.nbytes}
                )
                for name, at in placed.items()
            },
            "storage_meta": instance(
                _STORAGE_META, {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
            ),
            "version": VERSION,
        },
    )


def instance(cls: Global, state: object = None) -> Any:
    """An instance that a pickle makes without calling its class, and then gives this state."""
    made = cast(Any, cls).__new__(cls)
    if state is not None:
        made.__setstate__(state)
    return made


class _Described:
    """Descriptions of tensors. Equal parts are one object, which a pickle holds once, unless readers change them:
    Megatron's planner sets the size of one tensor for a while."""

    def __init__(self) -> None:
        self._properties: dict[DType, Any] = {}
        self._sizes: dict[Shape, Size] = {}
        self._chunks: dict[Shape, Any] = {}
        self._memory_format = _MEMORY_FORMAT(0)
        self._layout = _LAYOUT("torch.strided")
        self._bytes = instance(_BYTES)

    def entry(self, entry: Tensor | ByteItem) -> Any:
        if isinstance(entry, ByteItem):
            return self._bytes
        size, chunks = self._size(entry.shape), [self._whole(entry.shape)]
        return instance(_TENSOR, {"properties": self._properties_of(entry.dtype), "size": size, "chunks": chunks})

    def index(self, name: str, entry: Tensor | ByteItem) -> Any:
        """The key of an entry's place; the index says which of the tensor's chunks it is."""
        if isinstance(entry, ByteItem):
            return instance(_INDEX, {"fqn": name, "index": None})
        return instance(_INDEX, {"fqn": name, "index": 0, "offset": self._size((0,) * len(entry.shape))})

    def _whole(self, shape: Shape) -> Any:
        if shape not in self._chunks:
            offsets = self._size((0,) * len(shape))
            self._chunks[shape] = instance(_CHUNK, {"offsets": offsets, "sizes": self._size(shape)})
        return self._chunks[shape]

    def _size(self, shape: Shape) -> Size:
        return self._sizes.setdefault(shape, Size(shape))

    def _properties_of(self, kind: DType) -> Any:
        if kind not in self._properties:
            # dtype, layout, requires_grad, memory format, pin_memory
            state = (TorchDType(kind.torch), self._layout, False, self._memory_format, False)
            self._properties[kind] = instance(_PROPERTIES, state)
        return self._properties[kind]
