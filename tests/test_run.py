"""The engine: resuming from journals whole and broken, progress, and the same bytes whatever the threads and blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from checkpoints import equals, left_in, model, write_dcp
from reshard.errors import OutputError
from reshard.storage import run
from reshard.storage.plan import FilePlan, Plan, Seal, Segment

MODEL = model(num_layers=3, width=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dcp(tmp_path_factory.mktemp("run") / "source", MODEL, ranks=3, dim=1)


class Stop(Exception):
    """Ends a merge in the middle."""


def stop_after(nbytes: int) -> Callable[[int, str], None]:
    done = 0

    def progress(more: int, fqn: str) -> None:
        nonlocal done
        done += more
        if done > nbytes:
            raise Stop

    return progress


@pytest.fixture
def interrupted(source: Path, tmp_path: Path) -> Path:
    """The staging directory of a merge into `out` that was ended half-way."""
    with pytest.raises(Stop):
        reshard.merge(source, tmp_path / "out", threads=1, progress=stop_after(40_000))
    staging = tmp_path / ".out.reshard"
    assert (staging / "journal").read_bytes().count(b"\n") > 3
    assert not (tmp_path / "out").exists()
    return staging


def finished(source: Path, staging: Path, **options: Any) -> int:
    """Run again to the end; the bytes that were kept."""
    merged = reshard.merge(source, staging.parent / "out", **options)
    assert left_in(staging.parent)[0] == "out"
    assert reshard.verify(staging.parent / "out", source).ok
    return merged.kept_nbytes


def test_what_is_done_is_kept(source: Path, interrupted: Path) -> None:
    assert 0 < finished(source, interrupted) <= 40_000
    assert equals(interrupted.parent / "out", MODEL)


def test_damaged_staging_is_written_again(source: Path, interrupted: Path) -> None:
    path = interrupted / "files/model.safetensors"
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(b ^ 1 for b in data))
    assert finished(source, interrupted) == 0
    assert equals(interrupted.parent / "out", MODEL)


def test_one_damaged_segment_is_written_again(source: Path, interrupted: Path) -> None:
    path = interrupted / "files/model.safetensors"
    data = bytearray(path.read_bytes())
    data[10_000] ^= 1
    path.write_bytes(data)
    assert 0 < finished(source, interrupted) < 40_000
    assert equals(interrupted.parent / "out", MODEL)


@pytest.mark.parametrize("change", ["missing", "short", "long", "empty"])
def test_staged_files_that_are_not_as_they_were(source: Path, interrupted: Path, change: str) -> None:
    path = interrupted / "files/model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if change != "missing":
        path.write_bytes({"short": data[:5000], "long": data + b"x" * 999, "empty": b""}[change])
    finished(source, interrupted)
    assert equals(interrupted.parent / "out", MODEL)


JOURNALS: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda text: text[:-20],
    "torn in the first line": lambda text: text[:10],
    "empty": lambda text: b"",
    "zeros at the end": lambda text: text + bytes(4096),
    "zeros in the middle": lambda text: text[:50] + bytes(64) + text[114:],
    "zeros and a line": lambda text: text + bytes(100) + b"\n",
    "not text": lambda text: text + b"\xff\xfe\x00 \x80\n",
    "nonsense": lambda text: text + b"one two three\n\n    \n1\n9 9 9 9\n-1 zz zz model.safetensors\n",
    "a digest cut": lambda text: text.replace(b" ", b"", 1),
    "another plan": lambda text: b"0" * 32 + text[32:],
    "wrong digests": lambda text: text[:33] + text[33:].replace(b"a", b"b"),
    "a commit of another inode": lambda text: text + b"commit 12345\n",
    "a commit that is none": lambda text: text + b"commit \ncommit x\n",
    "lines of other files": lambda text: text + b"1 " + b"0" * 32 + b" 00000000 ../../etc/passwd\n",
    "twice": lambda text: text + text[33:],
}


@pytest.mark.parametrize("change", JOURNALS)
def test_a_journal_is_never_trusted_nor_stumbled_over(source: Path, interrupted: Path, change: str) -> None:
    journal = interrupted / "journal"
    journal.write_bytes(JOURNALS[change](journal.read_bytes()))
    finished(source, interrupted)
    assert equals(interrupted.parent / "out", MODEL)


@pytest.mark.parametrize("name", ["journal", "files", "lock"])
def test_parts_of_staging_may_be_missing(source: Path, interrupted: Path, name: str) -> None:
    if name == "files":
        (interrupted / "files").rename(interrupted / "other")
    else:
        (interrupted / name).unlink()
    finished(source, interrupted)
    assert equals(interrupted.parent / "out", MODEL)


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"exclude": ("steps",)}, {"max_shard_size": "8KB"}], ids=["cast", "less", "cut"]
)
def test_another_plan_begins_anew(source: Path, interrupted: Path, options: dict[str, Any]) -> None:
    assert finished(source, interrupted, **options) == 0
    names = left_in(interrupted.parent / "out")
    assert [n for n in names if n.endswith(".safetensors")]
    wanted = {k: v.bfloat16() if "dtype" in options and v.is_floating_point() else v for k, v in MODEL.items()}
    wanted.pop("steps") if "exclude" in options else None
    assert equals(interrupted.parent / "out", wanted)


def test_a_changed_source_begins_anew(tmp_path: Path) -> None:
    write_dcp(tmp_path / "source", model(2, 32))
    with pytest.raises(Stop):
        reshard.merge(tmp_path / "source", tmp_path / "out", threads=1, progress=stop_after(30_000))
    other = model(2, 32, seed=1)
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    write_dcp(tmp_path / "source", other)
    assert reshard.merge(tmp_path / "source", tmp_path / "out").kept_nbytes == 0
    assert equals(tmp_path / "out", other)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_progress_adds_up(source: Path, tmp_path: Path, threads: int) -> None:
    total, lock = 0, threading.Lock()
    names = set()

    def progress(nbytes: int, fqn: str) -> None:
        nonlocal total
        with lock:
            total += nbytes
            names.add(fqn)

    reshard.merge(source, tmp_path / "out", threads=threads, progress=progress, block_nbytes=4096)
    assert total == sum(t.nbytes for t in MODEL.values())
    assert names == set(MODEL)


def test_progress_counts_what_was_kept(source: Path, interrupted: Path) -> None:
    total = []
    merged = reshard.merge(source, interrupted.parent / "out", progress=lambda n, _: total.append(n))
    assert sum(total) == sum(t.nbytes for t in MODEL.values())
    assert merged.kept_nbytes > 0


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("block_nbytes", [4096, 5000, 1 << 16, 1 << 22])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_threads_and_blocks_change_no_byte(
    source: Path, tmp_path: Path, threads: int, block_nbytes: int, dtype: str | None
) -> None:
    reshard.merge(source, tmp_path / "one", threads=1, dtype=dtype)
    reshard.merge(source, tmp_path / "other", threads=threads, block_nbytes=block_nbytes, dtype=dtype)
    for name in left_in(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_an_error_of_one_thread_is_the_error_of_the_run() -> None:
    done = []

    def work(number: int) -> None:
        done.append(number)
        if number == 3:
            raise OutputError("three")

    with pytest.raises(OutputError, match="three"):
        run.in_threads(list(range(1000)), work, 3)
    assert len(done) < 1000


def test_a_plan_of_bytes_and_seals(tmp_path: Path) -> None:
    def length(digests: Any) -> bytes:
        return digests["a/b.txt", 0].xxh3_128.encode()

    plan = Plan((FilePlan("a/b.txt", (Segment(b"hello"), Segment(Seal(32, length)))), FilePlan("empty", ())))
    result = run.run(plan, tmp_path / "out")
    assert left_in(tmp_path / "out") == ["a", "a/b.txt", "empty"]
    import xxhash

    assert (tmp_path / "out/a/b.txt").read_text() == "hello" + xxhash.xxh3_128_hexdigest(b"hello")
    assert (tmp_path / "out/empty").read_bytes() == b""
    assert result.nbytes == 37


def test_two_files_of_one_path_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="two files"):
        Plan((FilePlan("a", ()), FilePlan("a", ())))


def test_no_descriptor_is_left_open(source: Path, tmp_path: Path) -> None:
    import gc
    import os

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        reshard.merge(source, tmp_path / str(number))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    tensors = {"none": torch.empty(0), "rows": torch.empty(0, 4), "one": torch.tensor(3.5), "w": torch.randn(2, 2)}
    write_dcp(tmp_path / "source", tensors, ranks=3)
    reshard.merge(tmp_path / "source", tmp_path / "out", keep_names=True)
    assert equals(tmp_path / "out", tensors)
    assert reshard.verify(tmp_path / "out", tmp_path / "source").ok
