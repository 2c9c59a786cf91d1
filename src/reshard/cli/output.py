"""What people see: results on stdout, talk and one progress bar on stderr, JSON when asked for.

Where several ranks were launched, the first alone is seen.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reshard.storage.launch import current

_LINE_EVERY_S = 10.0
_REFRESH_EVERY_S = 0.1


def say(text: str) -> None:
    """A line of talk."""
    if current().is_first:
        sys.stderr.write(text + "\n")


def show(text: str) -> None:
    """A line of the result."""
    if current().is_first:
        sys.stdout.write(text + "\n")


def show_json(value: Any) -> None:
    """The result as JSON: dataclasses as objects, paths as text."""
    import msgspec

    encoded = msgspec.json.encode(_plain(value))
    show(msgspec.json.format(encoded, indent=2).decode())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def size(nbytes: float) -> str:
    """Bytes for people, decimal: `1.5 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def count(number: int) -> str:
    """How many, for people: `51`, `1.24 M`, `70.6 B`."""
    for unit, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def duration(seconds: float) -> str:
    """Time for people: `1.2 s`, `3 min 05 s`."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


@contextmanager
def progress(total_nbytes: int, what: str, quiet: bool = False) -> Iterator[Callable[[int, str], None] | None]:
    """A bar on a terminal; elsewhere a line every ten seconds. Gives what the engine calls."""
    if quiet or total_nbytes == 0 or not current().is_first:
        yield None
    elif sys.stderr.isatty():
        yield from _bar(total_nbytes, what)
    else:
        yield _Lines(total_nbytes, what).advance


def _bar(total_nbytes: int, what: str) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[fqn]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total_nbytes, fqn="")
        lock, state = threading.Lock(), {"waiting": 0, "shown": 0.0}

        def advance(nbytes: int, fqn: str) -> None:
            with lock:
                state["waiting"] += nbytes
                if time.monotonic() - state["shown"] < _REFRESH_EVERY_S:
                    return
                nbytes, state["waiting"], state["shown"] = int(state["waiting"]), 0, time.monotonic()
            bar.update(task, advance=nbytes, fqn=fqn)

        yield advance


class _Lines:
    """Progress for logs."""

    def __init__(self, total_nbytes: int, what: str) -> None:
        self._total, self._what = total_nbytes, what
        self._done, self._began = 0, time.monotonic()
        self._next = self._began + _LINE_EVERY_S
        self._lock = threading.Lock()

    def advance(self, nbytes: int, fqn: str) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + _LINE_EVERY_S
            rate = self._done / (now - self._began)
            left = duration((self._total - self._done) / rate) if rate else "?"
            say(f"{self._what}: {size(self._done)} of {size(self._total)}, {size(rate)}/s, {left} left, {fqn}")
