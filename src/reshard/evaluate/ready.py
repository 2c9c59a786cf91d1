"""Is a checkpoint whole, and are its bytes final? By polling: events do not cross NFS, Lustre or object stores.

Three things must hold: nothing in its directory has changed between two looks; the reader of its format finds every
shard that its metadata names; and what a model needs besides weights, config.json, is there or comes from `base`.
What is then known of it is a fingerprint: names, sizes and times of the model's shards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from reshard.errors import Incomplete, NotFound
from reshard.formats.detect import EMA, MODEL, find, numbered

if TYPE_CHECKING:
    from reshard.formats.detect import Found

Stamps = Mapping[str, tuple[int, int]]
"""(size, mtime_ns) of files by their paths relative to a checkpoint."""
EMA_DIRECTORY = "pytorch_ema_model_fsdp_0"
_EMA_WRITER = "LMMs-Engine (FSDP2)"
_CONTAINERS = ("checkpoints", "checkpoint")
_NOT_THE_TRAINER = ("eval",)
"""What evaluations put into a checkpoint."""
_REOPEN = 30
_LMMS_DIRECTORY = re.compile(r"pytorch_(ema_)?model_fsdp_\d+")


class NoSuchWeights(NotFound):
    """The checkpoint is whole and does not hold this kind of weights."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A checkpoint with nothing missing."""

    path: Path
    files: Stamps
    """The shards of the model."""
    nbytes: int
    writer: str

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.files)


@dataclass(slots=True)
class Look:
    """What the last looks at a directory saw."""

    stamp: str
    """Of everything in it."""
    times: int = 1
    """How often in a row it looked like this."""
    problem: str = ""
    """Why it is not whole, though nothing changes; empty before it was opened."""

    def again(self, stamp: str) -> Look:
        """What another look makes of it. Now and then it is opened again: a problem may have been the disk's."""
        if stamp != self.stamp:
            return Look(stamp)
        times = self.times + 1
        return Look(stamp, times, "" if times % _REOPEN == 0 else self.problem)


def steps(run: Path) -> list[tuple[int, Path]]:
    """The numbered checkpoints of a run, or of the one directory in it that is for checkpoints; by ascending step."""
    found = numbered(run)
    for name in _CONTAINERS:
        if not found and (run / name).is_dir():
            found = numbered(run / name)
    return found


def stamp_of(path: Path) -> str | None:
    """What changes whenever anything in a directory does; None when there is no such directory."""
    if not path.is_dir():
        return None
    return fingerprint({name: (stat.st_size, stat.st_mtime_ns) for name, stat in walk(path)})


def walk(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(relative path, status) of every file below a directory that the trainer wrote."""
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        try:
            entries = sorted(os.scandir(path / inner), key=lambda entry: entry.name)
        except FileNotFoundError:
            continue
        for entry in entries:
            name = f"{inner}/{entry.name}" if inner else entry.name
            try:
                if entry.is_dir():
                    waiting += [] if name in _NOT_THE_TRAINER else [name]
                else:
                    yield name, entry.stat()
            except FileNotFoundError:
                continue


def stamps(path: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Of these files, those that are there."""
    found = {}
    for name in names:
        try:
            stat = os.stat(path / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        found[name] = (stat.st_size, stat.st_mtime_ns)
    return found


def fingerprint(files: Stamps) -> str:
    """32 digits that tell a set of files by names, sizes and times."""
    lines = "".join(f"{name}\0{size} {time}\n" for name, (size, time) in sorted(files.items()))
    return xxhash.xxh3_128_hexdigest(lines.encode(errors="surrogateescape"))


def whole(path: Path, kind: str, base: str | None) -> Whole:
    """The checkpoint, opened. Reads headers only.

    Raises InputError that says what is missing or damaged; NoSuchWeights when only this kind of weights is.
    """
    from reshard.formats import open_found

    found = _found(path, kind)
    opened = open_found(found, (MODEL,))
    _check_config(path, found, base)
    names = [os.path.relpath(file, path) for file in opened.origin.files]
    files = stamps(path, names)
    missing = sorted(set(names) - set(files))
    if missing or not files:
        raise Incomplete(f"{path}: {missing[0] if missing else 'its shards'} went away")
    return Whole(path, files, sum(size for size, _ in files.values()), _EMA_WRITER if kind == "ema" else found.writer)


def _found(path: Path, kind: str) -> Found:
    if kind != "ema":
        return find(path)
    if (path / EMA_DIRECTORY).is_dir():
        return find(path, state_dict_dirname=EMA_DIRECTORY)
    regular = find(path)
    if regular.part(EMA) is None and (path / "config.json").is_file():  # which comes after all weights
        raise NoSuchWeights(f"{path} has no averaged weights ({EMA_DIRECTORY})")
    raise Incomplete(f"{path} has no {EMA_DIRECTORY} yet")


def _check_config(path: Path, found: Found, base: str | None) -> None:
    """Raise Incomplete while there is no config.json, and none will come from elsewhere."""
    part = next(p for p in found.parts if p.role == MODEL)
    if part.format == "rank_files" and _LMMS_DIRECTORY.fullmatch(part.path.name):
        if not (path / "config.json").is_file():  # LMMs-Engine writes it after its shards, even if `base` has one too
            raise Incomplete(f"{path}: the shards are there, config.json is not yet")
        return
    if part.format == "megatron" or base is not None:
        return
    names = ("config.json", "adapter_config.json")
    if not any((place / name).is_file() for place in found.companions for name in names):
        raise Incomplete(
            f"{path}: there is no config.json beside the shards, so the whole model would not load",
            hint="base: MODEL in the settings names a model to take config and tokenizer from",
        )
