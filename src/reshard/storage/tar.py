"""Tar archives as directories: a path that goes on behind an archive's name is a member of it. Nothing is extracted.

    x.nemo/model_weights/__0_0.distcp  ->  (x.nemo, where the member's bytes start, how many they are)

    header     512 B   name, mode, owner, size (octal, or binary where it is large), time, checksum, type, link, "ustar"
    data               the member's bytes, then zeros up to a multiple of 512
    ...
    end       1024 B   zeros

Headers that say something of the next one (PAX `x` and `g`, GNU `L` and `K`) are understood by Python's `tarfile`,
which is shown headers only. Names are normalised, so that `./a/b` and `a/b` are one member; of several with one name
the last counts, as it does for tar. Refused are links, devices and sparse files, and names that lead out.

A compressed archive (gzip, bzip2, xz) has no places that could be read by themselves: it is decompressed, member by
member, into a temporary file without a name, which is an archive again and vanishes with the last one who has it open.

Source: POSIX.1-2017 `pax`, GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import io
import os
import posixpath
import shlex
import shutil
import stat
import sys
import tarfile
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PosixPath
from typing import Any, BinaryIO, NamedTuple

from reshard.errors import Corrupt, Incomplete, InputError, NotFound, OutputError, Unsupported

_BLOCK_NBYTES = 512
_PIECE_NBYTES = 1 << 20
_HEADER_LIMIT_NBYTES = 32 << 10
"""Of one header with what it says of the next; paths end at 4 KiB."""
_MAX_NUM_MEMBERS = 1 << 21
_MAX_DEPTH = 64
_INFLATED_NBYTES = 1 << 30
_MAX_RATIO = 100
"""A compressed archive may become this many times as large, and _INFLATED_NBYTES in any case."""
_XZ_NBYTES = 128 << 20
"""Of memory for the dictionary; that of `xz -9` takes half."""


class Compression(NamedTuple):
    """A way to compress a whole archive."""

    program: str
    """Which undoes it, `-dc FILE` writing to stdout."""
    magic: bytes
    """What such a file begins with."""
    decoder: Callable[[], Any]
    """Of one stream, of which there may be several."""


def _gzip() -> Any:
    return zlib.decompressobj(31)


def _bzip2() -> Any:
    return _imported("bz2").BZ2Decompressor()


def _xz() -> Any:
    lzma = _imported("lzma")
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_NBYTES)


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise Unsupported(
            f"the archive needs {name}, which this Python was built without", hint="decompress it first"
        ) from error


COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b\x08", _gzip),
    Compression("bzip2", b"BZh", _bzip2),
    Compression("xz", b"\xfd7zXZ\0", _xz),
)


class Place(NamedTuple):
    """Where a member's bytes are."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Archive:
    """The members of an archive by name."""

    path: str
    status: os.stat_result
    """Of the file when it was read."""
    files: dict[str, Place]
    directories: dict[str, dict[str, None]]
    """Names of what is in each, in the archive's order; the archive itself is ``""``."""
    notices: tuple[str, ...] = ()
    scratch: _Scratch | None = field(default=None, repr=False)
    """The decompressed archive, of a compressed one."""

    def descriptor(self) -> int:
        """A new descriptor of the file that the places are in."""
        if self.scratch is None:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:  # a description of its own, so that advice about one reader's pattern is not another's
            return os.open(f"/proc/self/fd/{self.scratch.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return os.dup(self.scratch.fd)


# ---------------------------------------------------------------------------------------------------------- places


class ArchivePath(PosixPath):
    """An archive as a directory, or what is in it. Read only."""

    __slots__ = ("_archive",)
    _archive: Archive
    """Kept open as long as the path is."""

    def __truediv__(self, name: Any) -> ArchivePath:
        return _held(super().__truediv__(name), self.archive)

    @property
    def parent(self) -> Path:  # type: ignore[override]
        above = super().parent
        return _held(above, self.archive) if self.inner else Path(above)

    @property
    def archive(self) -> Archive:
        if not hasattr(self, "_archive"):
            found = _of_member(str(self))
            if found is None:
                raise NotFound(f"{self}: no such file")
            self._archive = found
        return self._archive

    @property
    def inner(self) -> str:
        """The name in the archive; empty for the archive itself."""
        return str(self)[len(self.archive.path) + 1 :]

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        place, about = self.archive.files.get(self.inner), self.archive.status
        if place is None and self.inner not in self.archive.directories:
            raise FileNotFoundError(2, "no such member", str(self))
        kind, nbytes = (stat.S_IFREG, place.nbytes) if place else (stat.S_IFDIR, 0)
        times = int(about.st_atime), int(about.st_mtime), int(about.st_ctime)
        return os.stat_result((kind | 0o444, about.st_ino, about.st_dev, 1, about.st_uid, about.st_gid, nbytes, *times))

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        return self.inner in self.archive.files

    def is_dir(self, **_: Any) -> bool:
        return self.inner in self.archive.directories

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[ArchivePath]:  # type: ignore[override]
        return (self / name for name in names(self))

    def rglob(self, pattern: str, **_: Any) -> Iterator[ArchivePath]:  # type: ignore[override]
        for path in self.iterdir():
            if path.match(pattern):
                yield path
            if path.is_dir():
                yield from path.rglob(pattern)

    def read_bytes(self) -> bytes:
        with self.open("rb") as file:
            return bytes(file.read())

    def open(self, mode: str = "r", *_: Any, **__: Any) -> Any:
        if mode != "rb":
            raise OSError(30, "a member of an archive is only read", str(self))
        place = self.archive.files.get(self.inner)
        if place is None:
            raise FileNotFoundError(2, "no such member", str(self))
        return io.BufferedReader(_MemberFile(self.archive.descriptor(), place))

    def unlink(self, missing_ok: bool = False) -> None:
        raise OutputError(f"{self} is in an archive, of which nothing is removed")


class _MemberFile(io.RawIOBase):
    """The bytes of a member, from its start."""

    def __init__(self, fd: int, place: Place) -> None:
        self._fd, self._place, self._at = fd, place, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._place.nbytes - self._at]
        got = os.preadv(self._fd, [view], self._place.offset + self._at) if view.nbytes else 0
        self._at += got
        return got

    def fileno(self) -> int:
        raise OSError(22, "a member has no descriptor of its own")

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def at(path: str | Path) -> Path:
    """The absolute path; where it is an archive, or leads into one, as an ArchivePath.

    Raises InputError for archives that are damaged, or not to be read.
    """
    if isinstance(path, ArchivePath):
        return path
    text = os.path.abspath(path)
    if os.path.isfile(text):
        archive = opened(text) if is_archive(text) else None
    else:
        archive = None if os.path.isdir(text) else _of_member(text)
    return Path(text) if archive is None else _held(text, archive)


def names(directory: Path) -> list[str]:
    """What is in a directory, sorted, in an archive or not. Raises NotADirectoryError for what is none."""
    if not isinstance(directory, ArchivePath):
        return sorted(os.listdir(directory))
    found = directory.archive.directories.get(directory.inner)
    if found is None:
        raise NotADirectoryError(20, "not a directory", str(directory))
    return sorted(found)


def sizes(directory: Path) -> dict[str, int]:
    """Sizes of the files in a directory by name, in an archive or not."""
    if not isinstance(directory, ArchivePath):
        with os.scandir(directory) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    inside, files = directory.inner, directory.archive.files
    places = {name: files.get(f"{inside}/{name}" if inside else name) for name in names(directory)}
    return {name: place.nbytes for name, place in places.items() if place is not None}


def member(path: str) -> tuple[Archive, Place] | None:
    """Where the bytes of a path that leads into an archive are; None when it leads into none, or to nothing."""
    archive = _of_member(path)
    if archive is None:
        return None
    place = archive.files.get(path[len(archive.path) + 1 :])
    return None if place is None else (archive, place)


def status(path: str) -> os.stat_result:
    """Of a file; of a member the archive's."""
    try:
        return os.stat(path)
    except NotADirectoryError:
        archive = _of_member(path)
        if archive is None:
            raise
        return os.stat(archive.path)


def _held(path: Path | str, archive: Archive) -> ArchivePath:
    found = ArchivePath(path)
    found._archive = archive
    return found


def _of_member(path: str) -> Archive | None:
    """The archive that a path leads into."""
    for place, archive in list(_archives.items()):
        if path.startswith(place + "/"):
            return archive
    above = os.path.dirname(path)
    while above != path:
        if os.path.isfile(above):
            return opened(above) if is_archive(above) else None
        if os.path.isdir(above):
            return None
        path, above = above, os.path.dirname(above)
    return None


# -------------------------------------------------------------------------------------------------------- archives

_archives: weakref.WeakValueDictionary[str, Archive] = weakref.WeakValueDictionary()
"""Those that are in use, by path."""
_lock = threading.RLock()


def is_archive(path: str | Path) -> bool:
    """Whether a file is a tar archive, compressed or not, by its first bytes."""
    with Path(path).open("rb") as file:
        head = file.read(_BLOCK_NBYTES)
        compression = _compression(head)
        if compression is not None:
            head = _first(compression.decoder(), head, file)
    return _is_header(head[:_BLOCK_NBYTES])


def _compression(head: bytes) -> Compression | None:
    return next((known for known in COMPRESSIONS if head.startswith(known.magic)), None)


def _first(decoder: Any, head: bytes, file: BinaryIO) -> bytes:
    """The first block of a compressed file, as far as its first MiB tells: bzip2's blocks are nearly as large."""
    plain, left = b"", head + file.read(_PIECE_NBYTES)
    try:
        while len(plain) < _BLOCK_NBYTES and not decoder.eof:
            piece = decoder.decompress(left, _BLOCK_NBYTES)
            if not piece:
                break
            plain, left = plain + piece, getattr(decoder, "unconsumed_tail", b"")
    except _broken():
        return b""
    return plain


def _broken() -> tuple[type[Exception], ...]:
    """What decoders raise for bytes that are none of theirs."""
    lzma = sys.modules.get("lzma")
    return zlib.error, OSError, *(() if lzma is None else (lzma.LZMAError,))


def _is_header(block: bytes) -> bool:
    if len(block) < _BLOCK_NBYTES or block[257:262] not in (b"ustar", bytes(5)):
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def opened(path: str) -> Archive:
    """The archive at a path, its headers read. Raises InputError for one that is damaged, or not to be read."""
    with _lock:
        about, found = os.stat(path), _archives.get(path)
        if found is None or _stamp(found.status) != _stamp(about):
            with Path(path).open("rb") as file:
                compression = _compression(file.read(_BLOCK_NBYTES))
                file.seek(0)
                found = _compressed(path, file, about, compression) if compression else _plain(path, file, about)
            _archives[path] = found
        return found


def _stamp(about: os.stat_result) -> tuple[int, int, int]:
    return about.st_ino, about.st_size, about.st_mtime_ns


def _plain(path: str, file: BinaryIO, about: os.stat_result) -> Archive:
    files, directories, notices = _members(path, _Headers(path, file, about.st_size))
    return Archive(path, about, files, directories, notices)


def _compressed(path: str, file: BinaryIO, about: os.stat_result, compression: Compression) -> Archive:
    scratch = _Scratch()
    stream = _Inflated(path, file, about.st_size, scratch, compression)
    files, directories, notices = _members(path, stream)
    stream.finish()
    said = (
        f"{path} is compressed ({compression.program}) and cannot be read in place: {stream.nbytes} bytes were "
        f"decompressed into a temporary file in {tempfile.gettempdir()}, which goes when this ends "
        f"(`{stream.command}` spares that)"
    )
    return Archive(path, about, files, directories, (said, *notices), scratch)


class _Scratch:
    """A temporary file without a name, gone with the last descriptor of it."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd = -1
        with tempfile.TemporaryFile(prefix="reshard-") as file:
            self.fd = os.dup(file.fileno())

    def write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self.fd, view, offset)
            view, offset = view[written:], offset + written

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when Python ends
        if self.fd >= 0:
            close(self.fd)


class _Headers:
    """An archive's file as `tarfile` sees it: small reads, none of them of data."""

    def __init__(self, path: str, file: BinaryIO, nbytes: int) -> None:
        self.path = path
        self._file = file
        self._nbytes = nbytes
        self._at = 0

    def read(self, nbytes: int) -> bytes:
        if not 0 <= nbytes <= _HEADER_LIMIT_NBYTES:
            raise Corrupt(f"{self.path}: at byte {self._at} a header says that {nbytes} bytes belong to it")
        data = self._show(self._at, nbytes)
        self._at += len(data)
        return data

    def seek(self, offset: int) -> int:
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def reach(self, name: str, stop: int) -> None:
        """Raise Incomplete unless the archive goes on to a byte, where a member ends."""
        if stop > self._nbytes:
            raise Incomplete(
                f"{self.path}: {name!s:.300} ends at byte {stop}, the archive at {self._nbytes}",
                hint="the archive was truncated or is still being written: copy it again",
            )

    def _show(self, offset: int, nbytes: int) -> bytes:
        return os.pread(self._file.fileno(), nbytes, offset)


class _Inflated(_Headers):
    """A compressed archive, decompressed as far as it was asked for."""

    def __init__(self, path: str, file: BinaryIO, nbytes: int, scratch: _Scratch, compression: Compression) -> None:
        super().__init__(path, file, nbytes)
        self.command = f"{compression.program} -dc {shlex.quote(path)} > plain.nemo"
        """What decompresses it once and for all."""
        self._new_decoder = compression.decoder
        self.nbytes = 0
        """Decompressed so far."""
        self._scratch = scratch
        self._limit_nbytes = _INFLATED_NBYTES + _MAX_RATIO * nbytes
        self._decoder: Any = None
        self._input = b""
        self._ended = False
        self._check_space("the archive", nbytes)

    def reach(self, name: str, stop: int) -> None:
        if stop > self._limit_nbytes:
            raise Unsupported(
                f"{self.path}: {name!s:.300} ends at byte {stop}, and {self._nbytes} compressed bytes may become "
                f"{self._limit_nbytes}",
                hint=f"if you trust it, decompress it: {self.command}",
            )
        self._check_space(name, stop - self.nbytes)
        self._inflate_to(stop)
        if stop > self.nbytes:
            raise Incomplete(f"{self.path}: {name!s:.300} ends at byte {stop}, the archive at {self.nbytes}")

    def finish(self) -> None:
        """Read on to the end, where the checksum is. Raises Incomplete or Corrupt unless it is there and right."""
        self._inflate_to(self._limit_nbytes)
        if not self._ended:
            raise Unsupported(
                f"{self.path}: it decompresses to more than {self._limit_nbytes} bytes",
                hint=f"if you trust it, decompress it: {self.command}",
            )

    def _check_space(self, name: str, nbytes: int) -> None:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if nbytes > free:
            raise OutputError(
                f"{self.path}: {name!s:.300} needs {nbytes} bytes in {tempfile.gettempdir()}, which has {free}",
                hint=f"TMPDIR=/some/large/disk, or decompress the archive: {self.command}",
            )

    def _show(self, offset: int, nbytes: int) -> bytes:
        self._inflate_to(offset + nbytes)
        return os.pread(self._scratch.fd, nbytes, offset)

    def _inflate_to(self, stop: int) -> None:
        while self.nbytes < stop and not self._ended:
            data = self._next_piece()
            self._scratch.write(data, self.nbytes)
            self.nbytes += len(data)

    def _next_piece(self) -> bytes:
        if self._decoder is None:
            self._input = self._input.lstrip(b"\0") or self._file.read(_PIECE_NBYTES).lstrip(b"\0")
            self._ended = not self._input
            self._decoder = self._new_decoder()
            if self._ended:
                return b""
        if not self._input and getattr(self._decoder, "needs_input", True):
            self._input = self._more()
        try:
            data: bytes = self._decoder.decompress(self._input, _PIECE_NBYTES)
        except _broken() as error:
            is_large = "Memory usage limit" in str(error)
            hint = f"decompress it: {self.command}" if is_large else "copy the archive again"
            raise (Unsupported if is_large else Corrupt)(f"{self.path}: {error}", hint=hint) from error
        self._input = getattr(self._decoder, "unconsumed_tail", b"") or self._decoder.unused_data
        if self._decoder.eof:
            self._decoder = None
        return data

    def _more(self) -> bytes:
        data = self._file.read(_PIECE_NBYTES)
        if not data:
            raise Incomplete(
                f"{self.path}: the compressed archive is cut short after {self._file.tell()} bytes",
                hint="the archive was truncated or is still being written: copy it again",
            )
        return data


# --------------------------------------------------------------------------------------------------------- headers


def _members(path: str, headers: _Headers) -> tuple[dict[str, Place], dict[str, dict[str, None]], tuple[str, ...]]:
    """(files, directories, what the user should know)."""
    files: dict[str, Place] = {}
    directories: dict[str, dict[str, None]] = {"": {}}
    again: list[str] = []
    count = 0
    try:
        reader = tarfile.TarFile(fileobj=headers, mode="r", errorlevel=2)  # type: ignore[arg-type]
        while (info := reader.next()) is not None:
            reader.members.clear()  # type: ignore[attr-defined]
            count += 1
            if count > _MAX_NUM_MEMBERS:
                raise Unsupported(f"{path} has more than {_MAX_NUM_MEMBERS} members")
            name = _checked_name(path, info)
            nbytes = -(-info.size // _BLOCK_NBYTES) * _BLOCK_NBYTES if info.isreg() else 0
            headers.reach(name or "the directory", info.offset_data + nbytes)
            _enter(path, name, info, files, directories, again)
    except InputError:
        raise
    except (tarfile.TarError, RecursionError, ValueError, EOFError, OverflowError) as error:
        raise Corrupt(f"{path} is no tar archive: {error}", hint="copy the archive again") from error
    _check_end(path, headers, reader.offset)
    said = f"{path} has several members of one name, of which the last counts: {', '.join(again[:10])}"
    return files, directories, (said,) if again else ()


def _checked_name(path: str, info: tarfile.TarInfo) -> str:
    """The normalised name of a member. Raises Unsupported for what is none of this archive, or no plain file."""
    name = posixpath.normpath(info.name or ".")
    if not (info.isreg() or info.isdir()) or info.issparse():
        kind = "a link" if info.issym() or info.islnk() else "sparse" if info.issparse() else "a device"
        raise Unsupported(f"{path}: the member {info.name!r:.300} is {kind}", hint=_PACK_AGAIN)
    if name.startswith(("/", "../")) or name == ".." or "\0" in name:
        raise Unsupported(f"{path}: the member {info.name!r:.300} lies outside of the archive", hint=_PACK_AGAIN)
    if info.size < 0 or name.count("/") >= _MAX_DEPTH or (name == "." and info.isreg()):
        raise Corrupt(f"{path}: the member {info.name!r:.300} of {info.size} bytes")
    return "" if name == "." else name


_PACK_AGAIN = "if you trust the archive, extract it with tar and name the folder"


def _enter(
    path: str,
    name: str,
    info: tarfile.TarInfo,
    files: dict[str, Place],
    directories: dict[str, dict[str, None]],
    again: list[str],
) -> None:
    """Note a member, and the directories that it is in."""
    if info.isreg():
        again += [name] if name in files else []
        files[name] = Place(info.offset_data, info.size)
    elif name:
        directories.setdefault(name, {})
    is_both = name in files and name in directories
    while name:
        above, _, last = name.rpartition("/")
        is_both |= above in files
        directories.setdefault(above, {})[last] = None
        name = above
    if is_both:
        raise Corrupt(f"{path}: {info.name!r:.300} is a file and a directory")


def _check_end(path: str, headers: _Headers, offset: int) -> None:
    """Raise unless zeros end the archive: `tarfile` takes a damaged header for its end, too."""
    headers.seek(offset)
    block = headers.read(_BLOCK_NBYTES)
    if len(block) < _BLOCK_NBYTES:
        raise Incomplete(f"{path} ends at byte {offset + len(block)}, without the zeros that end an archive",
                         hint="the archive was truncated or is still being written: copy it again")  # fmt: skip
    if any(block):
        raise Corrupt(f"{path}: the header at byte {offset} is damaged", hint="copy the archive again")
