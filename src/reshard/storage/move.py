"""Moving tensors: a few threads take one after another, read a block, check it, digest it, and write it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import xxhash

from reshard.core.tensor import Tensor
from reshard.errors import InputError
from reshard.storage.crc import checksum
from reshard.storage.files import Files, Ledger, Reader
from reshard.storage.plan import Digest, FilePlan, Plan, blocks

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


def default_threads() -> int:
    """As many as have something to do: the work is copying memory."""
    return max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def digest(
    plan: Plan,
    *,
    threads: int | None = None,
    block_nbytes: int = BLOCK_NBYTES,
    progress: Progress | None = None,
) -> Mapping[tuple[str, int], Digest]:
    """What `run` would find for every tensor of the plan, written nowhere: the walk that `verify --against` takes."""
    digests: dict[tuple[str, int], Digest] = {}
    shared = Mover(progress, block_nbytes)

    def work(task: Task) -> None:
        digests[task.file.path, task.index] = shared.move(task, None)

    in_threads(tasks(plan), work, threads)
    shared.ledger.settle(shared.files)
    return digests


@dataclass(frozen=True, slots=True)
class Task:
    """A tensor and its place."""

    file: FilePlan
    index: int
    """Of the segment in the file."""
    offset: int
    """In the file, in bytes."""
    name: str
    """The FQN, where it is a tensor of the model."""
    tensor: Tensor


def tasks(plan: Plan) -> list[Task]:
    """All tensors of a plan, in its order."""
    return [Task(*t) for t in plan.tensors()]


class Mover:
    """What the threads of a run have in common."""

    def __init__(self, progress: Progress | None, block_nbytes: int) -> None:
        self.files, self.ledger = Files(), Ledger()
        self._progress = progress
        self._block_nbytes = block_nbytes
        self._local = threading.local()

    def move(self, task: Task, fd: int | None) -> Digest:
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
                    pwrite_all(fd, block, offset)
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


def digest_at(fd: int, offset: int, nbytes: int, crc32: bool, block_nbytes: int) -> Digest:
    """Of bytes of a file; of fewer where it ends before them."""
    hasher, crc = xxhash.xxh3_128(), 0
    for at in range(offset, offset + nbytes, block_nbytes):
        data = os.pread(fd, min(block_nbytes, offset + nbytes - at), at)
        hasher.update(data)
        if crc32:
            crc = checksum(data, crc)
    return Digest(hasher.hexdigest(), crc)


def digest_at_task(fd: int, task: Task, block_nbytes: int) -> Digest:
    """Of what is where a tensor belongs."""
    return digest_at(fd, task.offset, task.tensor.nbytes, task.file.crc32, block_nbytes)


def digest_of(data: bytes, crc32: bool) -> Digest:
    """Of bytes in memory."""
    return Digest(xxhash.xxh3_128_hexdigest(data), checksum(data) if crc32 else 0)


def pwrite_all(fd: int, data: object, offset: int) -> None:
    """Write all of a buffer, however little the system takes at once."""
    view = memoryview(data).cast("B")  # type: ignore[arg-type]
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _named(error: InputError, name: str) -> InputError:
    message = str(error)
    if not name or name in message:
        return error
    return type(error)(f"{name}: {message}", hint=error.hint)
