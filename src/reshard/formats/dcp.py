"""PyTorch Distributed Checkpoint (DCP), as `torch.distributed.checkpoint.save` writes it.

    DIR/.metadata           a pickled Metadata, written last: state_dict_metadata {fqn: shape, dtype, chunks},
                            storage_data {(fqn, offset): file, offset, length}, planner_data {fqn: path}
    DIR/__<rank>_<k>.distcp entries back to back; an entry is the torch.save archive of one tensor or object

`save(use_collectives=False)` (2.9 and later) leaves one `__<rank>.metadata` a rank instead, each with that rank's
chunks only and replicated ones in all of them. `FileSystemWriter(serialization_format=SAFETENSORS)` puts one
safetensors blob behind the entries of objects; `_extensions` may compress entries with zstd.

Source: pytorch `torch/distributed/checkpoint/{metadata,filesystem,planner,_extension}.py`, 2.0 to 2.15.
TensorProperties has five items up to 2.14 and six from 2.15; before 2.3 it lies in another module. Entries rule over
the metadata where both speak: torch 2.13 writes chunks of tensors sharded twice over one dimension at the wrong place
when sizes do not divide; their true sizes, laid end to end, are taken when they tile the tensor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from reshard.core.box import Box, Shape
from reshard.core.checkpoint import Checkpoint, KeyPath, Origin, same_bytes
from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Concat, Deferred, Extent, Literal, Stored, Tensor, leaves, tiling_problem
from reshard.errors import Corrupt, Incomplete, InputError, ReshardError, Unsupported, listed
from reshard.formats import safetensors
from reshard.formats.torch_tensor import check_storage, stored, walk
from reshard.storage import tar
from reshard.storage.files import Files, LazySource, gc_paused
from reshard.storage.scratch import Scratch, ScratchExtent, stream, zstd
from reshard.storage.torch_zip import SMALL_NBYTES
from reshard.storage.unpickle import DCP_RECORDS, QTensorRef, Rebuilt, Record, TensorRef, TorchDType, load
from reshard.storage.zip_entries import Entry, EntryReader, Framing

NAME = "dcp"
METADATA_LIMIT_NBYTES = 4 << 30
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")


class _Piece(NamedTuple):
    """Where one chunk, or one object, is said to lie."""

    file: str
    offset: int
    nbytes: int
    transforms: tuple[str, ...] = ()


class _Chunk(NamedTuple):
    """A hyper-rectangle of a tensor and where it is stored. Ranks without a share leave chunks with a size of 0."""

    offsets: Shape
    sizes: Shape
    piece: _Piece

    @property
    def is_empty(self) -> bool:
        return 0 in self.sizes


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A tensor as the metadata describes it."""

    dtype: DType
    shape: Shape
    chunks: tuple[_Chunk, ...]
    replicas: tuple[_Chunk, ...] = ()
    """Further copies of chunks, by other ranks."""


@dataclass(slots=True)
class _Index:
    """What all `.metadata` files of a directory say together."""

    tensors: dict[str, _Wanted] = field(default_factory=dict)
    objects: dict[str, _Piece] = field(default_factory=dict)
    paths: dict[str, KeyPath] = field(default_factory=dict)
    version: str = ""


def matches(names: frozenset[str]) -> bool:
    """Whether a directory with these names in it is a complete or broken DCP."""
    return ".metadata" in names or any(_RANK_METADATA.fullmatch(n) or n.endswith(".distcp") for n in names)


def open(path: Path, *, verify: bool = False, is_wanted: Callable[[str], bool] = lambda _: True) -> Checkpoint:
    """The checkpoint in a directory, from its metadata alone; chunks are looked up in the files when wanted.

    With `verify` chunks that several ranks wrote are read and compared. Objects whose FQN is not wanted stay unread:
    there may be a dozen for every parameter. Raises Incomplete when files or chunks are
    missing, Corrupt when the metadata contradicts itself or the files.
    """
    index, sizes = _Index(), _sizes(path)
    metadata = _metadata_files(path, sizes)
    with gc_paused():
        for name in metadata:
            _read_metadata(path / name, index)
        _check_files(path, index, sizes)
        for name, wanted in index.tensors.items():
            _check_chunks(path, name, wanted)
    reader = _Entries(path, index)
    if verify:
        reader.compare_replicas()
    tensors: dict[str, Tensor] = {
        name: Deferred(w.dtype, w.shape, partial(reader.one, name)) for name, w in index.tensors.items()
    }
    objects = reader.objects(is_wanted)
    tensors |= reader.tensors_in_objects
    used = sorted({piece.file for piece in _pieces(index)})
    ranks = {int(m[1]) for m in (re.match(r"__(\d+)", name) for name in used) if m}
    return Checkpoint(
        tensors,
        Origin(
            path,
            NAME,
            f"torch.distributed.checkpoint{' ' + index.version if index.version else ''}",
            world_size=max(ranks) + 1 if ranks else None,
            placements=_placements(index),
            files=tuple(path / name for name in (*metadata, *used)),
        ),
        LazySource(),
        objects=objects,
        paths=index.paths | reader.paths,
        notices=tuple(reader.notices),
        locate=reader.locate,
    )


# ------------------------------------------------------------------------------------------------------- metadata


def _sizes(path: Path) -> dict[str, int]:
    return tar.sizes(path)


def _metadata_files(path: Path, sizes: Mapping[str, int]) -> list[str]:
    if ".metadata" in sizes:
        return [".metadata"]
    ranks = sorted((int(m[1]), m[0]) for m in map(_RANK_METADATA.fullmatch, sizes) if m)
    if not ranks:
        raise Incomplete(
            f"{path} has .distcp files and no .metadata, which is written last: the save did not finish",
            hint="use an earlier checkpoint, or wait until this one is complete",
        )
    missing = sorted(set(range(ranks[-1][0] + 1)) - {rank for rank, _ in ranks})
    if missing:
        raise Incomplete(f"{path}: {listed(f'__{r}.metadata' for r in missing)} missing of {ranks[-1][0] + 1} ranks")
    return [name for _, name in ranks]


def _read_metadata(path: Path, index: _Index) -> None:
    """Add what one metadata file says. Raises Corrupt, naming the file, for anything that is not what DCP writes."""
    if path.stat().st_size > METADATA_LIMIT_NBYTES:
        raise Unsupported(f"{path} has {path.stat().st_size} bytes")
    metadata = load(path.read_bytes(), where=str(path), records=DCP_RECORDS)
    try:
        _index(path, metadata, index)
    except ReshardError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise Corrupt(f"{path} is not a DCP metadata file: {type(error).__name__}: {error}") from error


def _index(path: Path, metadata: Any, index: _Index) -> None:
    fields = _fields(metadata)
    if "bytecheckpoint_version" in fields or "all_tensor_metadata" in fields:
        raise Unsupported(f"{path} is ByteCheckpoint's: its entries are raw storages, not torch.save archives")
    pieces: dict[tuple[str, Shape | None], _Piece] = {}
    for key, info in fields["storage_data"].items():
        where, what = _fields(key), _fields(info)
        offset = where.get("offset")
        pieces[where["fqn"], None if offset is None else tuple(offset)] = _piece(path, where["fqn"], what)
    index.version = str(fields.get("version") or "")
    for name, described in fields["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise Corrupt(f"{path}: an FQN is a {type(name).__name__}")
        what = _fields(described)
        if "chunks" in what:
            _add_tensor(path, index, name, what, pieces)
        elif (name, None) in pieces:
            index.objects.setdefault(name, pieces[name, None])
        else:
            raise Incomplete(f"{path}: {name} has no storage entry")
    for name, keys in (fields.get("planner_data") or {}).items():
        index.paths[name] = tuple(k if isinstance(k, int) else str(k) for k in keys)
        if not keys:
            raise Corrupt(f"{path}: {name!s:.300}: an empty path of keys")


def _fields(record: Record) -> Mapping[str, Any]:
    """The attributes of a metadata object."""
    state = record.state
    if isinstance(state, tuple) and len(state) == 2:  # (dict or None, slots): torch 2.15's checkpointable tensors
        state = {**(state[0] or {}), **(state[1] or {})}
    if state is None:
        return {}
    if not isinstance(state, dict):
        raise TypeError(f"the state of {record!r} is a {type(state).__name__}")
    return state


def _piece(path: Path, fqn: Any, info: Mapping[str, Any]) -> _Piece:
    name, offset, nbytes = info["relative_path"], info["offset"], info["length"]
    if type(name) is not str or type(offset) is not int or type(nbytes) is not int:
        raise Corrupt(f"{path}: {fqn!s:.300}: an entry's place is not (text, number, number)")
    if offset < 0 or nbytes < 0:
        raise Corrupt(f"{path}: {fqn!s:.300}: an entry of {nbytes} bytes at offset {offset} of {name}")
    transforms = info.get("transform_descriptors")
    return _Piece(name, offset, nbytes, tuple(map(str, transforms)) if transforms else ())


def _add_tensor(
    path: Path,
    index: _Index,
    name: str,
    described: Mapping[str, Any],
    pieces: Mapping[tuple[str, Shape | None], _Piece],
) -> None:
    kind, shape = _dtype(path, name, described["properties"]), _shape(path, name, described["size"])
    chunks, missing = [], []
    for chunk in described["chunks"]:
        said = _fields(chunk)
        offsets, sizes = _shape(path, name, said["offsets"]), _shape(path, name, said["sizes"])
        piece = pieces.get((name, offsets))
        if piece is None:
            missing.append(list(offsets))
        else:
            chunks.append(_Chunk(offsets, sizes, piece))
    known = index.tensors.get(name)
    replicas: tuple[_Chunk, ...] = ()
    if missing and known is None:
        raise Incomplete(f"{path}: {name}: no storage entry for the chunks at {listed(map(str, missing))}")
    if known is not None:
        if (known.dtype, known.shape) != (kind, shape):
            raise Corrupt(f"{path}: {name} is {kind} {list(shape)} here, {known.dtype} {list(known.shape)} elsewhere")
        have = {c.offsets for c in known.chunks}
        replicas = (*known.replicas, *(c for c in chunks if c.offsets in have))
        chunks = [*known.chunks, *(c for c in chunks if c.offsets not in have)]
    index.tensors[name] = _Wanted(kind, shape, tuple(chunks), replicas)


def _dtype(path: Path, name: str, properties: Any) -> DType:
    state = properties.state
    said = state[0] if isinstance(state, tuple) else _fields(properties)["dtype"]
    if not isinstance(said, TorchDType):
        raise Corrupt(f"{path}: {name}: the dtype is {said!r}"[:300])
    return dtype(said.name)


def _shape(path: Path, name: str, size: Any) -> Shape:
    shape: Shape = tuple(size)
    for n in shape:
        if type(n) is not int or not 0 <= n < 1 << 62:
            raise Corrupt(f"{path}: {name}: a shape or offset with {n!r} in it"[:300])
    return shape


def _check_files(path: Path, index: _Index, sizes: Mapping[str, int]) -> None:
    """Every entry lies in a file of this directory. Raises Incomplete, or Corrupt for names that lead elsewhere."""
    needed: dict[str, int] = {}
    for piece in _pieces(index):
        end = piece.offset + piece.nbytes
        if end > needed.get(piece.file, -1):
            needed[piece.file] = end
    missing, short, have = [], [], dict(sizes)
    for name, end in sorted(needed.items()):
        if name not in have:
            if name.startswith("/") or "\\" in name or ".." in Path(name).parts or "\0" in name:
                raise Corrupt(f"{path / '.metadata'} names the file {name!r}, which is not in its directory")
            inner = path / name
            if not inner.is_file() or not inner.resolve().is_relative_to(path.resolve()):
                missing.append(name)
                continue
            have[name] = inner.stat().st_size
        if have[name] < end:
            short.append(f"{name} ({have[name]} of at least {end} bytes)")
    if missing:
        raise Incomplete(
            f"{path}: {len(missing)} of {len(needed)} shard files are missing: {listed(missing)}"
            f" ({_contents(index, lambda piece: piece.file in missing)})",
            hint="copy them from the ranks that wrote them",
        )
    if short:
        beyond = _contents(index, lambda piece: piece.offset + piece.nbytes > have[piece.file])
        raise Incomplete(f"{path}: shard files are shorter than their metadata says: {listed(short)} ({beyond})")


def _contents(index: _Index, is_meant: Callable[[_Piece], bool]) -> str:
    """What the pieces that are meant belong to, in words."""
    fqns = [name for name, wanted in index.tensors.items() if any(is_meant(c.piece) for c in wanted.chunks)]
    fqns += [name for name, piece in index.objects.items() if is_meant(piece)]
    return f"parts of {listed(fqns, 3)}"


def _pieces(index: _Index) -> Iterable[_Piece]:
    for wanted in index.tensors.values():
        for chunk in (*wanted.chunks, *wanted.replicas):
            yield chunk.piece
    yield from index.objects.values()


def _check_chunks(path: Path, name: str, wanted: _Wanted) -> None:
    """The chunks tile the tensor, or could if those that claim to be empty are not."""
    rank = len(wanted.shape)
    if any(len(c.offsets) != rank or len(c.sizes) != rank for c in wanted.chunks):
        raise Corrupt(f"{path}: {name}: chunks of another rank than the shape {list(wanted.shape)}")
    if _tiles_in_order(wanted):
        return
    boxes = sorted((Box.at(c.offsets, c.sizes) for c in wanted.chunks if not c.is_empty), key=lambda b: b.start)
    problem = tiling_problem(wanted.shape, boxes)
    if problem is not None and not any(c.is_empty for c in wanted.chunks):
        raise type(problem)(f"{path}: {name}: {problem}", hint="the checkpoint is damaged or was saved incompletely")


def _tiles_in_order(wanted: _Wanted) -> bool:
    """The usual case, quickly: chunks cut one dimension and come in order."""
    shape, chunks = wanted.shape, wanted.chunks
    if len(chunks) == 1:
        return chunks[0].sizes == shape and not any(chunks[0].offsets)
    for dim, size in enumerate(shape):
        rest, at = (*shape[:dim], *shape[dim + 1 :]), 0
        for offsets, sizes, _ in chunks:
            if (
                offsets[dim] != at
                or (*sizes[:dim], *sizes[dim + 1 :]) != rest
                or any(offsets[:dim] + offsets[dim + 1 :])
            ):
                break
            at += sizes[dim]
        else:
            return at == size
    return False


def _placements(index: _Index) -> tuple[str, ...]:
    """How tensors are cut, in words, most frequent first: `Shard(0) x 8`."""
    counts: dict[str, int] = defaultdict(int)
    for wanted in index.tensors.values():
        grid = [len({c.offsets[d] for c in wanted.chunks if not c.is_empty}) for d in range(len(wanted.shape))]
        cuts = [f"Shard({d}) x {n}" for d, n in enumerate(grid) if n > 1]
        counts[", ".join(cuts) or "whole"] += 1
    return tuple(f"{what} ({n} tensors)" for what, n in sorted(counts.items(), key=lambda item: -item[1]))


# -------------------------------------------------------------------------------------------------------- entries


class _Layout(NamedTuple):
    """What the pickle of an entry says: the same for all entries of one dtype and shape."""

    ref: TensorRef
    nbytes: int
    plain: Stored | None
    """The tensor over another entry's bytes; None when there are bits to apply to them."""


class _Entries:
    """The entries of a checkpoint's files, looked up when they are wanted."""

    def __init__(self, path: Path, index: _Index) -> None:
        self.path = path
        self.index = index
        self.files = Files(scattered=True)
        self.notices: list[str] = []
        self.tensors_in_objects: dict[str, Tensor] = {}
        self.paths: dict[str, KeyPath] = {}
        self._reader = EntryReader()
        self._scratch: Scratch | None = None
        self._layouts: dict[int, tuple[Framing, _Layout]] = {}
        self._blobs: dict[tuple[str, int], safetensors.File] = {}

    def one(self, name: str) -> Tensor:
        return self.locate([name])[name]

    def locate(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these FQNs, the headers of every entry read and checked."""
        return self._located({name: self.index.tensors[name] for name in names if name in self.index.tensors})

    def _located(self, wanted: Mapping[str, _Wanted]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [_NOT_FOUND] * len(w.chunks) for name, w in wanted.items()}
        queues: dict[str, list[tuple[_Chunk, str, int]]] = defaultdict(list)
        for name, w in wanted.items():
            for number, chunk in enumerate(w.chunks):
                queues[chunk.piece.file].append((chunk, name, number))
        with gc_paused():
            for file, queue in queues.items():
                queue.sort(key=lambda item: item[0].piece.offset)
                self._locate_in(file, queue, wanted, parts)
            self._check_distinct(queues, parts)
            return {name: _assembled(self.path, name, w, parts[name]) for name, w in wanted.items()}

    def compare_replicas(self) -> None:
        """Raise Corrupt unless all copies of a chunk hold the same bits."""
        source = LazySource(self.files)
        for name, wanted in self.index.tensors.items():
            first = {chunk.offsets: chunk for chunk in wanted.chunks}
            for copy in wanted.replicas:
                pair = [_Wanted(wanted.dtype, c.sizes, (c._replace(offsets=(0,) * len(c.sizes)),))
                        for c in (first[copy.offsets], copy)]  # fmt: skip
                a, b = (self._located({name: one})[name] for one in pair)
                if not same_bytes(a, b, source):
                    raise Corrupt(
                        f"{self.path}: {name}: {first[copy.offsets].piece.file} and {copy.piece.file} hold different"
                        f" copies of the chunk at {list(copy.offsets)}"
                    )

    def objects(self, is_wanted: Callable[[str], bool]) -> dict[str, Any]:
        """What is not a tensor, by FQN; tensors that hide in it go to `tensors_in_objects`."""
        found: dict[str, Any] = {}
        for name, piece in self.index.objects.items():
            if not is_wanted(name):
                continue
            try:
                found[name] = self._object(name, piece)
            except InputError as error:
                raise _about(name, error) from error
        return found

    def _locate_in(
        self,
        file: str,
        queue: Sequence[tuple[_Chunk, str, int]],
        wanted: Mapping[str, _Wanted],
        parts: Mapping[str, list[Tensor]],
    ) -> None:
        archives = []
        for chunk, name, number in queue:
            kind = wanted[name].dtype
            if chunk.piece.transforms:
                parts[name][number] = _for(name, self._compressed, chunk, kind)
            elif chunk.piece.nbytes == kind.nbytes(chunk.sizes):  # an archive is longer than its tensor
                parts[name][number] = _for(name, self._in_blob, chunk, name)
            else:
                archives.append((chunk, name, number))
        path = str(self.path / file)
        extents = [(chunk.piece.offset, chunk.piece.nbytes) for chunk, _, _ in archives]
        entries = self._reader.locate(partial(self.files.pread, path), self.files.nbytes(path), extents, path)
        for _, name, number in archives:
            try:
                parts[name][number] = self._tensor(path, next(entries))
            except InputError as error:
                raise _about(name, error) from error

    def _check_distinct(
        self, queues: Mapping[str, Sequence[tuple[_Chunk, str, int]]], parts: Mapping[str, Sequence[Tensor]]
    ) -> None:
        """Raise Corrupt when one file is a copy of another: all chunks of both in the same places, with the same
        checksums, and not one value throughout, as what was set to zeros or ones has."""
        first: dict[tuple[tuple[str, int, int, int | None], ...], str] = {}
        for file, queue in queues.items():
            extents = [(name, leaf.extent) for _, name, n in queue for leaf in leaves(parts[name][n]) if leaf.size]
            looks = tuple((name, e.offset, e.nbytes, e.crc32) for name, e in extents)
            if not looks or any(crc is None for *_, crc in looks):
                continue
            other = first.setdefault(looks, file)
            if other == file:
                continue
            largest = sorted(extents, key=lambda item: -item[1].nbytes)[:_NUM_COMPARED]
            varied = next((name for name, e in largest if self._is_varied(e)), None)
            if varied is not None:
                raise Corrupt(
                    f"{self.path}: {file} and {other} hold the same bytes for different chunks of {varied}"
                    f"{f' and {len(looks) - 1} more' if len(looks) > 1 else ''}: one was copied over the other",
                    hint="copy both again from the ranks that wrote them",
                )

    def _is_varied(self, extent: Extent) -> bool:
        """Whether the beginning of an extent holds more than one value repeated."""
        data = self.files.pread(extent.path, extent.offset, min(extent.nbytes, 1 << 16))
        return len(data) > _ELEMENT_NBYTES and data[_ELEMENT_NBYTES:] != data[:-_ELEMENT_NBYTES]

    def _tensor(self, path: str, entry: Entry, plain: ScratchExtent | None = None) -> Tensor:
        """The one tensor of an entry, which lies in a shard file or, decompressed, in `plain`."""
        framing = entry.framing
        known = self._layouts.get(id(framing))
        if known is None:
            known = self._layouts[id(framing)] = (framing, _layout(path, entry))
        layout = known[1]
        offset, crc32 = entry.start + framing.storages[0].offset, entry.crc32s[0]
        if plain is None:
            extent = Extent(path, offset, layout.nbytes, crc32)
        else:
            extent = replace(plain, offset=offset, nbytes=layout.nbytes, crc32=crc32)
        if layout.plain is not None:
            return layout.plain.over(extent)
        return stored(layout.ref, extent, framing.byteorder)

    def _compressed(self, chunk: _Chunk, kind: DType) -> Tensor:
        limit = kind.nbytes(chunk.sizes) + (1 << 20)
        plain = self._decompressed(chunk.piece, limit)
        read = partial(self.files.pread, plain.path)
        (entry,) = self._reader.locate(read, plain.nbytes, [(0, plain.nbytes)], plain.path)
        return self._tensor(plain.path, entry, plain)

    def _decompressed(self, piece: _Piece, limit_nbytes: int) -> ScratchExtent:
        where = f"{self.path / piece.file} at byte {piece.offset}"
        if piece.transforms != ("stream.zstd/1",):
            raise Unsupported(f"{where}: stored through the extension {listed(piece.transforms)}")
        self._scratch = self._scratch or Scratch()
        extent = Extent(str(self.path / piece.file), piece.offset, piece.nbytes)
        return self._scratch.decoded(zstd(stream(self.files, extent), where), limit_nbytes, where)

    def _in_blob(self, chunk: _Chunk, name: str) -> Tensor:
        file, offset = chunk.piece.file, chunk.piece.offset
        if chunk.is_empty:
            return _NOT_FOUND
        if (file, offset) not in self._blobs:
            self._blobs[file, offset] = safetensors.read(self.path / file, self.files, offset)
        blob = self._blobs[file, offset]
        if name not in blob.tensors:
            raise Corrupt(f"{blob.path}: the safetensors header at byte {offset} does not list it")
        return blob.tensors[name]

    def entry(self, piece: _Piece) -> tuple[str, Entry]:
        """(`FILE at byte N`, the archive there) of an object."""
        path, start, nbytes = str(self.path / piece.file), piece.offset, piece.nbytes
        if piece.transforms:
            plain = self._decompressed(piece, SMALL_NBYTES)
            path, start, nbytes = plain.path, 0, plain.nbytes
        read = partial(self.files.pread, path)
        (entry,) = self._reader.locate(read, self.files.nbytes(path), [(start, nbytes)], path)
        return f"{path} at byte {start}", entry

    def _object(self, name: str, piece: _Piece) -> Any:
        where, entry = self.entry(piece)
        value = load(entry.framing.payload, where=where)
        if entry.framing.storages:
            extents = _storage_extents(where.rpartition(" at byte ")[0], entry)
            for keys, leaf in walk(value, self.index.paths.get(name, (name,))):
                if isinstance(leaf, TensorRef):
                    extent = extents.get(leaf.storage.key)
                    if extent is None:
                        raise Corrupt(f"{where}: no storage {leaf.storage.key!r} in the archive")
                    check_storage(leaf.storage, extent.nbytes, where)
                    label = ".".join((name, *map(str, keys[len(self.index.paths.get(name, (name,))) :])))
                    self.tensors_in_objects[label] = stored(leaf, extent, entry.framing.byteorder)
                    self.paths[label] = keys
        return value


_NUM_COMPARED = 8
"""Of two files that look alike, so many of the largest chunks are looked into."""
_ELEMENT_NBYTES = 16
"""A multiple of the size of every element."""

_NOT_FOUND = Literal(dtype("U8"), (0,), b"")
"""Stands for the part of a chunk that nobody reads."""


def _layout(path: str, entry: Entry) -> _Layout:
    where = f"{path} at byte {entry.start}"
    value = load(entry.framing.payload, where=where)
    if isinstance(value, QTensorRef):
        value = value.tensor
    if isinstance(value, Rebuilt) and isinstance(value.inner, TensorRef):
        value = value.inner
    if not isinstance(value, TensorRef):
        raise Unsupported(f"{where}: a tensor is expected, the entry holds {type(value).__name__} {value!r}"[:400])
    if len(entry.framing.storages) != 1 or entry.framing.storages[0].key != value.storage.key:
        raise Corrupt(f"{where}: one storage {value.storage.key!r} is expected in the archive")
    nbytes = entry.framing.storages[0].nbytes
    check_storage(value.storage, nbytes, where)
    node = stored(value, Extent(path, 0, nbytes), entry.framing.byteorder)
    return _Layout(value, nbytes, node if isinstance(node, Stored) else None)


def _storage_extents(path: str, entry: Entry) -> dict[str, Extent]:
    storages = zip(entry.framing.storages, entry.crc32s, strict=True)
    return {s.key: Extent(path, entry.start + s.offset, s.nbytes, crc) for s, crc in storages}


def _assembled(path: Path, name: str, wanted: _Wanted, parts: Sequence[Tensor]) -> Tensor:
    """One tensor of its chunks, at the places that the metadata claims and the entries confirm."""
    chunks = wanted.chunks
    if all(
        part.shape == chunk.sizes or (chunk.is_empty and not part.size)
        for chunk, part in zip(chunks, parts, strict=True)
    ):
        places = [(Box.at(c.offsets, c.sizes), p) for c, p in zip(chunks, parts, strict=True) if not c.is_empty]
    else:
        places = _repaired(path, name, wanted, parts)
    if len(places) == 1 and places[0][1].shape == wanted.shape and places[0][1].dtype is wanted.dtype:
        return places[0][1]
    try:
        return Concat(wanted.dtype, wanted.shape, tuple(places))
    except InputError as error:
        raise type(error)(f"{path}: {name}: the entries are not what .metadata says: {error}") from error


def _repaired(path: Path, name: str, wanted: _Wanted, parts: Sequence[Tensor]) -> list[tuple[Box, Tensor]]:
    """Places for entries whose size is not what their chunk claims: end to end, if that tiles the tensor.

    Raises Corrupt, saying what lies where, if it does not.
    """
    found = sorted(zip(wanted.chunks, parts, strict=True), key=lambda item: item[0].offsets)
    lies = [(c, p) for c, p in found if p.shape != c.sizes and (p.size or not c.is_empty)]
    problem = Corrupt(
        f"{path}: {name}: {len(lies)} of {len(found)} chunks are not the size that .metadata claims: "
        + listed((f"{list(c.sizes)} at {list(c.offsets)} holds {list(p.shape)}" for c, p in lies), 3),
        hint="torch 2.13 and later write such checkpoints for uneven FSDP x TP; save with sizes that divide",
    )
    full = [p for _, p in found if p.size]
    dims = {d for c, _ in found for d in range(len(wanted.shape)) if c.offsets[d] not in (0,)}
    if len(dims) != 1 or any(len(p.shape) != len(wanted.shape) or p.dtype is not wanted.dtype for p in full):
        raise problem
    (dim,) = dims
    rest = [n for d, n in enumerate(wanted.shape) if d != dim]
    if any([n for d, n in enumerate(p.shape) if d != dim] != rest for p in full):
        raise problem
    if sum(p.shape[dim] for p in full) != wanted.shape[dim]:
        raise problem
    places, at = [], 0
    for part in full:
        start = tuple(at if d == dim else 0 for d in range(len(wanted.shape)))
        places.append((Box.at(start, part.shape), part))
        at += part.shape[dim]
    return places


def _for(name: str, make: Callable[..., Tensor], *args: Any) -> Tensor:
    try:
        return make(*args)
    except InputError as error:
        raise _about(name, error) from error


def _about(name: str, error: InputError) -> InputError:
    return error if str(error).startswith(f"{name}: ") else type(error)(f"{name}: {error}", hint=error.hint)


def object_pickles(path: Path) -> Iterator[tuple[str, bytes]]:
    """(where, pickle) of every object in the entries of a directory, unread, for an audit."""
    index, sizes = _Index(), _sizes(path)
    for name in _metadata_files(path, sizes):
        _read_metadata(path / name, index)
    reader = _Entries(path, index)
    for piece in index.objects.values():
        if not piece.transforms and piece.file in sizes:
            where, entry = reader.entry(piece)
            yield where, entry.framing.payload
