"""`evals.jsonl`: every metric once, at its step. It is the truth; all other loggers derive from it.

    {"step": 500, "kind": "regular", "task": "mmmu_val", "metric": "acc", "filter": "none", "value": 0.41,
     "name": "eval/mmmu_val/acc", "time": 1795279048.9, "run": "/out", "fingerprint": "...", "job": 3}

A line is appended and flushed to the disk before the store says that it was. Whoever is killed in between finds it in
the file; a line that was cut short is removed before the next one. Steps come in any order: that of their results.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from reshard.errors import ReshardError
from reshard.evaluate.lease import LEASE_S, new_owner
from reshard.evaluate.loggers import Logger, Point, open_logger
from reshard.evaluate.metrics import as_text
from reshard.evaluate.records import Result, State
from reshard.evaluate.store import LeaseLost, Store
from reshard.storage.staging import fsync_directory

NAME = "evals.jsonl"
_CHUNK_POINTS = 500
_RETRY_S = (5.0, 300.0)
_LOOK_S = 1.0


def line_of(result: Result) -> bytes:
    """One result as a line of the file."""
    row = {
        "step": result.step, "kind": result.kind, "task": result.task, "metric": result.metric,
        "filter": result.filter, "value": as_text(result.value), "name": point_of(result).name, "time": result.time,
        "run": result.run, "fingerprint": result.fingerprint, "job": result.job,
    }  # fmt: skip
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def point_of(result: Result) -> Point:
    """One result as the loggers take it."""
    group = "eval" if result.kind == "regular" else f"eval_{result.kind}"
    return Point(result.step, f"{group}/{result.name}", result.value, result.time)


def read(path: Path, offset: int = 0) -> Iterator[tuple[int, Result]]:
    """(end of line, result) of every whole line from an offset on. A line that is no result is passed over."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            result = _result(line)
            if result is not None:
                yield offset, result


def _result(line: bytes) -> Result | None:
    try:
        row: Any = json.loads(line)
        return Result(
            str(row["run"]), int(row["step"]), str(row["kind"]), str(row["task"]), str(row["metric"]),
            str(row["filter"]), float(row["value"]), str(row["fingerprint"]), int(row["job"]), float(row["time"]), True,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return None


class Journal:
    """`evals.jsonl` of a run, written by whichever watcher gets there first."""

    def __init__(self, path: Path, store: Store) -> None:
        self.path = path
        self._store = store
        self._offset = 0
        self._keys = set[tuple[str, int, str, str, str, str]]()
        self._inode = 0

    def restore(self) -> int:
        """Take what the file has and the store lacks over into the store; gives the number of results."""
        return self._store.restore([result for _, result in read(self.path)])

    def write(self) -> list[Result]:
        """Append every result that the file lacks and mark it; gives those appended. Raises OSError."""
        if not self._store.unlogged():
            return []
        with self._store.transaction():  # one watcher at a time
            waiting = self._store.unlogged()
            self._catch_up()
            new = [result for result in waiting if result.key not in self._keys]
            if new:
                self._append(b"".join(map(line_of, new)))
                self._keys |= {result.key for result in new}
            self._store.mark_logged(waiting)
        return new

    def settle(self) -> None:
        """Say of the jobs whose results are all in the file that they are done."""
        for job in self._store.jobs([State.MEASURED]):
            with self._store.transaction():
                left = [r for r in self._store.unlogged() if r.job == job.id]
                if not left:
                    self._store.change(job, state=State.DONE, reason="")

    def _catch_up(self) -> None:
        """Know all keys of the file, which another watcher may have written, or somebody removed."""
        with suppress(FileNotFoundError):
            stat = os.stat(self.path)
            if (stat.st_ino, stat.st_size >= self._offset) == (self._inode, True):
                for offset, result in read(self.path, self._offset):
                    self._offset = offset
                    self._keys.add(result.key)
                return
            self._inode = stat.st_ino
        self._offset, self._keys = 0, set()
        for offset, result in read(self.path):
            self._offset = offset
            self._keys.add(result.key)

    def _append(self, data: bytes) -> None:
        is_new = not self.path.exists()
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            end = _whole_lines(fd)
            try:
                os.ftruncate(fd, end)
                view, at = memoryview(data), end
                while view:
                    written = os.pwrite(fd, view, at)
                    view, at = view[written:], at + written
                os.fsync(fd)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(fd, end)
                raise
        finally:
            os.close(fd)
        if is_new:
            fsync_directory(self.path.parent)


def _whole_lines(fd: int) -> int:
    """Where the last whole line of a file ends."""
    end = os.fstat(fd).st_size
    while end:
        begin = max(0, end - 4096)
        found = os.pread(fd, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


# ------------------------------------------------------------------------------------------------------- deliveries


@dataclass(slots=True)
class Delivery:
    """One logger, fed from `evals.jsonl` by a thread of its own: whatever it waits for, nobody waits for it."""

    name: str
    journal: Path
    store: Store
    run: Path
    options: dict[str, Any]
    folder: Path
    problem: str = ""
    """What went wrong last; empty when all went well."""
    _stop: Event = None  # type: ignore[assignment]
    _thread: Thread = None  # type: ignore[assignment]

    def start(self) -> None:
        self._stop = Event()
        self._thread = Thread(target=self._run, name=f"logger {self.name}", daemon=True)
        self._thread.start()

    def finish(self, patience_s: float) -> int:
        """Wait until everything is delivered, at most so long; gives the number of points that are not."""
        until = time.monotonic() + patience_s
        while self.left() and time.monotonic() < until and self._thread.is_alive():
            time.sleep(0.05)
        self._stop.set()
        self._thread.join(max(0.1, until - time.monotonic()))
        return self.left()

    def left(self) -> int:
        """Points in the file that the logger has not got."""
        return sum(1 for _ in read(self.journal, self.store.cursor(self.name)))

    def _run(self) -> None:
        owner, wait = new_owner(), _RETRY_S[0]
        logger: Logger | None = None
        while not self._stop.wait(_LOOK_S):
            try:
                if _size(self.journal) <= self.store.cursor(self.name):
                    continue
                offset = self.store.claim_cursor(self.name, owner, LEASE_S)
                if offset is None:
                    continue
                logger = logger or open_logger(self.name, self.run, self.folder, self.options)
                self._deliver(logger, owner, offset)
                self.problem, wait = "", _RETRY_S[0]
            except LeaseLost:
                continue
            except Exception as error:  # a logger's package raises what it likes, and must not stop anything
                self.problem = f"{type(error).__name__}: {error}"
                self._stop.wait(wait)
                wait = min(2 * wait, _RETRY_S[1])
        with suppress(ReshardError):
            self.store.release(owner)
        if logger is not None:
            with suppress(Exception):
                logger.close()

    def _deliver(self, logger: Logger, owner: str, offset: int) -> None:
        rows = list(read(self.journal, offset))
        for start in range(0, len(rows), _CHUNK_POINTS):
            chunk: Sequence[tuple[int, Result]] = rows[start : start + _CHUNK_POINTS]
            logger.log([point_of(result) for _, result in chunk])
            self.store.move_cursor(self.name, owner, chunk[-1][0])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def is_finite(result: Result) -> bool:
    """Whether a result can be compared with others."""
    return math.isfinite(result.value)


__all__ = ["NAME", "Delivery", "Journal", "is_finite", "line_of", "point_of", "read"]
