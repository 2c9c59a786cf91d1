"""safetensors files, both directions.

    offset      bytes
    0           u64 little-endian: length of the header, H
    8           H bytes of JSON: {"__metadata__": {str: str}, FQN: {"dtype", "shape", "data_offsets": [begin, end]}}
    8 + H       the data: each tensor row-major at its offsets, back to back, no byte left over

Source: huggingface/safetensors 0.8, README "Format" and `safetensors/src/tensor.rs`. The header is padded with spaces
so that the data starts at a multiple of 8. Types that the format lacks (complex32, complex128, quantized) are written
as their bytes, U8 with one more dimension, and named in `__metadata__["reshard.dtypes"]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from reshard.core.checkpoint import Checkpoint, Origin
from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Extent, Stored, Tensor
from reshard.errors import Corrupt, Incomplete, Unsupported
from reshard.storage.files import Files, LazySource
from reshard.storage.plan import FilePlan, Segment

NAME = "safetensors"
HEADER_LIMIT_NBYTES = 100_000_000
"""What the safetensors library itself accepts."""
RAW_DTYPES = "reshard.dtypes"
_F4_PER_BYTE = 2
_METADATA = "__metadata__"
_LFS_POINTER = b"version "
"""How a file begins that `git clone` left in the place of a large one. No header is as long as this says."""


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]

    @property
    def is_unsaved(self) -> bool:
        return not self.dtype and not self.shape and self.data_offsets[0] == self.data_offsets[1]


@dataclass(frozen=True, slots=True)
class File:
    """One safetensors file, its header read."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    unsaved: tuple[str, ...] = ()
    """FQNs without dtype, shape or bytes: torch's consolidation lists names of its mapping that nobody saved."""


def open(path: Path) -> Checkpoint:
    """One file as a checkpoint; only its header is read. Raises as `read` does."""
    files = Files()
    return Checkpoint(read(path, files).tensors, Origin(path, NAME, files=(path,)), LazySource(files))


def read(path: Path, files: Files | None = None, start: int = 0) -> File:
    """Read the header of one file, or of what fills a file from byte `start` on, and check it against the size.

    Raises Corrupt or Incomplete, naming the file and the FQN, unless every tensor lies in the file, has as many bytes
    as its dtype and shape say, and all of them tile the data exactly.
    """
    files = files or Files()
    nbytes = files.nbytes(str(path)) - start
    if nbytes < 8:
        raise Incomplete(f"{path}: {nbytes} bytes are no safetensors file", hint="it may still be being written")
    head = files.pread(str(path), start, 8)
    if head == _LFS_POINTER:
        raise Incomplete(f"{path} is a Git LFS pointer, not the file itself", hint="git lfs pull")
    header_nbytes = int.from_bytes(head, "little")
    if header_nbytes > min(HEADER_LIMIT_NBYTES, nbytes - 8):
        raise Corrupt(f"{path}: a safetensors header of {header_nbytes} bytes in a file of {nbytes}")
    try:
        header = msgspec.json.decode(files.pread(str(path), start + 8, header_nbytes), type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop(_METADATA, b"{}"), type=dict[str, str])
        entries = {fqn: msgspec.json.decode(raw, type=_Entry) for fqn, raw in header.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{path}: the safetensors header is not what it should be: {error}") from error
    _check_tiling(path, entries, nbytes - 8 - header_nbytes)
    raw_dtypes = _raw_dtypes(path, metadata)
    tensors: dict[str, Tensor] = {}
    unsaved = tuple(fqn for fqn, entry in entries.items() if entry.is_unsaved)
    for fqn, entry in entries.items():
        if entry.is_unsaved:
            continue
        kind, shape = _logical(path, fqn, entry, raw_dtypes)
        begin, end = entry.data_offsets
        if kind.nbytes(shape) != end - begin:
            raise Corrupt(f"{path}: {fqn}: {end - begin} bytes for {kind} of shape {list(shape)}")
        tensors[fqn] = Stored(kind, shape, Extent(str(path), start + 8 + header_nbytes + begin, end - begin))
    return File(path, tensors, metadata, unsaved)


def plan_file(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FilePlan:
    """One file of these tensors, in this order except that wider dtypes come first, as the library writes them."""
    if _METADATA in tensors:
        raise Unsupported(
            f"a tensor is called {_METADATA}, which safetensors keeps for itself", hint="write a .pt file"
        )
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, Any] = {}
    raw, offset = {}, 0
    for fqn, tensor in ordered:
        name, shape = _stored_as(tensor)
        if not tensor.dtype.in_safetensors:
            raw[fqn] = {"dtype": tensor.dtype.torch, "shape": list(tensor.shape)}
        entries[fqn] = {"dtype": name, "shape": shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    metadata = dict(metadata) | ({RAW_DTYPES: msgspec.json.encode(raw).decode()} if raw else {})
    header = msgspec.json.encode({_METADATA: metadata} | entries)
    header += b" " * (-len(header) % 8)
    prefix = len(header).to_bytes(8, "little") + header
    return FilePlan(path, (Segment(prefix), *(Segment(tensor, fqn) for fqn, tensor in ordered)))


def _check_tiling(path: Path, entries: Mapping[str, _Entry], data_nbytes: int) -> None:
    at = 0
    for fqn, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin < 0 or end < begin or min(entry.shape, default=0) < 0:
            raise Corrupt(f"{path}: {fqn}: offsets {begin} to {end}, shape {entry.shape}")
        if begin != at:
            what = "overlaps the one before it" if begin < at else f"leaves {begin - at} bytes before it unused"
            raise Corrupt(f"{path}: {fqn}: its data at {begin} {what}")
        at = end
    if at > data_nbytes:
        raise Incomplete(
            f"{path}: {data_nbytes} bytes of data, the header describes {at}",
            hint="the file was truncated or is still being written",
        )
    if at < data_nbytes:
        raise Corrupt(f"{path}: {data_nbytes - at} bytes after the last tensor belong to none")


def _raw_dtypes(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        return msgspec.json.decode(metadata.get(RAW_DTYPES, "{}"), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise Corrupt(f"{path}: {RAW_DTYPES} in the metadata: {error}") from error


def _logical(path: Path, fqn: str, entry: _Entry, raw: Mapping[str, Any]) -> tuple[DType, tuple[int, ...]]:
    if fqn in raw and entry.dtype == "U8":
        kind = dtype(str(raw[fqn]["dtype"]))
        return kind, tuple(entry.shape[:-1])
    try:
        kind = dtype(entry.dtype)
    except Unsupported as error:
        raise Unsupported(f"{path}: {fqn}: {error}", hint=error.hint) from error
    if kind.name == "F4":
        if not entry.shape or entry.shape[-1] % _F4_PER_BYTE:
            raise Unsupported(f"{path}: {fqn}: 4-bit values of shape {entry.shape} do not fill whole bytes")
        return kind, (*entry.shape[:-1], entry.shape[-1] // _F4_PER_BYTE)
    return kind, tuple(entry.shape)


def _stored_as(tensor: Tensor) -> tuple[str, list[int]]:
    shape = list(tensor.shape)
    if not tensor.dtype.in_safetensors:
        return "U8", [*shape, tensor.dtype.itemsize]
    if tensor.dtype.name == "F4" and shape:
        return "F4", [*shape[:-1], shape[-1] * _F4_PER_BYTE]
    return tensor.dtype.name, shape


def names(files: Iterable[File]) -> dict[str, Tensor]:
    """All tensors of several files. Raises Corrupt when two of them hold one FQN."""
    tensors: dict[str, Tensor] = {}
    where: dict[str, Path] = {}
    for file in files:
        for fqn, tensor in file.tensors.items():
            if fqn in tensors:
                raise Corrupt(f"{fqn} is in both {where[fqn]} and {file.path}")
            tensors[fqn], where[fqn] = tensor, file.path
    return tensors
