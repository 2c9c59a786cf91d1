"""An evaluation as a process of its own, which outlives whoever started it and is found again.

    OUTPUT/.process/lock     held by the process and all its children for as long as one of them lives
    OUTPUT/.process/pid      its process group
    OUTPUT/.process/exit     its exit status, written when it ended by itself
    OUTPUT/.process/log      what it said

The lock is taken before the process is started and inherited by it, so there is no moment at which a process that may
run cannot be seen. A process id alone would not tell: they are given again.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reshard.evaluate.said import last_lines

_MARK = "RESHARD_OUTPUT"
"""The variable by which a process that left its group is known."""
_LAUNCHERS = re.compile(
    r"(SLURM|PMI|PMIX|OMPI|TORCHELASTIC|ACCELERATE|FSDP)_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK"
    r"|MASTER_(ADDR|PORT)"
)
"""Variables of whoever launched us as one of several ranks: a child that sees them waits for ranks that never come."""
_NOTING = """
printf "%s" "$$" 1<> "$0/pid.new" && mv "$0/pid.new" "$0/pid"
"$@"
status=$?
printf "%s" "$status" 1<> "$0/exit.new" && mv "$0/exit.new" "$0/exit"
exit "$status"
"""
"""A shell that runs the command given to it; its own name is the folder."""
_NOTES = {"pid.new": 20, "exit.new": 3}
"""Bytes that are written before there is anything to note: the notes go over them, on a disk that is full by then."""
_LEAST_FREE_NBYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a process."""

    is_running: bool
    status: int | None
    """Its exit status; None while it runs, and when it was killed."""
    log: Path

    def last_words(self) -> str:
        """The end of what it said."""
        return last_lines(self.log) or f"it said nothing{_why_not(self.log)}"


def start(command: Sequence[str], output: Path, environment: Mapping[str, str] | None = None) -> int:
    """Start a command in a session of its own; gives its process group. Raises OSError."""
    folder = output / ".process"
    folder.mkdir(parents=True)
    for name, nbytes in _NOTES.items():
        (folder / name).write_bytes(b" " * nbytes)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # which waits for those who look, no longer than they do
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _NOTING, str(folder), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=(lock,),
                env={**_environment(), **(environment or {}), _MARK: str(output)}, cwd=output,
            )  # fmt: skip
    finally:
        os.close(lock)
    _children[process.pid] = process
    return process.pid


def _environment() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not _LAUNCHERS.fullmatch(name)}
    return ours | {"PYTHONUNBUFFERED": "1"}


_children: dict[int, subprocess.Popen[bytes]] = {}
"""Of this process, so that those that ended do not stay as zombies."""


def look(output: Path) -> Seen | None:
    """What became of the process of an output directory; None when none was ever started there."""
    folder = output / ".process"
    _reap()
    with suppress(OSError, ValueError):  # first, because what it left running in the background says nothing
        return Seen(False, int((folder / "exit").read_text()), folder / "log")
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: others may look at the same time
    except BlockingIOError:
        return Seen(True, None, folder / "log")
    finally:
        os.close(lock)
    with suppress(OSError, ValueError):
        return Seen(False, int((folder / "exit").read_text()), folder / "log")
    return Seen(False, None, folder / "log")


def kill(output: Path, patience_s: float = 5.0) -> None:
    """End a process and its children: politely, then not. Returns when none of them is left."""
    _signal(output, signal.SIGTERM)
    until = time.monotonic() + patience_s
    while _is_running(output) and time.monotonic() < until:
        time.sleep(0.02)
    until = time.monotonic() + patience_s
    _signal(output, signal.SIGKILL)
    while _is_running(output) and time.monotonic() < until:  # one may just have been born
        _signal(output, signal.SIGKILL)
        time.sleep(0.05)


def _why_not(log: Path) -> str:
    with suppress(OSError):
        if shutil.disk_usage(log.parent).free < _LEAST_FREE_NBYTES:
            return f", and the disk is full that {log} is on"
    return ""


def _is_running(output: Path) -> bool:
    seen = look(output)
    return seen is not None and seen.is_running


def _strays(output: Path) -> Iterator[int]:
    """Processes that left the group, as the workers of launchers do. Only where the system has a /proc."""
    mark = os.fsencode(f"{_MARK}={output}")
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                yield int(process.name)


def _signal(output: Path, number: int) -> None:
    """To the group, whose number may be another's once it ended, and to whoever left it."""
    if _is_running(output):
        with suppress(OSError, ValueError):
            os.killpg(int((output / ".process" / "pid").read_text()), number)
    for pid in _strays(output):
        with suppress(OSError):
            os.kill(pid, number)


def _reap() -> None:
    for pid, process in list(_children.items()):
        if process.poll() is not None:
            _children.pop(pid, None)
