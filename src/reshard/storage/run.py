"""The engine: carry a plan out so that the destination is absent, the old one, or complete.

    staging   .NAME.reshard beside the destination holds the files, a lock and a journal
    move      a few threads take one tensor after another: read a block, check it, digest it, write it
    seal      constant bytes, then what depends on digests, the manifest last
    commit    flush, rename, flush the parent

The journal notes each finished segment with its digest, and at last the inode that is about to become the destination.
When the same plan is run again after it was interrupted, segments whose bytes still have that digest are kept, and a
destination that is complete already is left as it is. What the journal says is never trusted without reading the bytes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from reshard.core.tensor import Tensor
from reshard.errors import Corrupt, InputError, Mismatch, NotFound, OutputError, ReshardError
from reshard.storage.files import Files, Ledger, Reader
from reshard.storage.plan import Digest, FilePlan, Plan, Seal, blocks
from reshard.version import __version__

BLOCK_NBYTES = 1 << 19
"""Larger blocks fall out of the level-2 cache between reading, checking and writing."""

_FLUSH_NBYTES = 4 << 20
"""After this many bytes the kernel is told to start writing them: else it waits for a tenth of the memory to be dirty,
and the flush at the end does all the waiting."""

_NUM_WINDOWS = 2
"""Windows that a thread leaves to the kernel before it takes the pages of the first again."""

_NAME_LIMIT_NBYTES = 255
"""Of one name in a directory, on the usual file systems."""

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


def check_destination(destination: Path, plan: Plan, force: bool) -> None:
    """Raise OutputError when the destination must not or cannot be written; nothing is touched."""
    try:
        _check_destination(destination, plan, force)
    except OSError as error:
        raise _explained(error, destination) from error


def _check_destination(destination: Path, plan: Plan, force: bool) -> None:
    final = _resolved(destination)
    if final.is_dir():
        if plan.is_one_file:
            raise OutputError(f"{destination} is a directory, and the output is one file")
        held = any(final.iterdir())
    else:
        held = os.path.lexists(final)
        if held and not final.is_file():
            raise OutputError(f"{destination} is neither a file nor a directory")
        if held and not plan.is_one_file:
            raise OutputError(f"{destination} is a file, and the output is a directory")
    if held and not force:
        raise OutputError(f"{destination} exists", hint="--force replaces it, once the new one is complete")
    for path in plan.sources():
        if final == Path(os.path.realpath(path)) or final in Path(os.path.realpath(path)).parents:
            raise OutputError(
                f"{destination} holds the input {path}: replacing it would destroy what is being read",
                hint="choose another output",
            )
    if plan.is_one_file:
        longest = max((len(os.fsencode(beside(final, f.path).name)) for f in plan.files if f.path), default=0)
        if longest > _NAME_LIMIT_NBYTES:
            raise OutputError(f"{destination}: the name of the manifest beside it would have {longest} bytes")
    parent = _existing_parent(final)
    if not parent.is_dir():
        raise OutputError(f"{destination}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{destination}: {parent} is not writable")


def check_space(destination: Path, plan: Plan) -> None:
    """Raise OutputError when the output would not fit on the disk."""
    final = _resolved(destination)
    parent = _existing_parent(final)
    free = shutil.disk_usage(parent).free + sum(
        f.stat().st_blocks * 512 for f in _staging(final).rglob("*") if f.is_file()
    )
    if plan.nbytes > free:
        raise OutputError(
            f"{destination}: {plan.nbytes} bytes to write, {free} free in {parent}",
            hint="free some space, choose another output, or write less with --dtype bfloat16",
        )


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
    final = _resolved(destination)
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
        with _staged(final) as staging:
            try:
                digests, num_checked, kept = _staged_run(
                    plan, destination, staging, fingerprint, stamp, threads, block_nbytes, progress
                )
            except InputError:
                _clear(staging)
                raise
            _commit(plan, staging / "files", final)
            _clear(staging)
    except OSError as error:
        raise _explained(error, destination) from error
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
    journal = _Journal(staging, fingerprint)
    try:
        folder = staging / "files"
        if journal.committing is not None and journal.committing != _inode(_payload(plan, folder)):
            shutil.rmtree(folder, ignore_errors=True)  # what was replaced, not what was written
        filled = _fill(plan, folder, journal, threads, block_nbytes, progress)
        if _changed(plan, stamp):
            raise Mismatch(
                f"the source of {destination} changed while it was read",
                hint="run again when the checkpoint is no longer being written",
            )
        journal.note_commit(_inode(_payload(plan, folder)))
        return filled
    finally:
        journal.close()


def _standing(plan: Plan, final: Path, fingerprint: str) -> Mapping[tuple[str, int], Digest] | None:
    """The digests of a destination that an earlier run completed without getting to clear up; None for any other."""
    staging = _staging(final)
    lines = _journal_lines(staging / "journal")
    if not lines or lines[0] != fingerprint.encode():
        return None
    journal = _JournalRead(lines)
    if journal.committing is None or journal.committing != _inode(final):
        return None
    digests: dict[tuple[str, int], Digest] = {}
    with _staged(final):
        for seals in (False, True):
            for file in plan.files:
                path = final / file.path if not plan.is_one_file else beside(final, file.path) if file.path else final
                if not _holds(file, path, seals, journal.known, digests):
                    return None
        _clear(staging)
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
                    crc = zlib.crc32(block.data, crc)
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
    plan: Plan, folder: Path, journal: _Journal, threads: int | None, block_nbytes: int, progress: Progress | None
) -> tuple[dict[tuple[str, int], Digest], int, int]:
    shared = _Shared(progress, block_nbytes)
    fds = {file.path: _create(folder / _staged_name(file), file.nbytes) for file in plan.files}
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
        _fsync_directory(directory)
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
                digests[file.path, index] = Digest(xxhash.xxh3_128_hexdigest(data), zlib.crc32(data))


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
            crc = zlib.crc32(data, crc)
    return Digest(hasher.hexdigest(), crc)


def _digest_at_task(fd: int, task: _Task, block_nbytes: int) -> Digest:
    return _digest_at(fd, task.offset, task.tensor.nbytes, task.file.crc32, block_nbytes)


def _digest_of(data: bytes, crc32: bool) -> Digest:
    return Digest(xxhash.xxh3_128_hexdigest(data), zlib.crc32(data) if crc32 else 0)


def _journal_lines(path: Path) -> list[bytes]:
    """The lines of a journal that end, the first of them the fingerprint."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []


class _JournalRead:
    """What a journal says. A line that was cut short, or is nonsense, does not count."""

    def __init__(self, lines: Sequence[bytes]) -> None:
        self.known: dict[tuple[str, int], Digest] = {}
        self.committing: int | None = None
        """The inode that was about to become the destination."""
        for line in lines[1:]:
            segment, commit = _SEGMENT_LINE.fullmatch(line), _COMMIT_LINE.fullmatch(line)
            if segment:
                index, xxh3, crc, name = (part.decode(errors="replace") for part in segment.groups())
                self.known[name, int(index)] = Digest(xxh3, int(crc, 16))
            elif commit:
                self.committing = int(commit[1])


_SEGMENT_LINE = re.compile(rb"(\d{1,9}) ([0-9a-f]{32}) ([0-9a-f]{8}) (.*)")
_COMMIT_LINE = re.compile(rb"commit (\d{1,20})")


class _Journal(_JournalRead):
    """The journal of a staging directory, held open; it begins anew unless its plan is the one of `fingerprint`."""

    def __init__(self, staging: Path, fingerprint: str) -> None:
        path = staging / "journal"
        lines = _journal_lines(path)
        if not lines or lines[0] != fingerprint.encode():
            shutil.rmtree(staging / "files", ignore_errors=True)
            lines = [fingerprint.encode()]
        super().__init__(lines)
        path.write_bytes(b"".join(line + b"\n" for line in lines))  # without the line that was cut short
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def note(self, path: str, index: int, done: Digest) -> None:
        line = f"{index} {done.xxh3_128} {done.crc32:08x} {path}\n".encode()
        with self._lock:
            os.write(self._fd, line)

    def note_commit(self, inode: int | None) -> None:
        """All is written and flushed; this inode is the next to be renamed."""
        os.write(self._fd, f"commit {inode}\n".encode())
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def _staged(final: Path) -> Iterator[Path]:
    """The staging directory of a destination, held by one process at a time."""
    staging = _staging(final)
    lock = _locked(staging, final)
    try:
        yield staging
    finally:
        os.close(lock)


def _locked(staging: Path, final: Path) -> int:
    while True:
        staging.mkdir(exist_ok=True)
        try:
            lock = os.open(staging / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # another process has just cleared up
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise OutputError(f"{final} is being written by another process (it holds {staging}/lock)") from error
        if _inode(staging / "lock") == os.fstat(lock).st_ino:
            return lock
        os.close(lock)


def _clear(staging: Path) -> None:
    """Remove a staging directory that this process holds.

    The journal goes late, because it is what tells a complete destination from somebody else's; the lock goes last, so
    that whoever waits for it finds nothing old.
    """
    for path in staging.iterdir():
        if path.name in ("journal", "lock"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for name in ("journal", "lock"):
        (staging / name).unlink(missing_ok=True)
    with suppress(OSError):  # another process may have begun
        staging.rmdir()


def _staging(final: Path) -> Path:
    name = final.name
    if len(name.encode()) > 230:
        name = xxhash.xxh3_64_hexdigest(name.encode())
    return final.parent / f".{name}.reshard"


def _staged_name(file: FilePlan) -> str:
    return file.path or "output"


def _create(path: Path, nbytes: int) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            os.posix_fallocate(fd, 0, max(nbytes, 1))  # a full disk shows here
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) not in (None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _pwrite(fd: int, data: object, offset: int) -> None:
    view = memoryview(data).cast("B")  # type: ignore[arg-type]
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _commit(plan: Plan, folder: Path, final: Path) -> None:
    """Make the finished files the destination. A single file comes last: until then the old one stands."""
    if plan.is_one_file:
        for file in plan.files:
            if file.path:
                os.replace(folder / file.path, beside(final, file.path))
        os.replace(folder / "output", final)
    elif final.is_dir() and any(final.iterdir()):
        _exchange(folder, final)
    else:
        os.rename(folder, final)
    _fsync_directory(final.parent)


def beside(final: Path, name: str) -> Path:
    """Where a file that belongs to a one-file output lies: `out.safetensors.reshard.json`."""
    return final.with_name(f"{final.name}.{name}")


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories at once where the kernel can (Linux), else one after the other."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        renameat2 = None
    if renameat2 and renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(old), rename_exchange) == 0:
        return
    aside = new.with_name("replaced")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _resolved(destination: Path) -> Path:
    return Path(os.path.realpath(destination))


def _existing_parent(path: Path) -> Path:
    return next(p for p in path.parents if os.path.lexists(p))


def _payload(plan: Plan, folder: Path) -> Path:
    """What a commit renames to the destination, last."""
    return folder / "output" if plan.is_one_file else folder


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path, follow_symlinks=False).st_ino
    except OSError:
        return None


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


def _explained(error: OSError, destination: Path) -> ReshardError:
    if error.errno == errno.ENOSPC:
        return OutputError(
            f"{destination}: the disk is full", hint="free some space and run again: what is done is kept"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return OutputError(f"{destination} cannot be written: {error.strerror}")
    if error.errno == errno.EIO:
        return Corrupt(f"{error.filename or destination}: {error}", hint="the disk could not read or write this")
    return OutputError(f"{destination}: {error}")
