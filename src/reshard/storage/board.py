"""Where the ranks of a run write to each other: a board of small notes, each written by one rank, read by polling.

    Directory   files in the staging directory, which all ranks share because they share the output; a note is written
                beside and renamed, so it is read whole or not at all, on NFS too
    Store       torchrun's own key-value store, where that launched us

A note that is not there and one that cannot be read at the moment are the same: the reader looks again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import xxhash

from reshard.errors import OutputError
from reshard.storage.launch import Launch


class Board(Protocol):
    """Notes by key."""

    def put(self, key: str, note: bytes) -> None:
        """Write a note over the last one of this key. Raises OSError."""

    def get(self, key: str) -> bytes | None:
        """The newest note of a key that is seen; None when there is none."""

    def machine(self) -> str:
        """Equal for two processes that can see each other die; empty where nobody can."""

    def is_dead(self, process: str) -> bool:
        """Whether a process of this machine is known to have ended."""

    def come_back(self) -> None:
        """Be there again where another run has cleared up around a process that waits for its own to begin."""

    def retire(self, key: str) -> None:
        """Take this process and its note off the board."""

    def remove(self) -> None:
        """Leave nothing on the disk."""


def board_of(launch: Launch, staging: Path, process: str) -> Board:
    """The board of a launch and a destination. `process` is the name of this process there."""
    if launch.store is not None and find_spec("torch") is not None:
        return Store(launch)
    identity = xxhash.xxh3_64_hexdigest(f"{launch.world_size}\n{launch.identity}".encode())
    return Directory(staging / f"ranks-{identity}", process)


_ALIVE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


class Directory:
    """A board on the file system. Each process holds a lock on a file of its name: when it ends, the kernel lets go,
    and others on the same machine see it at once."""

    def __init__(self, path: Path, process: str) -> None:
        self._path, self._process = path, process
        self._alive = -1
        self._hold()

    def _hold(self) -> None:
        if self._alive >= 0:
            os.close(self._alive)
        self._alive = -1
        while self._alive < 0:
            with suppress(FileNotFoundError):  # another run has just cleared up
                self._path.mkdir(parents=True, exist_ok=True)
                self._alive = os.open(self._path / f"alive.{self._process}", _ALIVE_FLAGS, 0o644)
        with suppress(OSError):  # without locks only silence tells
            fcntl.flock(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def put(self, key: str, note: bytes) -> None:
        beside = self._path / f".{key}.{self._process}"
        beside.write_bytes(note)
        os.replace(beside, self._path / key)

    def come_back(self) -> None:
        if not (self._path / f"alive.{self._process}").exists():
            self._hold()

    def get(self, key: str) -> bytes | None:
        try:
            return (self._path / key).read_bytes()
        except OSError:
            return None

    def machine(self) -> str:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return f"{boot} {os.stat(self._path).st_dev}"  # another mount may have other locks
        except OSError:
            return ""

    def is_dead(self, process: str) -> bool:
        try:
            fd = os.open(self._path / f"alive.{process}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
        except OSError:
            return False
        finally:
            os.close(fd)

    def retire(self, key: str) -> None:
        for name in (key, f"alive.{self._process}"):
            (self._path / name).unlink(missing_ok=True)
        self._let_go()
        for directory in (self._path, self._path.parent):
            with suppress(OSError):  # others may be there
                directory.rmdir()

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1


_stores: dict[tuple[str, int], Any] = {}
"""Connections of this process: a store can be opened once."""


class Store:
    """A board in torch's TCPStore. torchrun's agent sees processes die, so nothing here has to."""

    def __init__(self, launch: Launch) -> None:
        assert launch.store is not None
        self._store, self._where = _connected(launch), "{}:{}".format(*launch.store)
        self._prefix = f"reshard/{xxhash.xxh3_64_hexdigest(launch.identity.encode())}/"

    def put(self, key: str, note: bytes) -> None:
        try:
            self._store.set(self._prefix + key, note)
        except RuntimeError as error:
            raise ConnectionError(f"the store at {self._where} does not answer: {error}") from error

    def get(self, key: str) -> bytes | None:
        try:
            if not self._store.check([self._prefix + key]):
                return None
            note: bytes = self._store.get(self._prefix + key)
            return note
        except RuntimeError as error:
            raise ConnectionError(f"the store at {self._where} does not answer: {error}") from error

    def come_back(self) -> None:
        """A store is not cleared up around anyone."""

    def retire(self, key: str) -> None:
        """It goes with its launch."""

    def machine(self) -> str:
        return ""

    def is_dead(self, process: str) -> bool:
        return False

    def remove(self) -> None:
        """There is nothing on the disk."""


def _connected(launch: Launch) -> Any:
    from datetime import timedelta

    assert launch.store is not None
    if launch.store not in _stores:
        distributed = import_module("torch.distributed")  # torchrun is torch's: where it launched us there is torch
        host, port = launch.store
        try:
            _stores[launch.store] = distributed.TCPStore(
                host, port, None, launch.owns_store, timedelta(seconds=launch.join_timeout_s), False
            )
        except RuntimeError as error:
            raise OutputError(f"torchrun's store at {host}:{port} cannot be reached from {hostname()}") from error
    return _stores[launch.store]


def hostname() -> str:
    """Of this machine, for messages."""
    return socket.gethostname()
