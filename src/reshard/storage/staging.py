"""The place beside a destination where an output is made, and the rename that makes it the destination.

    .NAME.reshard/lock      held by one process at a time
    .NAME.reshard/journal   the fingerprint of the plan; finished segments and their digests; at last the inode that is
                            about to become the destination
    .NAME.reshard/files     the files of the output, `output` where it is one file

and where several ranks write, under the lock of the first:

    .NAME.reshard/journal.R what rank R has finished; the journal is what all knew when they began
    .NAME.reshard/ranks-... what the ranks say to each other

The journal goes late and the lock last when all is done, so a process that is killed anywhere in between leaves enough
to tell a complete destination from somebody else's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from reshard.errors import Corrupt, OutputError, ReshardError
from reshard.storage.plan import Digest, FilePlan, Plan

_NAME_LIMIT_NBYTES = 255
"""Of one name in a directory, on the usual file systems."""


def check_destination(destination: Path, plan: Plan, force: bool) -> None:
    """Raise OutputError when the destination must not or cannot be written; nothing is touched."""
    try:
        _check_destination(destination, plan, force)
    except OSError as error:
        raise explained(error, destination) from error


def _check_destination(destination: Path, plan: Plan, force: bool) -> None:
    final = resolved(destination)
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
    here = Path.cwd()
    if held and final.is_dir() and (final in (Path.home(), here, *here.parents) or (final / ".git").exists()):
        raise OutputError(f"{destination} is not replaced: it is no place for an output", hint="choose another output")
    path = source_within(final, plan)
    if path is not None:
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


def source_within(final: Path, plan: Plan) -> str | None:
    """The first file that is read and is the destination, or lies in it."""
    for path in plan.sources():
        real = Path(os.path.realpath(path))
        if final == real or final in real.parents:
            return path
    return None


def check_space(destination: Path, plan: Plan) -> None:
    """Raise OutputError when the output would not fit on the disk."""
    final = resolved(destination)
    parent = _existing_parent(final)
    free = shutil.disk_usage(parent).free + _allocated_nbytes(staging_of(final))
    if plan.nbytes > free:
        raise OutputError(
            f"{destination}: {plan.nbytes} bytes to write, {free} free in {parent}",
            hint="free some space, choose another output, or write less with --dtype bfloat16",
        )


def _allocated_nbytes(directory: Path) -> int:
    """What the files below a directory take of the disk. Other ranks may come and go there meanwhile."""
    nbytes = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                nbytes += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return nbytes


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """The staging directory of a destination, held by one process at a time."""
    staging = staging_of(final)
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
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise OutputError(f"{final} is being written by another process (it holds {staging}/lock)") from error
        if inode(staging / "lock") == os.fstat(lock).st_ino:
            return lock
        os.close(lock)


def clear(staging: Path) -> None:
    """Remove a staging directory that this process holds.

    The journal goes late, because it is what tells a complete destination from somebody else's; the lock goes last, so
    that whoever waits for it finds nothing old.
    """
    for path in staging.iterdir():
        if path.name == "lock" or path.name.startswith("journal"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in (*staging.glob("journal.*"), staging / "journal", staging / "lock"):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # another process may have begun
        staging.rmdir()


def staging_of(final: Path) -> Path:
    """Where the output of a destination is made."""
    name = final.name
    if len(name.encode()) > 230:
        name = xxhash.xxh3_64_hexdigest(name.encode())
    return final.parent / f".{name}.reshard"


def staged_name(file: FilePlan) -> str:
    """Of a file of the plan, below `files`."""
    return file.path or "output"


def create(path: Path, nbytes: int) -> int:
    """A file of this size, opened for reading and writing; one that is there keeps its bytes."""
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


def fsync_directory(path: Path) -> None:
    """Have the disk keep what was created and renamed in a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def journal_lines(path: Path) -> list[bytes]:
    """The lines of a journal that end, the first of them the fingerprint."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []


class JournalRead:
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


class Journal(JournalRead):
    """The journal of a staging directory, held open; it begins anew unless its plan is the one of `fingerprint`.

    What ranks of an earlier run noted is taken over into it.
    """

    def __init__(self, staging: Path, fingerprint: str) -> None:
        path, parts = staging / "journal", sorted(staging.glob("journal.*"))
        lines = journal_lines(path)
        if not lines or lines[0] != fingerprint.encode():
            shutil.rmtree(staging / "files", ignore_errors=True)
            lines, parts = [fingerprint.encode()], _unlinked(parts)
        for part in map(journal_lines, parts):
            lines += part[1:] if part[:1] == lines[:1] else []
        super().__init__(lines)
        whole = staging / "whole journal"
        whole.write_bytes(b"".join(line + b"\n" for line in lines))  # without the line that was cut short
        os.replace(whole, path)
        _unlinked(parts)
        self._open(path)

    def _open(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def note(self, path: str, index: int, done: Digest) -> None:
        with self._lock:
            os.write(self._fd, _segment_line(path, index, done))

    def note_all(self, digests: Mapping[tuple[str, int], Digest]) -> None:
        """What other ranks finished."""
        lines = (_segment_line(path, index, done) for (path, index), done in digests.items())
        with self._lock:
            data = memoryview(b"".join(lines))
            while data:
                data = data[os.write(self._fd, data) :]

    def note_commit(self, inode: int | None) -> None:
        """All is written and flushed; this inode is the next to be renamed."""
        os.write(self._fd, f"commit {inode}\n".encode())
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PartJournal(Journal):
    """The journal of one rank, begun anew beside the one that the first rank keeps."""

    def __init__(self, staging: Path, fingerprint: str, rank: int) -> None:
        JournalRead.__init__(self, journal_lines(staging / "journal"))
        path = part_journal(staging, rank)
        path.write_bytes(fingerprint.encode() + b"\n")
        self._open(path)


def part_journal(staging: Path, rank: int) -> Path:
    """Where a rank notes what it has finished."""
    return staging / f"journal.{rank}"


def _segment_line(path: str, index: int, done: Digest) -> bytes:
    return f"{index} {done.xxh3_128} {done.crc32:08x} {path}\n".encode()


def _unlinked(paths: Iterable[Path]) -> list[Path]:
    """Remove files; nothing is left of them."""
    for path in paths:
        path.unlink(missing_ok=True)
    return []


def commit(plan: Plan, folder: Path, final: Path) -> None:
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
    fsync_directory(final.parent)


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


def payload_of(plan: Plan, folder: Path) -> Path:
    """What a commit renames to the destination, last."""
    return folder / "output" if plan.is_one_file else folder


def resolved(destination: Path) -> Path:
    """The destination itself, where it is a symbolic link."""
    return Path(os.path.realpath(destination))


def _existing_parent(path: Path) -> Path:
    return next(p for p in path.parents if os.path.lexists(p))


def inode(path: Path) -> int | None:
    """Which file or directory a path is; None when there is none."""
    try:
        return os.stat(path, follow_symlinks=False).st_ino
    except OSError:
        return None


def explained(error: OSError, destination: Path) -> ReshardError:
    """An error of the system as one that says what to do."""
    if error.errno == errno.ENOSPC:
        return OutputError(
            f"{destination}: the disk is full", hint="free some space and run again: what is done is kept"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return OutputError(f"{destination} cannot be written: {error.strerror}")
    if error.errno == errno.EIO:
        return Corrupt(f"{error.filename or destination}: {error}", hint="the disk could not read or write this")
    return OutputError(f"{destination}: {error}")
