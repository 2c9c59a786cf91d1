"""The engine: carry a plan out so that the destination is absent, the old one, or complete.

    staging   .NAME.reshard beside the destination holds the files, a lock and a journal: see `staging.py`
    move      a few threads take one tensor after another: read a block, check it, digest it, write it
    seal      constant bytes, then what depends on digests, the manifest last
    commit    flush, rename, flush the parent

The journal notes each finished segment with its digest, and at last the inode that is about to become the destination.
When the same plan is run again after it was interrupted, segments whose bytes still have that digest are kept, and a
destination that is complete already is left as it is. What the journal says is never trusted without reading the bytes.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from reshard.core.tensor import Tensor
from reshard.errors import InputError, Mismatch, NotFound
from reshard.storage.crc import checksum
from reshard.storage.files import Files, Ledger, Reader
from reshard.storage.plan import Digest, FilePlan, Plan, Seal, blocks
from reshard.storage.staging import (
    Journal,
    JournalRead,
    beside,
    check_destination,
    check_space,
    clear,
    commit,
    create,
    explained,
    fsync_directory,
    inode,
    journal_lines,
    payload_of,
    resolved,
    staged,
    staged_name,
    staging_of,
)
from reshard.version import __version__

BLOCK_NBYTES = 1 << 19
"""Larger blocks fall out of the level-2 cache between reading, checking and writing."""

_FLUSH_NBYTES = 4 << 20
"""After this many bytes the kernel is told to start writing them: else it waits for a tenth of the memory to be dirty,
and the flush at the end does all the waiting."""

_NUM_WINDOWS = 2
"""Windows that a thread leaves to the kernel before it takes the pages of the first again."""


T = TypeVar("T")
Progress = Callable[[int, str], None]
"""Called with (bytes done since the last call, FQN), from any thread."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did."""

    destination: Path
    nbytes: int
    """Of all files written."""
    num_tensors: int
    num_checked: int
    """Source records whose CRC-32 was confirmed."""
    kept_nbytes: int
    """Taken over from an interrupted run."""
    seconds: float
    digests: Mapping[tuple[str, int], Digest] = field(repr=False, default_factory=dict)


def default_threads() -> int:
    """As many as have something to do: the work is copying memory."""
    return max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def run(
    plan: Plan,
    destination: Path,
    *,
    threads: int | None = None,
    block_nbytes: int = BLOCK_NBYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Write the plan's files. See the module's docstring for what holds when this is interrupted.

    Raises OutputError for the destination's sake, InputError (naming file and FQN) for the source's. After an
    InputError nothing is left; after an interruption or a full disk the staging directory stays, and a second run
    goes on from it.
    """
    began = time.monotonic()
    final = resolved(destination)
    stamp = _source_stamp(plan)
    fingerprint = _fingerprint(plan, stamp)
    num_tensors = sum(bool(name) for *_, name, _ in plan.tensors())
    stands = _standing(plan, final, fingerprint)
    if stands is not None:
        return Result(destination, plan.nbytes, num_tensors, 0, plan.nbytes, time.monotonic() - began, stands)
    check_destination(destination, plan, force)
    check_space(destination, plan)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with staged(final) as staging:
            try:
                digests, num_checked, kept = _staged_run(
                    plan, destination, staging, fingerprint, stamp, threads, block_nbytes, progress
                )
            except InputError:
                clear(staging)
                raise
            commit(plan, staging / "files", final)
            clear(staging)
    except OSError as error:
        raise explained(error, destination) from error
    seconds = time.monotonic() - began
    return Result(destination, plan.nbytes, num_tensors, num_checked, kept, seconds, digests)


def _staged_run(
    plan: Plan,
    destination: Path,
    staging: Path,
    fingerprint: str,
    stamp: _Stamp,
    threads: int | None,
    block_nbytes: int,
    progress: Progress | None,
) -> tuple[dict[tuple[str, int], Digest], int, int]:
    """Everything up to the commit, which may follow when this returns."""
    journal = Journal(staging, fingerprint)
    try:
        folder = staging / "files"
        if journal.committing is not None and journal.committing != inode(payload_of(plan, folder)):
            shutil.rmtree(folder, ignore_errors=True)  # what was replaced, not what was written
        filled = _fill(plan, folder, journal, threads, block_nbytes, progress)
        if _changed(plan, stamp):
            raise Mismatch(
                f"the source of {destination} changed while it was read",
                hint="run again when the checkpoint is no longer being written",
            )
        journal.note_commit(inode(payload_of(plan, folder)))
        return filled
    finally:
        journal.close()


def _standing(plan: Plan, final: Path, fingerprint: str) -> Mapping[tuple[str, int], Digest] | None:
    """The digests of a destination that an earlier run completed without getting to clear up; None for any other."""
    staging = staging_of(final)
    lines = journal_lines(staging / "journal")
    if not lines or lines[0] != fingerprint.encode():
        return None
    journal = JournalRead(lines)
    if journal.committing is None or journal.committing != inode(final):
        return None
    digests: dict[tuple[str, int], Digest] = {}
    with staged(final):
        for seals in (False, True):
            for file in plan.files:
                path = final / file.path if not plan.is_one_file else beside(final, file.path) if file.path else final
                if not _holds(file, path, seals, journal.known, digests):
                    return None
        clear(staging)
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
            found = _digest_at(fd, offset, segment.nbytes, file.crc32, BLOCK_NBYTES)
            if isinstance(payload, Tensor):
                wanted = known.get((file.path, index))
            else:
                wanted = _digest_of(payload.make(digests) if isinstance(payload, Seal) else payload, file.crc32)
            if found != wanted:
                return False
            digests[file.path, index] = found
        return os.fstat(fd).st_size == file.nbytes
    finally:
        os.close(fd)


def digest(
    plan: Plan,
    *,
    threads: int | None = None,
    block_nbytes: int = BLOCK_NBYTES,
    progress: Progress | None = None,
) -> Mapping[tuple[str, int], Digest]:
    """What `run` would find for every tensor of the plan, written nowhere: the walk that `verify --against` takes."""
    digests: dict[tuple[str, int], Digest] = {}
    shared = _Shared(progress, block_nbytes)

    def work(task: _Task) -> None:
        digests[task.file.path, task.index] = shared.move(task, None)

    in_threads(_tasks(plan), work, threads)
    shared.ledger.settle(shared.files)
    return digests


@dataclass(frozen=True, slots=True)
class _Task:
    file: FilePlan
    index: int
    offset: int
    name: str
    tensor: Tensor


def _tasks(plan: Plan) -> list[_Task]:
    return [_Task(*t) for t in plan.tensors()]


class _Shared:
    """What the threads of a run have in common."""

    def __init__(self, progress: Progress | None, block_nbytes: int) -> None:
        self.files, self.ledger = Files(), Ledger()
        self._progress = progress
        self._block_nbytes = block_nbytes
        self._local = threading.local()

    def move(self, task: _Task, fd: int | None) -> Digest:
        """Read a tensor block by block, write it when there is somewhere to write, and digest it."""
        reader, buffer, flusher = self._own()
        reader.name = task.name
        hasher, crc, offset = xxhash.xxh3_128(), 0, task.offset
        tensor, storage = task.tensor, task.tensor.dtype.storage
        try:
            for box in blocks(tensor, self._block_nbytes):
                nbytes = tensor.dtype.itemsize * box.size
                block = buffer[:nbytes]
                reader.next_block()
                tensor.read_into(box, block.view(storage).reshape(box.shape), reader)
                hasher.update(block.data)
                if task.file.crc32:
                    crc = checksum(block.data, crc)
                if fd is not None:
                    _pwrite(fd, block, offset)
                    flusher.wrote(fd, offset, nbytes)
                offset += nbytes
                if self._progress is not None:
                    self._progress(nbytes, task.name)
        except InputError as error:
            raise _named(error, task.name) from error
        except OSError as error:
            if not task.name or error.filename is None:
                raise
            raise OSError(error.errno, f"{task.name}: {error.strerror}", error.filename) from error
        return Digest(hasher.hexdigest(), crc)

    def _own(self) -> tuple[Reader, np.ndarray[tuple[int], np.dtype[np.uint8]], _Flusher]:
        if not hasattr(self._local, "own"):
            buffer = np.empty(self._block_nbytes + 16, np.uint8)
            self._local.own = Reader(self.files, self.ledger), buffer, _Flusher()
        own: tuple[Reader, np.ndarray[tuple[int], np.dtype[np.uint8]], _Flusher] = self._local.own
        return own


class _Flusher:
    """Has the kernel write back what one thread wrote, a window at a time and without waiting.

    By the time two more windows are full the first is on the disk, and its pages are given back: filling pages that
    are used again is faster than filling the machine's memory with an output that may be larger.
    """

    def __init__(self) -> None:
        self._fd, self._start, self._nbytes = -1, 0, 0
        self._windows: deque[tuple[int, int, int]] = deque()

    def wrote(self, fd: int, offset: int, nbytes: int) -> None:
        if fd != self._fd:
            self._fd, self._start, self._nbytes = fd, offset, 0
        self._nbytes += nbytes
        if self._nbytes >= _FLUSH_NBYTES and hasattr(os, "posix_fadvise"):
            stop = offset + nbytes
            self._windows.append((fd, self._start, stop - self._start))
            _let_go(*self._windows[-1])
            if len(self._windows) > _NUM_WINDOWS:
                _let_go(*self._windows.popleft())
            self._start, self._nbytes = stop, 0


def _let_go(fd: int, offset: int, nbytes: int) -> None:
    """Dirty pages are queued for writing by this, clean ones dropped."""
    os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _fill(
    plan: Plan, folder: Path, journal: Journal, threads: int | None, block_nbytes: int, progress: Progress | None
) -> tuple[dict[tuple[str, int], Digest], int, int]:
    shared = _Shared(progress, block_nbytes)
    fds = {file.path: create(folder / staged_name(file), file.nbytes) for file in plan.files}
    try:
        digests: dict[tuple[str, int], Digest] = {}
        todo, kept = [], 0
        for task in _tasks(plan):
            known = journal.known.get((task.file.path, task.index))
            if known and _digest_at_task(fds[task.file.path], task, block_nbytes) == known:
                digests[task.file.path, task.index] = known
                kept += task.tensor.nbytes
                if progress is not None:
                    progress(task.tensor.nbytes, task.name)
            else:
                todo.append(task)

        def work(task: _Task) -> None:
            done = shared.move(task, fds[task.file.path])
            digests[task.file.path, task.index] = done
            journal.note(task.file.path, task.index, done)

        in_threads(todo, work, threads)
        shared.ledger.settle(shared.files)
        _seal(plan, fds, digests)
        for fd in fds.values():
            os.fsync(fd)
    finally:
        for fd in fds.values():
            os.close(fd)
    for directory in {folder, *((folder / f.path).parent for f in plan.files)}:
        fsync_directory(directory)
    return digests, shared.ledger.num_checked, kept


def _seal(plan: Plan, fds: Mapping[str, int], digests: dict[tuple[str, int], Digest]) -> None:
    """Write what is not tensors: constants first, then seals in the order of the plan."""
    for wanted in (bytes, Seal):
        for file in plan.files:
            for index, offset, segment in file.placed():
                if not isinstance(segment.payload, wanted):
                    continue
                data = segment.payload.make(digests) if isinstance(segment.payload, Seal) else segment.payload
                assert isinstance(data, bytes)
                if len(data) != segment.nbytes:
                    raise AssertionError(f"{file.path}: a seal of {len(data)} bytes, planned {segment.nbytes}")
                _pwrite(fds[file.path], data, offset)
                digests[file.path, index] = Digest(xxhash.xxh3_128_hexdigest(data), checksum(data))


def in_threads(tasks: Sequence[T], work: Callable[[T], None], threads: int | None = None) -> None:
    """Do all tasks in a few threads, in their order; the first error stops the others and is raised."""
    threads = threads or default_threads()
    if threads == 1 or len(tasks) < 2:
        for task in tasks:
            work(task)
        return
    queue, lock, stop = iter(tasks), threading.Lock(), threading.Event()

    def loop() -> None:
        try:
            while not stop.is_set():
                with lock:
                    task = next(queue, None)
                if task is None:
                    return
                work(task)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(loop) for _ in range(threads)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise


def _digest_at(fd: int, offset: int, nbytes: int, crc32: bool, block_nbytes: int) -> Digest:
    """Of bytes of a file; of fewer where it ends before them."""
    hasher, crc = xxhash.xxh3_128(), 0
    for at in range(offset, offset + nbytes, block_nbytes):
        data = os.pread(fd, min(block_nbytes, offset + nbytes - at), at)
        hasher.update(data)
        if crc32:
            crc = checksum(data, crc)
    return Digest(hasher.hexdigest(), crc)


def _digest_at_task(fd: int, task: _Task, block_nbytes: int) -> Digest:
    return _digest_at(fd, task.offset, task.tensor.nbytes, task.file.crc32, block_nbytes)


def _digest_of(data: bytes, crc32: bool) -> Digest:
    return Digest(xxhash.xxh3_128_hexdigest(data), checksum(data) if crc32 else 0)


def _pwrite(fd: int, data: object, offset: int) -> None:
    view = memoryview(data).cast("B")  # type: ignore[arg-type]
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


_Stamp = list[tuple[str, int, int, int]]


def _source_stamp(plan: Plan) -> _Stamp:
    stamps = []
    for path in plan.sources():
        try:
            stat = os.stat(path)
        except FileNotFoundError as error:
            raise NotFound(f"{path}: no such file") from error
        stamps.append((path, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return stamps


def _changed(plan: Plan, stamp: _Stamp) -> bool:
    try:
        return _source_stamp(plan) != stamp
    except NotFound:
        return True


def _fingerprint(plan: Plan, stamp: _Stamp) -> str:
    hasher = xxhash.xxh3_128(repr((__version__, stamp, sorted(plan.facts.items(), key=str))).encode())
    for file in plan.files:
        hasher.update(f"{file.path} {file.crc32}\n".encode())
        for segment in file.segments:
            if isinstance(segment.payload, bytes):
                hasher.update(segment.payload)
            hasher.update(f"{segment.name} {segment.nbytes}\n".encode())
    return hasher.hexdigest()


def _named(error: InputError, name: str) -> InputError:
    message = str(error)
    if not name or name in message:
        return error
    return type(error)(f"{name}: {message}", hint=error.hint)
