"""Killed at any moment, the destination is absent, the old one, or complete; the same command again finishes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from checkpoints import child, equals, left_in, model, write_dcp

KILLS = 60


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """13 MB in 12 tensors: with small blocks, most of a second."""
    tensors = {f"layers.{i}.weight": torch.randn(512, 512) for i in range(12)}
    return write_dcp(tmp_path_factory.mktemp("kill") / "shards", tensors), tensors


def state_of(destination: Path) -> dict[str, bytes] | None:
    """Every file of a destination; None when there is none."""
    if destination.is_dir():
        return {str(p.relative_to(destination)): p.read_bytes() for p in destination.rglob("*") if p.is_file()}
    return {"": destination.read_bytes()} if destination.exists() else None


STEPS = """
import os, signal, sys
from reshard.cli.main import main
from reshard.ops import average, inspect, merge, verify
from reshard.formats import dcp, huggingface, safetensors, torch_save

def forked(argv, kill_at=None):
    "The status of a merge in a process that is killed at its kill_at-th step in the file system."
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    steps = 0
    def count(event, args):
        nonlocal steps
        writes = event == "open" and args and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        flushes = event == "open" and args and isinstance(args[2], int) and args[2] & os.O_DIRECTORY
        if writes or flushes or event in (
            "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "ctypes.dlsym", "shutil.rmtree",
            "fcntl.flock",
        ):
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
    if kill_at is not None:
        sys.addaudithook(count)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os._exit(main(argv))

for line in sys.stdin:
    kill_at, *argv = line.rstrip("\\n").split("\\t")
    print(forked(argv, None if kill_at == "-" else int(kill_at)), flush=True)
"""


class Forks:
    """A process that forks merges off and kills them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", STEPS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, kill_at: int | None, *argv: str | Path) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        words = ["-" if kill_at is None else str(kill_at), *map(str, argv)]
        self._process.stdin.write("\t".join(words) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_killed_at_random_moments(large: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str) -> None:
    source, tensors = large
    destination, staging = tmp_path / name, tmp_path / f".{name}.reshard"
    command = ["merge", source, destination, "--memory", "40KB", "--threads", "2", "--force", "--quiet"]
    write_dcp(tmp_path / "other", model())
    assert child("merge", tmp_path / "other", destination).returncode == 0
    old = state_of(destination)
    began = time.monotonic()
    assert child("merge", source, tmp_path / f"whole.{name}", *command[3:]).returncode == 0
    whole_s = time.monotonic() - began
    whole = state_of(tmp_path / f"whole.{name}")
    assert old is not None
    assert whole is not None
    chance, seen, forks = random.Random(name), Counter[str](), Forks()
    for number in range(KILLS // 2):
        process = subprocess.Popen([sys.executable, "-m", "reshard", *map(str, command)], stdout=subprocess.DEVNULL)
        if number % 2:
            while not (staging / "files").exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.5) * whole_s)
        else:
            time.sleep(chance.uniform(0.05, 1.1) * whole_s)
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        state = state_of(destination)
        without_manifest = {} if state is None else {k: v for k, v in state.items() if not k.endswith("reshard.json")}
        if state == old:
            seen["old, begun" if (staging / "files").is_dir() else "old"] += 1
            continue
        assert without_manifest == {k: v for k, v in whole.items() if not k.endswith("reshard.json")}
        seen["complete"] += 1
        assert forks(None, *command) == 0
        assert forks(None, "verify", destination, "--against", source) == 0
        assert not staging.exists()
        assert forks(None, "merge", tmp_path / "other", destination, "--force") == 0
        assert state_of(destination) == old
    forks.close()
    assert seen["old, begun"] >= 3, seen
    done = child(*command)
    assert done.returncode == 0, done.stderr
    assert equals(destination, tensors)
    assert not staging.exists()


@pytest.mark.parametrize("begin", ["with nothing there", "over an old output"])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_killed_before_each_step_in_the_file_system(tmp_path: Path, name: str, begin: str) -> None:
    write_dcp(tmp_path / "other", model(3))
    tensors = model(2)
    write_dcp(tmp_path / "shards", tensors)
    forks = Forks()
    where = tmp_path / "here"
    where.mkdir()
    destination = where / name
    over = begin == "over an old output"
    command = ["merge", tmp_path / "shards", destination, *(["--force"] if over else []), "--threads", "1"]
    if name == "out":
        command += ["--max-shard-size", "4KB"]
    seen = Counter[str]()
    for kill_at in range(1000):
        if over:
            assert forks(None, "merge", tmp_path / "other", destination, "--force", "--max-shard-size", "2KB") == 0
            (destination / "README.md").write_text("mine") if name == "out" else None
        old = state_of(destination)
        status = forks(kill_at, *command)
        state = state_of(destination)
        if state == old:
            seen["absent" if old is None else "old"] += 1
        else:
            seen["complete"] += 1
            assert equals(destination, tensors), kill_at
        again = forks(None, *command)
        if again:  # only what a clean-up is left to do when it has nothing to recognise the output by
            assert (over, state == old, (where / f".{name}.reshard/journal").exists()) == (False, False, False)
        else:
            assert left_in(where) == left_in_when_complete(destination), kill_at
        assert equals(destination, tensors), kill_at
        assert forks(None, "verify", destination) == 0, kill_at
        if status == 0:
            break
        assert status == -signal.SIGKILL
        forget(where)
    forks.close()
    assert seen["complete"] >= 3, seen
    assert seen["old" if over else "absent"] >= 10, seen


def left_in_when_complete(destination: Path) -> list[str]:
    """The names beside and below a destination that has no staging directory beside it."""
    here = destination.parent
    names = [n for n in left_in(here) if not n.startswith(f".{destination.name}")]
    return [n for n in names if n.startswith(destination.name) and "README" not in n]


def forget(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def until_journal_has(num_lines: int, journal: Path, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Wait until a merge has come this far."""
    while not journal.exists() or journal.read_bytes().count(b"\n") < num_lines:
        assert process.poll() is None
        time.sleep(0.002)


def test_what_stands_is_skipped(large: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    source, tensors = large
    destination, journal = tmp_path / "out", tmp_path / ".out.reshard/journal"
    command = [sys.executable, "-m", "reshard", "merge", str(source), str(destination), "--memory", "40KB", "--json"]
    process = subprocess.Popen([*command, "--threads", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until_journal_has(4, journal, process)
    process.kill()
    process.wait()
    assert not destination.exists()
    done = child("merge", source, destination)
    assert done.returncode == 0
    assert "from before the interruption" in done.stdout
    assert equals(destination, tensors)


def test_interrupted_by_ctrl_c_says_so_and_resumes(large: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    source, tensors = large
    destination, journal = tmp_path / "out", tmp_path / ".out.reshard/journal"
    command = [sys.executable, "-m", "reshard", "merge", str(source), str(destination), "--memory", "40KB"]
    process = subprocess.Popen([*command, "--threads", "2"], stderr=subprocess.PIPE, text=True)
    until_journal_has(3, journal, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "error: interrupted" in said
    assert not destination.exists()
    assert child(*command[3:]).returncode == 0
    assert equals(destination, tensors)


def test_a_second_process_on_one_destination_is_refused(
    large: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    source, tensors = large
    destination = tmp_path / "out"
    command = [sys.executable, "-m", "reshard", "merge", str(source), str(destination), "--memory", "40KB"]
    process = subprocess.Popen([*command, "--threads", "2"], stdout=subprocess.DEVNULL)
    until_journal_has(1, tmp_path / ".out.reshard/journal", process)
    os.kill(process.pid, signal.SIGSTOP)
    second = child(*command[3:])
    os.kill(process.pid, signal.SIGCONT)
    assert second.returncode == 1
    assert "being written by another process" in second.stderr
    assert process.wait() == 0
    assert equals(destination, tensors)
