"""Local files: reading extents, and the ledger that holds what was read against the checksums of the container.

A path may lead into a tar archive: `x.nemo/model_weights/__0_0.distcp` is read where it lies; see `tar.py`.

A `Reader` is the `Source` of one thread. All readers of a run share the open files and the ledger.
"""

from __future__ import annotations

import gc
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from reshard.core.box import Shape
from reshard.core.tensor import Array, Extent
from reshard.errors import Corrupt, Incomplete, NotFound
from reshard.storage import tar
from reshard.storage.crc import checksum, combine

_OPEN_FILES = 512
_GAP_NBYTES = 1 << 20


class Files:
    """Open file descriptors by path, the least recently opened closed first when there are many."""

    def __init__(self, limit: int = _OPEN_FILES, *, scattered: bool = False) -> None:
        """`scattered` is for headers strewn over large files: the kernel then reads just what is asked for."""
        self._limit = limit
        self._scattered = scattered
        self._lock = threading.Lock()
        self._open: dict[str, _Descriptor] = {}

    def pread_into(self, path: str, offset: int, out: Any) -> None:
        """Fill `out`, a writable buffer, from the file. Raises Incomplete when the file ends before it is full."""
        descriptor = self._open.get(path) or self._opened(path)
        view = memoryview(out)
        wanted = view.nbytes
        try:
            got = os.preadv(descriptor.fd, [view], descriptor.start + offset)
            while 0 < got < wanted:
                more = os.preadv(descriptor.fd, [view.cast("B")[got:]], descriptor.start + offset + got)
                if more == 0:
                    break
                got += more
        except OSError as error:
            raise OSError(error.errno, f"reading {wanted} bytes at offset {offset}: {error.strerror}", path) from error
        if descriptor.start:  # an archive goes on behind its member
            got = min(got, max(0, descriptor.nbytes - offset))
        if got != wanted:
            raise Incomplete(
                f"{path}: {wanted} bytes wanted at offset {offset}, the file ends after {got}",
                hint="the file was truncated or is still being written",
            )

    def pread(self, path: str, offset: int, nbytes: int) -> bytes:
        """Bytes of the file. Raises Incomplete when they are not all there."""
        descriptor = self._open.get(path) or self._opened(path)
        if offset + nbytes > descriptor.nbytes:
            raise Incomplete(f"{path}: {nbytes} bytes wanted at offset {offset} of {descriptor.nbytes}")
        try:
            data = os.pread(descriptor.fd, nbytes, descriptor.start + offset)
        except OSError as error:
            raise OSError(error.errno, f"reading {nbytes} bytes at offset {offset}: {error.strerror}", path) from error
        if len(data) != nbytes:  # the kernel gives at most 2 GiB at once
            out = bytearray(nbytes)
            self.pread_into(path, offset, out)
            data = bytes(out)
        return data

    def nbytes(self, path: str) -> int:
        """Size of the file."""
        return (self._open.get(path) or self._opened(path)).nbytes

    def _opened(self, path: str) -> _Descriptor:
        with self._lock:
            if path not in self._open:
                if len(self._open) >= self._limit:
                    self._open.pop(next(iter(self._open)))  # closed when the last reader lets go of it
                descriptor = self._open[path] = _Descriptor(path)
                if self._scattered and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor.fd, 0, 0, os.POSIX_FADV_RANDOM)
            return self._open[path]

    def close(self) -> None:
        with self._lock:
            self._open.clear()


class _Descriptor:
    """A file descriptor that is closed when no one refers to it any more."""

    __slots__ = ("fd", "nbytes", "start")

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.start = 0
        """Where the file begins in the one that is open: 0 unless it is a member of an archive."""
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
        except FileNotFoundError as error:
            raise NotFound(f"{path}: no such file") from error
        except NotADirectoryError as error:
            found = tar.member(path)
            if found is None:
                raise NotFound(f"{path}: no such file") from error
            archive, (self.start, self.nbytes) = found
            self.fd = archive.descriptor()
        else:
            status = os.fstat(self.fd)
            if not stat.S_ISREG(status.st_mode):
                raise NotFound(f"{path} is {'a directory' if stat.S_ISDIR(status.st_mode) else 'no file'}")
            self.nbytes = status.st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when Python ends
        if self.fd >= 0:
            close(self.fd)


class Ledger:
    """Checksums of what was read of each extent, until they add up to the whole.

    Reads that continue one another make a run, whose CRC-32 goes on; runs may come in any order and from any thread,
    and are joined at last. So no byte is read twice, unless nobody asked for it or several did.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[Extent, dict[int, tuple[int, int]]] = {}
        """By extent and end: (start, CRC-32)."""
        self._names: dict[Extent, str] = {}
        self.num_checked = 0
        """Extents whose checksum was confirmed."""

    def add(self, extent: Extent, offset: int, data: Any, nbytes: int, name: str) -> None:
        """Note what was read. Raises Corrupt when a run is all of the extent and its checksum is not the stated one."""
        if nbytes == extent.nbytes:
            self._compare(extent, checksum(data), name)
            return
        with self._lock:
            runs = self._runs.setdefault(extent, {})
            self._names[extent] = name
            start, crc = runs.pop(offset, (offset, 0))
        crc, stop = checksum(data, crc), offset + nbytes
        with self._lock:
            if runs.get(stop, (stop, 0))[0] > start:
                runs[stop] = (start, crc)
        if start == 0 and stop == extent.nbytes:
            self._compare(extent, crc, name)

    def give(self) -> list[tuple[Extent, int, int, int, str]]:
        """Hand over what has not added up to the whole yet: (extent, start, end, CRC-32, FQN) of each run."""
        given = [
            (extent, start, stop, crc, self._names[extent])
            for extent, runs in self._runs.items()
            if runs.get(extent.nbytes, (1, 0))[0] != 0
            for stop, (start, crc) in runs.items()
        ]
        self._runs.clear()
        return given

    def take(self, extent: Extent, start: int, stop: int, crc: int, name: str) -> None:
        """Note what another ledger gave."""
        runs = self._runs.setdefault(extent, {})
        self._names[extent] = name
        if runs.get(stop, (stop, 0))[0] > start:
            runs[stop] = (start, crc)

    def settle(self, files: Files) -> None:
        """Confirm every extent of which anything was read, reading what no one asked for."""
        for extent, runs in self._runs.items():
            if runs.get(extent.nbytes, (1, 0))[0] == 0:
                continue
            crc, at = 0, 0
            for start, stop, known in sorted((start, stop, crc) for stop, (start, crc) in runs.items()):
                if start < at:  # overlapping runs: their checksums do not join
                    crc, at = 0, 0
                    break
                crc = _crc_of(files, extent, at, start, crc)
                crc, at = combine(crc, known, stop - start), stop
            self._compare(extent, _crc_of(files, extent, at, extent.nbytes, crc), self._names[extent])
        self._runs.clear()

    def _compare(self, extent: Extent, crc: int, name: str) -> None:
        if crc != extent.crc32:
            raise Corrupt(
                f"{extent.path}: {name + ': ' if name else ''}the {extent.nbytes} bytes at offset {extent.offset} have"
                f" CRC-32 {crc:08x}, the file says {extent.crc32:08x}",
                hint="the shard was damaged after it was written: copy it again from where it was saved",
            )
        self.num_checked += 1


def _crc_of(files: Files, extent: Extent, start: int, stop: int, crc: int) -> int:
    while start < stop:
        nbytes = min(_GAP_NBYTES, stop - start)
        crc = checksum(files.pread(extent.path, extent.offset + start, nbytes), crc)
        start += nbytes
    return crc


class Reader:
    """Shows the bytes of extents from local files. One for each thread."""

    def __init__(self, files: Files | None = None, ledger: Ledger | None = None) -> None:
        self.files = files or Files()
        self.ledger = ledger
        self.name = ""
        """The FQN that is being read, for messages."""
        self._scratch: list[Any] = []
        self._used = 0

    def read(self, extent: Extent, offset: int, out: Array) -> None:
        self.files.pread_into(extent.path, extent.offset + offset, out)
        if extent.crc32 is not None and self.ledger is not None:
            self.ledger.add(extent, offset, out, out.nbytes, self.name)

    def scratch(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """Memory that is handed out again for the next block: see `next_block`."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self._used == len(self._scratch):
            self._scratch.append(np.empty(nbytes, "u1"))
        elif self._scratch[self._used].nbytes < nbytes:
            self._scratch[self._used] = np.empty(nbytes, "u1")
        buffer: Array = self._scratch[self._used][:nbytes]
        self._used += 1
        return buffer.view(dtype).reshape(shape)

    def next_block(self) -> None:
        """All scratch memory may be used again."""
        self._used = 0


class LazySource:
    """The source of an open checkpoint: a new reader, with every checksum checked, for each tensor that is read."""

    def __init__(self, files: Files | None = None) -> None:
        self._files = files or Files()
        self._ledger = Ledger()

    def read(self, extent: Extent, offset: int, out: Array) -> None:
        self._files.pread_into(extent.path, extent.offset + offset, out)
        if extent.crc32 is not None and out.nbytes == extent.nbytes:
            self._ledger.add(extent, offset, out, out.nbytes, "")

    def scratch(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        return np.empty(shape, dtype)


@contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection meanwhile: it walks millions of new objects over and over, none of them garbage yet."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def file_extent(path: Path) -> Extent:
    """All of a file."""
    return Extent(str(path), 0, path.stat().st_size)
