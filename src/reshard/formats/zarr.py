"""zarr version 2 arrays, as Megatron-Core and NeMo 1 wrote them until 2024. Read only.

    DIR/KEY/.zarray        JSON: shape, chunks, dtype, order, compressor, fill_value, dimension_separator
    DIR/KEY/0.1            the chunk at those grid coordinates, of the full chunk's size even at the edges;
                           `0/1` where the separator is a slash; `0` for an array without dimensions
    DIR/KEY/shard_0_4.pt   torch.save of what is not a tensor, such as an extra state

A chunk that is not there means "filled with fill_value" to zarr. To a checkpoint it means that a rank's file was lost,
so it is an error here, whatever the fill value. Chunks without compression are read where they lie; the others are
decoded once into temporary files.

    dtype      `bfloat16` (tensorstore; zarr with ml_dtypes' name), `|V2` and `<V2` (numpy's name for ml_dtypes'
               bfloat16), `<f4`, `>f4`, `|u1`, `|b1`, ...
    compressor null, zlib, gzip, bz2, lzma with Python's own; zstd with the `zstd` extra; blosc, lz4 with `zarr`

Source: the zarr storage specification version 2; Megatron-LM `core/dist_checkpointing/strategies/zarr.py`, core 0.2 to
0.15; numcodecs 0.16 (the four bytes before LZ4, the header of Blosc).
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from reshard.core.box import Box, Shape
from reshard.core.checkpoint import Checkpoint, Origin
from reshard.core.compute import byteswap
from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Concat, Deferred, Extent, Stored, Tensor, row_major
from reshard.errors import Corrupt, Incomplete, NotFound, Unsupported, listed
from reshard.formats import torch_save
from reshard.storage import tar
from reshard.storage.files import Files, LazySource
from reshard.storage.scratch import GZIP, ZLIB, Scratch, inflate, stream, zstd

NAME = "zarr"
HEADER = ".zarray"
_HEADER_LIMIT_NBYTES = 1 << 20
_MAX_NUM_DIMS = 32
_MAX_NUM_CHUNKS = 1 << 22
_PIECE_NBYTES = 1 << 20
_MAX_DECODED_NBYTES = 4 << 30
"""Of one compressed chunk; the codecs themselves end at 2 GiB."""

_DTYPES = {
    "b1": "BOOL", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64", "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64",
    "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "c16": "C128", "V2": "BF16",
}  # fmt: skip
_NAMED_DTYPES = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"})


@dataclass(frozen=True, slots=True)
class Header:
    """What a `.zarray` says, checked."""

    dtype: DType
    shape: Shape
    chunks: Shape
    """Of one chunk."""
    is_big_endian: bool = False
    is_fortran: bool = False
    separator: str = "."
    compressor: str = ""
    """The codec's id; empty for none."""
    codec: Mapping[str, Any] = field(default_factory=dict)
    """Its configuration."""

    @property
    def grid(self) -> Shape:
        """Number of chunks along each dimension."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))

    def places(self) -> Iterator[tuple[str, Box]]:
        """(key, place) of every chunk."""
        for at in product(*map(range, self.grid)):
            start = tuple(i * c for i, c in zip(at, self.chunks, strict=True))
            stop = tuple(min(a + c, n) for a, c, n in zip(start, self.chunks, self.shape, strict=True))
            yield self.separator.join(map(str, at)) or "0", Box(start, stop)


# ------------------------------------------------------------------------------------------------------------ header


def header(data: bytes, where: str) -> Header:
    """The header in the bytes of a `.zarray`. Raises Corrupt for what is none, Unsupported for what is not read."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{where} is not JSON: {error}") from error
    if not isinstance(said, dict) or said.get("zarr_format") != 2:
        raise Unsupported(f"{where}: zarr version 2 was expected")
    shape, chunks = _sizes(said.get("shape"), where, "shape", 0), _sizes(said.get("chunks"), where, "chunks", 1)
    if len(shape) != len(chunks):
        raise Corrupt(f"{where}: {len(shape)} dimensions in chunks of {len(chunks)}")
    kind, is_big_endian = _dtype(said.get("dtype"), where)
    order, separator = said.get("order", "C"), said.get("dimension_separator", ".")
    if order not in ("C", "F") or separator not in (".", "/"):
        raise Corrupt(f"{where}: order {order!r:.20}, dimension_separator {separator!r:.20}")
    if said.get("filters"):
        raise Unsupported(f"{where}: filters are not read: {said['filters']!r:.200}")
    compressor, codec = _codec(said.get("compressor"), where)
    if compressor and kind.nbytes(chunks) > _MAX_DECODED_NBYTES:
        raise Unsupported(f"{where}: compressed chunks of {kind.nbytes(chunks)} bytes")
    return Header(kind, shape, chunks, is_big_endian, order == "F", separator, compressor, codec)


def _sizes(value: Any, where: str, what: str, least: int) -> Shape:
    is_shape = isinstance(value, list) and all(type(n) is int and least <= n < 1 << 48 for n in value)
    if not is_shape or len(value) > _MAX_NUM_DIMS:
        raise Corrupt(f"{where}: the {what} is {value!r:.100}")
    return tuple(value)


def _dtype(said: Any, where: str) -> tuple[DType, bool]:
    """(dtype, whether it is big-endian)."""
    if isinstance(said, str):
        if said in _NAMED_DTYPES:
            return dtype(said), False
        if said[:1] in ("<", ">", "|") and said[1:] in _DTYPES:
            found = dtype(_DTYPES[said[1:]])
            return found, said[0] == ">" and found.itemsize > 1
    raise Unsupported(f"{where}: the dtype {said!r:.100} is not one of a tensor")


def _codec(said: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    if said is None:
        return "", {}
    if not isinstance(said, dict) or not isinstance(said.get("id"), str):
        raise Corrupt(f"{where}: the compressor is {said!r:.100}")
    if said["id"] not in _DECODERS:
        raise Unsupported(f"{where}: the compressor {said['id']!r:.60} is not read", hint=f"known: {listed(_DECODERS)}")
    return said["id"], said


# ------------------------------------------------------------------------------------------------------------ arrays


class Arrays:
    """Makes tensors of arrays; holds what their compressed chunks decode to."""

    def __init__(self, files: Files | None = None) -> None:
        self.files = files or Files()
        self.lock = threading.Lock()
        self._scratch: Scratch | None = None

    def tensor(self, name: str, about: Header, chunks: Mapping[str, Extent]) -> Tensor:
        """The array of this header, each chunk by its key being all of an extent.

        Raises Incomplete, naming the chunks, when some are missing or short, Corrupt when one is too long.
        """
        num_chunks = math.prod(about.grid)
        if num_chunks > _MAX_NUM_CHUNKS:
            raise Unsupported(f"{name}: {num_chunks} chunks")
        if num_chunks > len(chunks):
            missing = (key for key, _ in about.places() if key not in chunks)
            raise _lost(name, num_chunks - len(chunks), num_chunks, missing)
        parts, missing_keys = [], []
        for key, place in about.places():
            if key in chunks:
                parts.append((place, self._chunk(name, about, key, chunks[key], place)))
            else:
                missing_keys.append(key)
        if missing_keys:
            raise _lost(name, len(missing_keys), num_chunks, iter(missing_keys))
        if len(parts) == 1 and parts[0][1].shape == about.shape:
            return parts[0][1]
        return Concat(about.dtype, about.shape, tuple(parts))

    def _chunk(self, name: str, about: Header, key: str, extent: Extent, place: Box) -> Tensor:
        """The part of a chunk that is inside the array."""
        nbytes = about.dtype.nbytes(about.chunks)
        if about.compressor:
            find = _Decoded(self, f"{name}: chunk {key}", about, extent).tensor
            whole: Tensor = Deferred(about.dtype, about.chunks, find)
        elif extent.nbytes != nbytes:
            what = f"{name}: chunk {key} has {extent.nbytes} bytes, {nbytes} are expected ({extent.path})"
            raise Corrupt(what) if extent.nbytes > nbytes else Incomplete(what, hint=_COPY)
        else:
            whole = _laid_out(about, extent)
        return whole[tuple(slice(0, n) for n in place.shape)] if place.shape else whole

    def decoded(self, about: Header, extent: Extent, where: str) -> Extent:
        """A compressed chunk, decoded into a temporary file. One at a time: the caller holds `lock`."""
        nbytes = about.dtype.nbytes(about.chunks)
        self._scratch = self._scratch or Scratch()
        pieces = _DECODERS[about.compressor](stream(self.files, extent), nbytes, where)
        plain = self._scratch.decoded(pieces, nbytes, where)
        if plain.nbytes != nbytes:
            raise Corrupt(f"{where} decodes to {plain.nbytes} bytes, {nbytes} are expected")
        return plain


@dataclass(slots=True)
class _Decoded:
    """A compressed chunk, decoded when someone wants it, once."""

    arrays: Arrays
    where: str
    header: Header
    extent: Extent
    found: Tensor | None = None

    def tensor(self) -> Tensor:
        with self.arrays.lock:
            if self.found is None:
                self.found = _laid_out(self.header, self.arrays.decoded(self.header, self.extent, self.where))
            return self.found


def _laid_out(about: Header, extent: Extent) -> Tensor:
    """A whole chunk, in whatever order and byte order."""
    strides = tuple(reversed(row_major(about.chunks[::-1]))) if about.is_fortran else ()
    tensor = Stored(about.dtype, about.chunks, extent, 0, strides)
    return byteswap(tensor) if about.is_big_endian else tensor


_COPY = "copy the array's directory again from where it was saved: what is missing is no fill value but weights"


def _lost(name: str, count: int, num_chunks: int, missing: Iterator[str]) -> Incomplete:
    first = [key for key, _ in zip(missing, range(10), strict=False)]
    more = f" and {count - len(first)} more" if count > len(first) else ""
    return Incomplete(f"{name}: {count} of {num_chunks} chunks are missing: {', '.join(first)}{more}", hint=_COPY)


# ------------------------------------------------------------------------------------------------------------ codecs
#
# Each takes the compressed pieces, how many bytes they must give, and where they are, and gives the plain pieces.


def _zlib(pieces: Iterator[bytes], nbytes: int, where: str) -> Iterator[bytes]:
    return inflate(pieces, where, ZLIB)


def _gzip(pieces: Iterator[bytes], nbytes: int, where: str) -> Iterator[bytes]:
    return inflate(pieces, where, GZIP)


def _decompressed(pieces: Iterator[bytes], where: str, decoder: Any, damage: type[Exception]) -> Iterator[bytes]:
    """With one of the decompressors that ask for input when they have given all they can."""
    try:
        for piece in pieces:
            yield decoder.decompress(piece, _PIECE_NBYTES)
            while not decoder.needs_input and not decoder.eof:
                yield decoder.decompress(b"", _PIECE_NBYTES)
    except (damage, EOFError) as error:
        raise Corrupt(f"{where}: {error}") from error
    if not decoder.eof:
        raise Corrupt(f"{where}: the compressed chunk is cut short")


def _bz2(pieces: Iterator[bytes], nbytes: int, where: str) -> Iterator[bytes]:
    import bz2

    return _decompressed(pieces, where, bz2.BZ2Decompressor(), OSError)


def _lzma(pieces: Iterator[bytes], nbytes: int, where: str) -> Iterator[bytes]:
    import lzma

    return _decompressed(pieces, where, lzma.LZMADecompressor(memlimit=1 << 28), lzma.LZMAError)


def _zstd(pieces: Iterator[bytes], nbytes: int, where: str) -> Iterator[bytes]:
    return zstd(pieces, where)


def _blosc(pieces: Iterator[bytes], nbytes: int, where: str) -> Iterator[bytes]:
    """Bytes 4 to 8 and 12 to 16 of its header are the plain and the packed size."""
    packed = b"".join(pieces)
    plain, stored = int.from_bytes(packed[4:8], "little"), int.from_bytes(packed[12:16], "little")
    if len(packed) < 16 or plain != nbytes or stored != len(packed):
        raise Corrupt(f"{where}: {len(packed)} bytes of Blosc for {nbytes}, its header says {stored} for {plain}")
    yield _by_numcodecs("blosc", packed, where)


def _lz4(pieces: Iterator[bytes], nbytes: int, where: str) -> Iterator[bytes]:
    """The first four bytes are the plain size."""
    packed = b"".join(pieces)
    if int.from_bytes(packed[:4], "little") != nbytes:
        raise Corrupt(f"{where}: LZ4 of {int.from_bytes(packed[:4], 'little')} bytes, {nbytes} are expected")
    yield _by_numcodecs("lz4", packed, where)


def _by_numcodecs(codec: str, packed: bytes, where: str) -> bytes:
    try:
        import numcodecs
    except ImportError as error:
        raise Unsupported(f"{where} is compressed with {codec}", hint="pip install 'reshard[zarr]'") from error
    try:
        return bytes(numcodecs.get_codec({"id": codec}).decode(packed))
    except (RuntimeError, ValueError, TypeError) as error:
        raise Corrupt(f"{where}: {error}") from error


_DECODERS: Mapping[str, Callable[[Iterator[bytes], int, str], Iterator[bytes]]] = {
    "zlib": _zlib, "gzip": _gzip, "bz2": _bz2, "lzma": _lzma, "zstd": _zstd, "blosc": _blosc, "lz4": _lz4,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- a directory


def matches(path: Path) -> bool:
    """Whether a directory is an array, or one of arrays."""
    if (path / HEADER).is_file():
        return True
    return any((path / name / HEADER).is_file() for name in tar.names(path))


def open(path: Path, *, is_wanted: Callable[[str], bool] = lambda _: True) -> Checkpoint:
    """The arrays in a directory, or the array that it is, by name; headers and listings are read, no chunk.

    What is not wanted is not looked at. Raises Incomplete when chunks are missing, or a header among them.
    """
    arrays = Arrays()
    directories = [path] if (path / HEADER).is_file() else sorted(p for p in path.iterdir() if p.is_dir())
    tensors: dict[str, Tensor] = {}
    objects: dict[str, Any] = {}
    files: list[Path] = []
    for directory in directories:
        sizes = _listing(directory)
        if HEADER in sizes:
            if is_wanted(directory.name):
                about = header(_header_bytes(directory), str(directory / HEADER))
                chunks = _chunks(directory, sizes, about.separator)
                tensors[directory.name] = arrays.tensor(str(directory), about, chunks)
                files += [directory / HEADER, *(directory / key for key in sorted(chunks))]
        elif any(name.replace(".", "").isdigit() for name in sizes):
            raise Incomplete(f"{directory} holds chunks and no {HEADER}", hint=_COPY)
        else:
            for name in sorted(sizes):
                full = f"{directory.name}/{name.removesuffix('.pt')}"
                if name.endswith(".pt") and is_wanted(full):
                    objects[full] = torch_save.read(directory / name, arrays.files).value
                    files.append(directory / name)
    if not tensors:
        raise NotFound(f"{path} holds no zarr array that is wanted: {listed(d.name for d in directories)}")
    origin = Origin(path, NAME, "zarr version 2", files=tuple(files))
    return Checkpoint(tensors, origin, LazySource(arrays.files), objects=objects)


def _header_bytes(directory: Path) -> bytes:
    path = directory / HEADER
    if path.stat().st_size > _HEADER_LIMIT_NBYTES:
        raise Corrupt(f"{path} has {path.stat().st_size} bytes")
    return path.read_bytes()


def _listing(directory: Path) -> dict[str, int]:
    """Sizes of the files in a directory by name."""
    return tar.sizes(directory)


def _chunks(directory: Path, sizes: Mapping[str, int], separator: str) -> dict[str, Extent]:
    """The chunk files of an array by key."""
    if separator == ".":
        names = {name: size for name, size in sizes.items() if name.replace(".", "").isdigit()}
    else:
        found = (p for p in directory.rglob("*") if p.is_file() and not p.is_symlink())
        nested = ((p.relative_to(directory).as_posix(), p) for p in found)
        names = {key: p.stat().st_size for key, p in nested if key.replace("/", "").isdigit()}
    return {name: Extent(str(directory / name), 0, size) for name, size in names.items()}
