"""The manifest: what was written, from what, with a digest of every byte.

    OUT/reshard.json, or OUT.safetensors.reshard.json beside a single file

    {"reshard": version, "source": {...}, "options": {...}, "output": kind,
     "files": {path: {"nbytes", "segments": [{"offset", "nbytes", "xxh3_128", "fqn"?, "dtype"?, "shape"?}]}},
     "xxh3_128": of the manifest itself, these 32 digits being zeros}

The segments of a file tile it, so a manifest that verifies leaves no byte unproven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from reshard.core.tensor import Tensor
from reshard.errors import Corrupt, NotFound
from reshard.storage.files import Files
from reshard.storage.plan import Digest, Digests, FilePlan, Plan, Seal, Segment
from reshard.storage.run import BLOCK_NBYTES, Progress, in_threads
from reshard.storage.staging import beside

FILE_NAME = "reshard.json"
_ZEROS = "0" * 32
_ANY = Digest(_ZEROS)
_TAIL = b'"\n}\n'
"""What follows the digits of the manifest's own digest."""


class SegmentRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """Some bytes of a file and their digest."""

    offset: int
    nbytes: int
    xxh3_128: str
    fqn: str = ""
    dtype: str = ""
    shape: list[int] | None = None


class FileRecord(msgspec.Struct, frozen=True):
    """One file; the segments tile it."""

    nbytes: int
    segments: list[SegmentRecord]


class Manifest(msgspec.Struct, frozen=True):
    """All that is said of an output."""

    reshard: str
    source: dict[str, Any]
    options: dict[str, Any]
    output: str
    files: dict[str, FileRecord]
    xxh3_128: str
    """Of the file that this is, with zeros here."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found."""

    num_files: int
    num_tensors: int
    nbytes: int
    problems: tuple[str, ...]
    """What is not as the manifest says, a sentence each. Empty when all is well."""


def with_manifest(plan: Plan, version: str) -> Plan:
    """The plan and one more file: the manifest of all others."""

    def make(digests: Digests) -> bytes:
        files = {file.path: _record(file, digests) for file in plan.files}
        manifest = Manifest(
            version, dict(plan.facts["source"]), dict(plan.facts["options"]), str(plan.facts["output"]), files, _ZEROS
        )
        return sealed(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")

    everything = {(file.path, index): _ANY for file in plan.files for index in range(len(file.segments))}
    seal = Seal(len(make(everything)), make)
    return replace(plan, files=(*plan.files, FilePlan(FILE_NAME, (Segment(seal),))))


def sealed(text: bytes) -> bytes:
    """A manifest with its own digest in the place of its last 32 digits."""
    head, tail = text[: -len(_TAIL) - len(_ZEROS)], text[-len(_TAIL) :]
    return head + xxhash.xxh3_128_hexdigest(head + _ZEROS.encode() + tail).encode() + tail


def read(output: Path) -> Manifest:
    """The manifest of an output. Raises NotFound when there is none, Corrupt when it is not as it was written."""
    path = output / FILE_NAME if output.is_dir() else beside(output, FILE_NAME)
    if not path.is_file():
        raise NotFound(
            f"{output} has no manifest ({path.name})",
            hint="it was not written by reshard; `reshard verify OUT --against SRC` compares it with its source",
        )
    try:
        text = path.read_bytes()
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{path}: not a manifest: {error}") from error
    if sealed(text) != text:
        raise Corrupt(f"{path}: the manifest was changed after it was written")
    return manifest


def verify(output: Path, threads: int | None = None, progress: Progress | None = None) -> Verified:
    """Read every byte of an output again and hold it against its manifest."""
    manifest = read(output)
    files, problems = Files(), []
    work: list[tuple[str, Path, SegmentRecord]] = []
    for name, record in manifest.files.items():
        path = (output / name) if output.is_dir() else (beside(output, name) if name else output)
        if not _is_inside(name):
            problems.append(f"the manifest names {name!r}, outside of the output")
        elif not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != record.nbytes:
            problems.append(f"{path} has {path.stat().st_size} bytes, {record.nbytes} were written")
        else:
            problems += _untiled(path, record)
            work += [(name, path, segment) for segment in record.segments]

    def check(item: tuple[str, Path, SegmentRecord]) -> None:
        _, path, segment = item
        if _digest(files, path, segment, progress) != segment.xxh3_128:
            what = f"tensor {segment.fqn}" if segment.fqn else f"bytes {segment.offset} to {_end(segment)}"
            problems.append(f"{path}: {what}: not the bytes that were written")

    in_threads([item for item in work if _end(item[2]) <= item[1].stat().st_size], check, threads)
    num_tensors = sum(bool(segment.fqn) for _, _, segment in work)
    return Verified(
        len(manifest.files), num_tensors, sum(r.nbytes for r in manifest.files.values()), tuple(sorted(problems))
    )


def _record(file: FilePlan, digests: Digests) -> FileRecord:
    segments = []
    for index, offset, segment in file.placed():
        done = digests[file.path, index].xxh3_128
        if isinstance(segment.payload, Tensor) and segment.name:
            tensor = segment.payload
            segments.append(
                SegmentRecord(offset, segment.nbytes, done, segment.name, tensor.dtype.name, list(tensor.shape))
            )
        else:
            segments.append(SegmentRecord(offset, segment.nbytes, done))
    return FileRecord(file.nbytes, segments)


def _untiled(path: Path, record: FileRecord) -> Sequence[str]:
    at = 0
    for segment in record.segments:
        if segment.offset != at or segment.nbytes < 0:
            return [f"{path}: the manifest says nothing of the bytes at {at}"]
        at += segment.nbytes
    return [] if at == record.nbytes else [f"{path}: the manifest says nothing of the bytes at {at}"]


def _digest(files: Files, path: Path, segment: SegmentRecord, progress: Progress | None) -> str:
    hasher = xxhash.xxh3_128()
    for at in range(segment.offset, _end(segment), BLOCK_NBYTES):
        nbytes = min(BLOCK_NBYTES, _end(segment) - at)
        hasher.update(files.pread(str(path), at, nbytes))
        if progress is not None:
            progress(nbytes, segment.fqn)
    return hasher.hexdigest()


def _end(segment: SegmentRecord) -> int:
    return segment.offset + segment.nbytes


def _is_inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in Path(name).parts
