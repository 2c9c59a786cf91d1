"""The steps of a run that one process takes as many do: its files, its tensors, its seals, and what it is known by."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from reshard.core.tensor import Tensor
from reshard.errors import Mismatch, NotFound
from reshard.storage import tar
from reshard.storage.move import (
    BLOCK_NBYTES,
    Mover,
    Progress,
    Task,
    digest_at,
    digest_at_task,
    digest_of,
    in_threads,
    pwrite_all,
)
from reshard.storage.plan import Digest, FilePlan, Plan, Seal
from reshard.storage.staging import JournalRead, beside, create, fsync_directory, inode, journal_lines, staged_name
from reshard.version import __version__

Stamp = Sequence[tuple[str, int, int, int]]
"""Path, size, time of the last change in nanoseconds, and inode of every file that is read."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run: what is written, and how."""

    plan: Plan
    destination: Path
    """As the user named it."""
    final: Path
    """As it is, where that is a symbolic link."""
    stamp: Stamp = field(repr=False)
    fingerprint: str
    """Of the plan, the source and this version: what an interrupted run must have in common to be gone on with."""
    threads: int | None
    block_nbytes: int
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a job, or of the part of one rank."""

    digests: dict[tuple[str, int], Digest] = field(repr=False)
    """By file and segment; of the other ranks' too on the first alone."""
    num_checked: int = 0
    """Source records whose CRC-32 was confirmed."""
    kept_nbytes: int = 0
    """Taken over from an interrupted run."""
    told: tuple[str, ...] = ()
    """What the caller of the run had to say when all was read."""


@contextmanager
def opened(
    files: Sequence[FilePlan], folder: Path, open_one: Callable[[Path, int], int] = create
) -> Iterator[dict[str, int]]:
    """Descriptors of staged files by their path in the plan."""
    fds: dict[str, int] = {}
    try:
        for file in files:
            fds[file.path] = open_one(folder / staged_name(file), file.nbytes)
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)


def carry(
    job: Job,
    tasks: Sequence[Task],
    fds: Mapping[str, int],
    known: Mapping[tuple[str, int], Digest],
    note: Callable[[str, int, Digest], None],
    mover: Mover,
) -> tuple[dict[tuple[str, int], Digest], int]:
    """Bring tensors to their places, but for those that stand there by their known digests.

    The digests of all, and how many bytes were kept. What is moved is noted.
    """
    digests: dict[tuple[str, int], Digest] = {}
    todo, kept = [], 0
    for task in tasks:
        place = task.file.path, task.index
        before = known.get(place)
        if before and digest_at_task(fds[task.file.path], task, job.block_nbytes) == before:
            digests[place] = before
            kept += task.tensor.nbytes
            if job.progress is not None:
                job.progress(task.tensor.nbytes, task.name)
        else:
            todo.append(task)

    def work(task: Task) -> None:
        done = mover.move(task, fds[task.file.path])
        digests[task.file.path, task.index] = done
        note(task.file.path, task.index, done)

    in_threads(todo, work, job.threads)
    return digests, kept


def write_constants(files: Sequence[FilePlan], fds: Mapping[str, int], digests: dict[tuple[str, int], Digest]) -> None:
    """Write the bytes of the plan itself, to files that have a descriptor; adds to `digests`."""
    for file in files:
        for index, offset, segment in file.placed():
            if isinstance(segment.payload, bytes):
                if file.path in fds:
                    pwrite_all(fds[file.path], segment.payload, offset)
                digests[file.path, index] = digest_of(segment.payload, crc32=True)


def write_seals(plan: Plan, fds: Mapping[str, int], digests: dict[tuple[str, int], Digest]) -> None:
    """Write what depends on digests, in the order of the plan; adds to `digests`."""
    for file in plan.files:
        for index, offset, segment in file.placed():
            if isinstance(segment.payload, Seal):
                data = segment.payload.make(digests)
                if len(data) != segment.nbytes:
                    raise AssertionError(f"{file.path}: a seal of {len(data)} bytes, planned {segment.nbytes}")
                pwrite_all(fds[file.path], data, offset)
                digests[file.path, index] = digest_of(data, crc32=True)


def flush(fds: Mapping[str, int]) -> None:
    """Have the disk keep what was written."""
    for fd in fds.values():
        os.fsync(fd)


def flush_names(plan: Plan, folder: Path) -> None:
    """Have the disk keep the names of the files."""
    for directory in {folder, *((folder / f.path).parent for f in plan.files)}:
        fsync_directory(directory)


def may_stand(job: Job, staging: Path) -> bool:
    """Whether an earlier run of this job came as far as the commit."""
    lines = journal_lines(staging / "journal")
    return bool(lines) and lines[0] == job.fingerprint.encode() and JournalRead(lines).committing is not None


def standing(job: Job, staging: Path) -> dict[tuple[str, int], Digest] | None:
    """The digests of a destination that an earlier run completed without getting to clear up; None for any other."""
    plan, final = job.plan, job.final
    journal = JournalRead(journal_lines(staging / "journal"))
    if journal.committing is None or journal.committing != inode(final):
        return None
    digests: dict[tuple[str, int], Digest] = {}
    for seals in (False, True):
        for file in plan.files:
            path = final / file.path if not plan.is_one_file else beside(final, file.path) if file.path else final
            if not _holds(file, path, seals, journal.known, digests):
                return None
    return digests


def _holds(
    file: FilePlan,
    path: Path,
    seals: bool,
    known: Mapping[tuple[str, int], Digest],
    digests: dict[tuple[str, int], Digest],
) -> bool:
    """Whether the seals of a file, or all else of it, are what the plan and the journal say; adds to `digests`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        for index, offset, segment in file.placed():
            payload = segment.payload
            if isinstance(payload, Seal) is not seals:
                continue
            found = digest_at(fd, offset, segment.nbytes, file.crc32, BLOCK_NBYTES)
            if isinstance(payload, Tensor):
                wanted = known.get((file.path, index))
            else:
                wanted = digest_of(payload.make(digests) if isinstance(payload, Seal) else payload, file.crc32)
            if found != wanted:
                return False
            digests[file.path, index] = found
        return os.fstat(fd).st_size == file.nbytes
    finally:
        os.close(fd)


def source_stamp(plan: Plan) -> Stamp:
    """What tells a source that changed. Raises NotFound where a file of it is not there."""
    stamps = []
    for path in plan.sources():
        try:
            stat = tar.status(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"{path}: no such file") from error
        stamps.append((path, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return stamps


def check_unchanged(job: Job) -> None:
    """Raise Mismatch when the source is not what it was when the job began."""
    try:
        changed = source_stamp(job.plan) != job.stamp
    except NotFound:
        changed = True
    if changed:
        raise Mismatch(
            f"the source of {job.destination} changed while it was read",
            hint="run again when the checkpoint is no longer being written",
        )


def fingerprint(plan: Plan, stamp: Stamp) -> str:
    """Of everything that decides which bytes are written."""
    hasher = xxhash.xxh3_128(repr((__version__, stamp, sorted(plan.facts.items(), key=str))).encode())
    _add_layout(hasher, plan)
    return hasher.hexdigest()


def layout(plan: Plan) -> str:
    """Of the files, their constant bytes and their tensors' names and sizes."""
    hasher = xxhash.xxh3_128()
    _add_layout(hasher, plan)
    return hasher.hexdigest()


def _add_layout(hasher: xxhash.xxh3_128, plan: Plan) -> None:
    for file in plan.files:
        hasher.update(f"{file.path} {file.crc32}\n".encode())
        for segment in file.segments:
            if isinstance(segment.payload, bytes):
                hasher.update(segment.payload)
            hasher.update(f"{segment.name} {segment.nbytes}\n".encode())
