"""Full disks and read errors in mid-run: the destination is absent or the old one, and running again finishes."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reshard
from checkpoints import ROOT, child, equals, left_in, model, write_dcp
from reshard.cli.main import main
from reshard.errors import Corrupt, OutputError
from reshard.storage import staging

MODEL = model(num_layers=6, width=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dcp(tmp_path_factory.mktemp("faults") / "shards", MODEL, ranks=2)


@pytest.fixture(params=["absent", "old"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "old":
        write_dcp(tmp_path / "other", model(1))
        reshard.merge(tmp_path / "other", tmp_path / "out")
    return tmp_path / "out"


def content(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in path.rglob("*")} if path.exists() else {}


class Failing:
    """A function of `os` that works some times and then raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, after: int, number: int) -> None:
        self.calls, self._after, self._number, self._real = 0, after, number, getattr(os, name)
        self._patch, self._name = monkeypatch, name
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls > self._after:
            raise OSError(self._number, os.strerror(self._number))
        return self._real(*args)

    def mend(self) -> None:
        self._patch.setattr(os, self._name, self._real)


@pytest.mark.parametrize("after", [0, 1, 10, 20])
def test_a_disk_that_fills_up_while_writing(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    before = content(destination)
    failing = Failing(monkeypatch, "pwrite", after, errno.ENOSPC)
    with pytest.raises(OutputError, match="the disk is full") as caught:
        reshard.merge(source, destination, force=True, threads=1)
    assert "run again" in str(caught.value.hint)
    assert content(destination) == before
    failing.mend()
    merged = reshard.merge(source, destination, force=True)
    assert (merged.kept_nbytes > 0) == (after > 0)
    assert equals(destination, MODEL)
    assert reshard.verify(destination, source).ok
    assert not (destination.parent / ".out.reshard").exists()


@pytest.mark.parametrize("name", ["posix_fallocate", "fsync", "ftruncate", "rename"])
def test_a_disk_that_fails_elsewhere(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = content(destination)
    failing = Failing(monkeypatch, name, 0, errno.ENOSPC)
    if name == "rename" and before:
        pytest.skip("two directories are exchanged by another call")
    with pytest.raises(OutputError, match="the disk is full"):
        reshard.merge(source, destination, force=True)
    assert content(destination) == before
    failing.mend()
    reshard.merge(source, destination, force=True)
    assert equals(destination, MODEL)


def test_without_an_exchange_of_directories_the_old_one_comes_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dcp(tmp_path / "other", model(1))
    reshard.merge(tmp_path / "other", tmp_path / "out")
    before = content(tmp_path / "out")

    class NoExchange:
        def __init__(self, *_: object, **__: object) -> None:
            pass

    monkeypatch.setattr(staging.ctypes, "CDLL", NoExchange)
    real = os.rename

    def rename(a: Any, b: Any) -> None:
        if os.fspath(a).endswith("files"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match="cannot be written"):
        reshard.merge(source, tmp_path / "out", force=True)
    assert content(tmp_path / "out") == before
    monkeypatch.setattr(os, "rename", real)
    merged = reshard.merge(source, tmp_path / "out", force=True)
    assert merged.kept_nbytes > 0
    assert equals(tmp_path / "out", MODEL)


@pytest.mark.parametrize("after", [0, 3, 15])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_read_error_names_file_and_fqn_and_keeps_what_is_done(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, after: int, threads: int
) -> None:
    before = content(destination)
    failing = Failing(monkeypatch, "preadv", after, errno.EIO)
    with pytest.raises(Corrupt, match=r"__\d_0\.distcp") as caught:
        reshard.merge(source, destination, force=True, threads=threads)
    assert any(fqn in str(caught.value) for fqn in MODEL)
    assert content(destination) == before
    failing.mend()
    merged = reshard.merge(source, destination, force=True)
    assert equals(destination, MODEL)
    if threads == 1:
        assert (merged.kept_nbytes > 0) == (after > 2)


def test_an_error_while_headers_are_read_ends_in_exit_code_1(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Failing(monkeypatch, "pread", 0, errno.EIO)
    assert main(["merge", str(source), str(tmp_path / "out")]) == 1
    assert ".distcp" in capsys.readouterr().err
    assert left_in(tmp_path) == []


def test_a_short_read_is_read_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        view = buffers[0].cast("B")
        return real(fd, [view[: max(1, len(view) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    reshard.merge(source, tmp_path / "out")
    assert equals(tmp_path / "out", MODEL)


def test_a_short_write_is_written_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: max(1, len(data) // 3)], at))
    reshard.merge(source, tmp_path / "out")
    assert equals(tmp_path / "out", MODEL)
    assert reshard.verify(tmp_path / "out", source).ok


def test_too_little_free_space_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = staging.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.used, 1000))
    with pytest.raises(OutputError, match="1000 free"):
        reshard.merge(source, tmp_path / "out")
    assert left_in(tmp_path) == []


def test_a_limit_on_file_sizes(source: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE, as a batch system sets it."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = child("merge", source, tmp_path / "out", preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()
    assert child("merge", source, tmp_path / "out").returncode == 0
    assert equals(tmp_path / "out", MODEL)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="root mounts file systems, on Linux")
def test_a_disk_that_is_really_full(source: Path, small_disk: Path) -> None:
    other = small_disk / "in the way"
    other.write_bytes(b"x" * 600_000)
    done = child("merge", source, small_disk / "out")
    assert done.returncode == 1
    assert "bytes to write" in done.stderr
    assert left_in(small_disk) == ["in the way"]
    code = (
        "import shutil, sys; shutil.disk_usage = lambda p: type('U', (), {'free': 1 << 40});"
        "from reshard.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )  # another process fills the disk after it was looked at
    command = [sys.executable, "-c", code, "merge", source, small_disk / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert not (small_disk / "out").exists()
    other.unlink()
    done = child("merge", source, small_disk / "out")
    assert done.returncode == 0, done.stderr
    assert equals(small_disk / "out", MODEL)
    assert left_in(small_disk) == ["out", "out/model.safetensors", "out/reshard.json"]


def test_errors_of_the_system_are_explained(tmp_path: Path) -> None:
    for number, kind in [(errno.EROFS, OutputError), (errno.EDQUOT, OutputError), (errno.EIO, Corrupt)]:
        explained = staging.explained(OSError(number, os.strerror(number), "some/file"), tmp_path / "out")
        assert type(explained) is kind
