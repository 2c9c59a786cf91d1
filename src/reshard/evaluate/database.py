"""One SQLite file, open in many threads and processes: its tables, its transactions, and what its errors mean.

Every change is one transaction. Several processes of one machine share a file through SQLite's write-ahead log. That
log lives in memory that machines do not share, so on network file systems the file has a rollback journal and locks
instead.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from reshard.errors import Corrupt, InputError, ReshardError, Unsupported

_SCHEMA = 1
_APPLICATION = 0x72736864
"""`rshd`: says whose file it is."""
_BUSY_S = 30.0
_NETWORK = {
    "nfs",
    "nfs4",
    "lustre",
    "cifs",
    "smb3",
    "smbfs",
    "ceph",
    "gpfs",
    "beegfs",
    "9p",
    "afs",
    "wekafs",
    "glusterfs",
}
_TABLES = """
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL, step INTEGER NOT NULL, kind TEXT NOT NULL, fingerprint TEXT NOT NULL,
    state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0,
    job_id TEXT NOT NULL DEFAULT '', output TEXT NOT NULL DEFAULT '',
    source TEXT NOT NULL DEFAULT '', held TEXT NOT NULL DEFAULT '', merged TEXT NOT NULL DEFAULT '',
    digest TEXT NOT NULL DEFAULT '', files TEXT NOT NULL DEFAULT '{}', payload TEXT NOT NULL DEFAULT '{}',
    not_before REAL NOT NULL DEFAULT 0, created REAL NOT NULL, changed REAL NOT NULL, began REAL NOT NULL DEFAULT 0,
    owner TEXT NOT NULL DEFAULT '', expires REAL NOT NULL DEFAULT 0,
    UNIQUE (run, step, kind, fingerprint)
);
CREATE INDEX jobs_by_state ON jobs (state, id);
CREATE INDEX jobs_by_fingerprint ON jobs (fingerprint);
CREATE TABLE attempts (
    job INTEGER NOT NULL REFERENCES jobs (id), number INTEGER NOT NULL, output TEXT NOT NULL,
    job_id TEXT NOT NULL DEFAULT '', state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
    began REAL NOT NULL, ended REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (job, number)
);
CREATE TABLE results (
    run TEXT NOT NULL, step INTEGER NOT NULL, kind TEXT NOT NULL,
    task TEXT NOT NULL, metric TEXT NOT NULL, filter TEXT NOT NULL,
    value REAL, fingerprint TEXT NOT NULL, job INTEGER NOT NULL, time REAL NOT NULL, logged INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (run, step, kind, task, metric, filter)
);
CREATE INDEX results_not_logged ON results (logged) WHERE logged = 0;
CREATE TABLE cursors (
    name TEXT PRIMARY KEY, offset INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '',
    owner TEXT NOT NULL DEFAULT '', expires REAL NOT NULL DEFAULT 0
);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Database:
    """The file, open. It may be used from any thread; each gets its own connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._prepare()
            self._inode = os.stat(path).st_ino
        except sqlite3.DatabaseError as error:
            self.close()
            raise _explained(error, path) from error

    @property
    def is_in_place(self) -> bool:
        """Whether what is open is what has the name: a file that was removed can be written, and nobody sees it."""
        try:
            return os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            return False
        except OSError:  # a file system that is away
            return True

    def close(self) -> None:
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what is done inside, or nothing; one at a time. Inside another it is a part of that."""
        connection = self._connection()
        if connection.in_transaction:
            yield connection
            return
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:  # which a full disk has ended already
                with suppress(sqlite3.DatabaseError):
                    connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.DatabaseError):
                raise _explained(error, self.path) from error
            raise

    def _all(self, statement: str, *values: Any) -> list[Any]:
        try:
            return self._connection().execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise _explained(error, self.path) from error

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=256
            )
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            self._local.connection = connection
            with self._lock:
                self._connections.append(connection)
        return connection

    def _prepare(self) -> None:
        """The tables, made if the file is new."""
        connection = self._connection()
        _set_journal(connection, "DELETE" if is_shared(self.path) else "WAL")
        with self.transaction():
            application = int(connection.execute("PRAGMA application_id").fetchone()[0])
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if (application, version) == (0, 0) and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _TABLES.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_SCHEMA}")
            elif application != _APPLICATION:
                raise InputError(f"{self.path} is a database of something else", hint="name another directory")
            elif version != _SCHEMA:
                raise Unsupported(
                    f"{self.path} has the schema {version}, this reshard knows {_SCHEMA}",
                    hint="use the reshard that wrote it, or move it away: results come back from evals.jsonl",
                )


def _set_journal(connection: sqlite3.Connection, mode: str) -> None:
    """SQLite does not wait when somebody else is about to do the same."""
    until = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute(f"PRAGMA journal_mode = {mode}")
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def is_shared(path: Path) -> bool:
    """Whether a path is on a network file system, as far as the mounts tell."""
    real = os.path.realpath(path)
    longest, type = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return False
    for line in mounts:
        _, at, kind, *_ = (*line.split(" "), "", "", "")
        at = at.replace("\\040", " ").rstrip("/")
        if (real == at or real.startswith(at + "/")) and len(at) >= len(longest):
            longest, type = at, kind
    return type in _NETWORK or type.startswith("fuse.")


def _explained(error: sqlite3.DatabaseError, path: Path) -> ReshardError:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return Corrupt(f"{path}: {error}", hint="move it away: results come back from evals.jsonl")
    if name.startswith("SQLITE_FULL"):
        return StoreBusy(f"{path}: the disk is full")
    is_away = name.startswith("SQLITE_CANTOPEN") and path.exists()  # its journal: a full disk takes no new file
    if is_away or name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR")):
        return StoreBusy(f"{path}: {error}")
    return ReshardError(f"{path}: {error}")


class StoreBusy(ReshardError):
    """The file cannot be written right now: the disk is full, or others hold it. Nothing was changed."""


__all__ = ["Database", "StoreBusy", "is_shared"]
