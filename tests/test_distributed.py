"""Several ranks write what one process writes, bit for bit; when one of them fails all do, and nothing is left half."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reshard
from checkpoints import equals, left_in, model, write_dcp
from reshard.cli.main import main
from reshard.errors import ReshardError
from reshard.storage.launch import Launch, Spread, detect
from reshard.storage.plan import Plan
from reshard.storage.share import cut
from reshard.storage.staging import check_space, staging_of

KILLS = 18
MODEL = model(num_layers=6, width=64)

SERVER = """
import json, os, sys
from reshard.cli.main import console
from reshard.ops import average, inspect, merge, verify
from reshard.formats import dcp, huggingface, safetensors, torch_save
from reshard.storage import cluster

def rank(order, where):
    pid = os.fork()
    if pid:
        return pid
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{where}/{order['name']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.environ.update(order["env"])
    sys.argv = ["reshard", *order["argv"]]
    exec(order["before"], {})
    console()

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])), flush=True)
    else:
        print(rank(order, sys.argv[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int
    out: str
    err: str


class Ranks:
    """A process that forks ranks off, which is faster than starting them."""

    def __init__(self, where: Path) -> None:
        self._where, self._number = where, 0
        command = [sys.executable, "-c", SERVER, str(where)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._names: dict[int, str] = {}

    def _ask(self, order: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self, rank: int, world_size: int, *argv: str | Path, before: str = "", env: Mapping[str, str] | None = None
    ) -> int:
        """The process id of one rank; `before` is run in it before the command."""
        self._number += 1
        numbers = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "RESHARD_JOIN_TIMEOUT_S": "120"}
        order = {
            "name": str(self._number), "env": {**numbers, **(env or {})}, "argv": [str(a) for a in argv],
            "before": before,
        }  # fmt: skip
        pid = self._ask(order)
        self._names[pid] = str(self._number)
        return pid

    def ended(self, pid: int) -> Ended:
        """Wait for a rank."""
        code, name = self._ask({"wait": pid}), self._names[pid]
        return Ended(code, *((self._where / f"{name}.{end}").read_text() for end in ("out", "err")))

    def __call__(
        self,
        world_size: int,
        *argv: str | Path,
        before: Mapping[int, str] | None = None,
        more: Mapping[int, Sequence[str]] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> list[Ended]:
        """All ranks, from beginning to end; what is run before on some, and more arguments for some."""
        pids = [
            self.start(
                rank, world_size, *argv, *(more or {}).get(rank, ()), before=(before or {}).get(rank, ""), env=env
            )
            for rank in range(world_size)
        ]
        return [self.ended(pid) for pid in pids]

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dcp(tmp_path_factory.mktemp("distributed") / "shards", MODEL, ranks=3)


def content(path: Path) -> dict[str, bytes]:
    """Every file of an output, by its name after the output's own."""
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return {str(p).removeprefix(str(path)): p.read_bytes() for p in files if p.is_file()}


def codes(ended: Sequence[Ended]) -> list[int]:
    return [e.code for e in ended]


# ------------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("world_size", [2, 4, 5])
@pytest.mark.parametrize(
    "options",
    [(), ("--distributed-save",), ("--save-every-n-ranks", "2"), ("--distributed-save", "--save-every-n-ranks", "3")],
    ids=" ".join,
)
def test_ranks_write_what_one_process_writes(
    ranks: Ranks, source: Path, tmp_path: Path, world_size: int, options: tuple[str, ...]
) -> None:
    assert main(["merge", str(source), str(tmp_path / "one"), "--max-shard-size", "100KB", "--quiet"]) == 0
    ended = ranks(world_size, "merge", source, tmp_path / "out", "--max-shard-size", "100KB", *options)
    assert codes(ended) == [0] * world_size, ended
    assert content(tmp_path / "out") == content(tmp_path / "one")
    assert left_in(tmp_path)[0] == "one"
    assert reshard.verify(tmp_path / "out", source).ok


@pytest.mark.parametrize("name", ["out.safetensors", "out.ckpt", "out.pt"])
@pytest.mark.parametrize("options", [(), ("--distributed-save",)], ids=["shared", "distributed"])
def test_ranks_write_single_files(
    ranks: Ranks, source: Path, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    (tmp_path / "one").mkdir()
    assert main(["merge", str(source), str(tmp_path / "one" / name), "--quiet"]) == 0
    (tmp_path / "four").mkdir()
    ended = ranks(4, "merge", source, tmp_path / "four" / name, *options)
    assert codes(ended) == [0] * 4, ended
    assert content(tmp_path / "four" / name) == content(tmp_path / "one" / name)
    assert left_in(tmp_path / "four") == left_in(tmp_path / "one")


def test_only_the_first_rank_speaks(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    ended = ranks(4, "merge", source, tmp_path / "out")
    assert f"{tmp_path / 'out'}: {len(MODEL)} tensors" in ended[0].out
    assert "checksums of the shards confirmed" in ended[0].out
    assert [(e.out, e.err) for e in ended[1:]] == [("", "")] * 3
    reshard.merge(source, tmp_path / "one")
    alone = ranks(1, "merge", source, tmp_path / "again")[0]
    assert alone.out.splitlines()[2] == ended[0].out.splitlines()[2]


def test_an_average_of_four_ranks_warns_of_what_any_of_them_saw(ranks: Ranks, tmp_path: Path) -> None:
    for number in range(2):
        tensors = model(num_layers=6, width=64, seed=number)
        tensors["layers.0.up.weight"][0, 0] = float("nan")
        tensors["layers.5.norm.weight"][3] = float("inf") if number else 0
        write_dcp(tmp_path / f"checkpoint-{number}", tensors)
    sources = [tmp_path / f"checkpoint-{number}" for number in range(2)]
    ended = ranks(4, "average", *sources, "--output", tmp_path / "out", "--json")
    assert codes(ended) == [0] * 4, ended
    alone = ranks(1, "average", *sources, "--output", tmp_path / "one", "--json")[0]
    assert content(tmp_path / "out") == content(tmp_path / "one")
    assert sorted(json.loads(ended[0].out)["notices"]) == sorted(json.loads(alone.out)["notices"])
    assert ended[0].err.count("warning: ") == 3


def test_an_old_output_is_replaced(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    write_dcp(tmp_path / "other", model(1))
    reshard.merge(tmp_path / "other", tmp_path / "out")
    before = content(tmp_path / "out")
    refused = ranks(3, "merge", source, tmp_path / "out")
    assert codes(refused) == [1] * 3
    assert all("exists" in e.err for e in refused)
    assert content(tmp_path / "out") == before
    assert left_in(tmp_path)[0] == "other"
    assert codes(ranks(3, "merge", source, tmp_path / "out", "--force")) == [0] * 3
    assert equals(tmp_path / "out", MODEL)


def test_shards_are_removed_once(ranks: Ranks, tmp_path: Path) -> None:
    write_dcp(tmp_path / "shards", MODEL)
    ended = ranks(4, "merge", tmp_path / "shards", tmp_path / "out", "--remove-shards")
    assert codes(ended) == [0] * 4, ended
    assert left_in(tmp_path) == ["out", "out/model.safetensors", "out/reshard.json"]
    assert equals(tmp_path / "out", MODEL)


def test_ranks_may_start_late(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    pids = []
    for rank in (2, 0, 1):
        pids.append(ranks.start(rank, 3, "merge", source, tmp_path / "out"))
        time.sleep(0.5)
    assert [ranks.ended(pid).code for pid in pids] == [0] * 3
    assert equals(tmp_path / "out", MODEL)
    assert left_in(tmp_path)[0] == "out"


def test_a_rank_may_look_for_space_while_others_come_and_go(tmp_path: Path) -> None:
    staging = staging_of(tmp_path / "out")
    churn = (
        "import itertools, pathlib, shutil, sys\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "for i in itertools.count():\n"
        "    (path / f'{i % 7}/deep').mkdir(parents=True, exist_ok=True)\n"
        "    for k in range(9):\n"
        "        (path / f'{i % 7}/{k}').write_bytes(b'x')\n"
        "    shutil.rmtree(path / f'{(i + 3) % 7}', ignore_errors=True)\n"
    )
    others = subprocess.Popen([sys.executable, "-c", churn, str(staging)])
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            check_space(tmp_path / "out", Plan(()))
    finally:
        others.kill()
        others.wait()


def test_more_ranks_than_tensors(ranks: Ranks, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(5, 5), "b.weight": torch.randn(3)}
    write_dcp(tmp_path / "shards", tensors)
    for options in [(), ("--distributed-save",)]:
        ended = ranks(6, "merge", tmp_path / "shards", tmp_path / f"out{len(options)}", *options)
        assert codes(ended) == [0] * 6, ended
        assert equals(tmp_path / f"out{len(options)}", tensors)


def shared_storage(path: Path) -> dict[str, torch.Tensor]:
    """A file of torch whose tensors are views of one record, which no rank reads alone."""
    whole = torch.randn(8, 4096)
    tensors = {f"part.{i}": whole[i] for i in range(8)}
    torch.save(tensors, path)
    return tensors


def test_a_record_that_several_ranks_read_is_checked_once(ranks: Ranks, tmp_path: Path) -> None:
    tensors = shared_storage(tmp_path / "model.pt")
    ended = ranks(4, "merge", tmp_path / "model.pt", tmp_path / "out.safetensors", "--json", "--keep-names")
    assert codes(ended) == [0] * 4, ended
    assert json.loads(ended[0].out)["num_checked"] == 1
    assert equals(tmp_path / "out.safetensors", tensors)


def test_damage_in_a_record_that_several_ranks_read_is_found(ranks: Ranks, tmp_path: Path) -> None:
    shared_storage(tmp_path / "model.pt")
    data = bytearray((tmp_path / "model.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "model.pt").write_bytes(data)
    ended = ranks(4, "merge", tmp_path / "model.pt", tmp_path / "out.safetensors", "--keep-names")
    assert codes(ended) == [1] * 4
    assert all("CRC-32" in e.err for e in ended)
    assert left_in(tmp_path) == ["model.pt"]


@pytest.mark.slow
def test_under_torchrun(source: Path, tmp_path: Path) -> None:
    assert main(["merge", str(source), str(tmp_path / "one"), "--max-shard-size", "100KB", "--quiet"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "reshard"]
    command = [*launcher, "merge", str(source), str(tmp_path / "out"), "--max-shard-size", "100KB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensors") == 1
    assert content(tmp_path / "out") == content(tmp_path / "one")
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert "error: " in again.stderr
    assert "exists" in again.stderr
    assert [name for name in left_in(tmp_path) if "/" not in name] == ["one", "out"]


@pytest.mark.slow
def test_damage_under_torchrun_leaves_nothing(tmp_path: Path) -> None:
    write_dcp(tmp_path / "shards", MODEL)
    path = tmp_path / "shards/__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    before = left_in(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "reshard"]
    command = [*launcher, "merge", str(tmp_path / "shards"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CRC-32" in done.stderr
    assert left_in(tmp_path) == before


# ----------------------------------------------------------------------------------------------------- what fails


def slow(seconds: float) -> str:
    """Makes every write take this long."""
    return f"import os, time; real = os.pwrite; os.pwrite = lambda *a: (time.sleep({seconds}), real(*a))[1]"


def after(number: int, what: str) -> str:
    """Makes the write of this number do something else."""
    return f"""
import os, errno, signal
real, count = os.pwrite, 0
def pwrite(*args):
    global count
    count += 1
    if count == {number}:
        {what}
    return real(*args)
os.pwrite = pwrite
"""


SMALL = ("--memory", "40KB", "--threads", "1")
"""Blocks so small that a merge takes a while."""


@pytest.mark.slow
def test_any_rank_killed_at_any_moment(ranks: Ranks, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.randn(512, 512) for i in range(12)}
    source = write_dcp(tmp_path / "shards", tensors)
    options = ("--max-shard-size", "3MB", *SMALL)
    assert codes(ranks(4, "merge", source, tmp_path / "one", *options)) == [0] * 4
    whole, destination, chance = content(tmp_path / "one"), tmp_path / "out", random.Random(7)
    begun = kept = 0
    for number in range(KILLS):
        spread = ("--distributed-save",) if number % 3 == 0 else ()
        command = ("merge", source, destination, *options, *spread)
        env = {"RESHARD_JOIN_TIMEOUT_S": "3"}
        pids = [ranks.start(rank, 4, *command, env=env, before=slow(0.003)) for rank in range(4)]
        if number % 3:
            until_there(tmp_path / f".out.reshard/journal.{number % 4}")
        time.sleep(chance.uniform(0, 1.2))
        victim = number % 4
        os.kill(pids[victim], signal.SIGKILL)
        ended = [ranks.ended(pid) for pid in pids]
        if destination.exists():  # it came too late
            assert content(destination) == whole
        else:
            assert ended[victim].code == -signal.SIGKILL
            others = [e for e in ended if e is not ended[victim]]
            assert codes(others) == [1] * 3, ended
            assert all("rank" in e.err for e in others), ended
        begun += (tmp_path / ".out.reshard/journal").exists()
        world_size = (4, 1, 2, 5)[number // 4 % 4]
        again = ranks(world_size, "merge", source, destination, *options, "--json", env={} if number % 5 else HURRY)
        if not all(e.code == 0 for e in again):  # it was complete, and nothing says that it is ours
            assert destination.exists()
            assert all("exists" in e.err for e in again)
        else:
            kept += json.loads(again[0].out)["kept_nbytes"] > 0
        assert content(destination) == whole
        assert left_in(tmp_path)[0] == "one"
        for path in destination.iterdir():
            path.unlink()
        destination.rmdir()
    assert begun >= KILLS // 3
    assert kept >= KILLS // 4


def until_there(path: Path) -> None:
    """Wait until a run has come this far."""
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.005)


HURRY = {"RESHARD_JOIN_TIMEOUT_S": "30", "RESHARD_SILENCE_TIMEOUT_S": "20"}


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named(ranks: Ranks, source: Path, tmp_path: Path, victim: int) -> None:
    before = {
        rank: after(3, "os.kill(os.getpid(), signal.SIGKILL)") if rank == victim else slow(0.02) for rank in range(4)
    }
    began = time.monotonic()
    ended = ranks(4, "merge", source, tmp_path / "out", *SMALL, before=before)
    assert time.monotonic() - began < 15
    assert codes(ended) == [-signal.SIGKILL if rank == victim else 1 for rank in range(4)], ended
    for e in ended[:victim] + ended[victim + 1 :]:
        assert f"rank {victim} on {os.uname().nodename}: its process ended without a word" in e.err
    assert not (tmp_path / "out").exists()
    assert codes(ranks(4, "merge", source, tmp_path / "out")) == [0] * 4
    assert equals(tmp_path / "out", MODEL)
    assert left_in(tmp_path)[0] == "out"


@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize("what", ["raise ValueError('no good')", "raise MemoryError"], ids=["defect", "memory"])
def test_what_one_rank_raises_is_said_by_all(
    ranks: Ranks, source: Path, tmp_path: Path, victim: int, what: str
) -> None:
    ended = ranks(4, "merge", source, tmp_path / "out", *SMALL, before={victim: after(2, what)})
    assert [e.code for e in ended] == [2 if rank == victim else 1 for rank in range(4)], ended
    for rank, e in enumerate(ended):
        if rank != victim:
            assert f"rank {victim} on {os.uname().nodename}: {what.split()[1].split('(')[0]}" in e.err
            assert e.err.startswith("error: " if rank == 0 else f"rank {rank}: error: ") or rank == 0
    assert not (tmp_path / "out").exists()
    assert codes(ranks(2, "merge", source, tmp_path / "out")) == [0] * 2
    assert equals(tmp_path / "out", MODEL)


@pytest.mark.parametrize("world_size", [1, 3])
def test_killed_right_after_the_commit(ranks: Ranks, source: Path, tmp_path: Path, world_size: int) -> None:
    died = "import os; real = os.rename; os.rename = lambda *a: (real(*a), os.kill(os.getpid(), 9))"
    ended = ranks(3, "merge", source, tmp_path / "out", before={0: died})
    assert codes(ended) == [-signal.SIGKILL, 1, 1]
    assert equals(tmp_path / "out", MODEL)
    again = ranks(world_size, "merge", source, tmp_path / "out", "--json")
    assert codes(again) == [0] * world_size, again
    assert json.loads(again[0].out)["kept_nbytes"] == json.loads(again[0].out)["nbytes"]
    assert [name for name in left_in(tmp_path) if "/" not in name] == ["out"]


def test_the_progress_of_all_is_shown_by_the_first(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    code = """
import os, reshard, sys
from reshard.storage.launch import together
seen = []
with together():
    reshard.merge(*sys.argv[1:], progress=lambda nbytes, name: seen.append(nbytes))
os.write(1, str(sum(seen)).encode())
os._exit(0)
"""
    ended = ranks(
        3, before=dict.fromkeys(range(3), f"import sys; sys.argv[1:] = {[str(source), str(tmp_path / 'out')]}\n{code}")
    )
    assert codes(ended) == [0] * 3, ended
    assert int(ended[0].out) == sum(t.nbytes for t in MODEL.values())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_of_one_rank(ranks: Ranks, source: Path, tmp_path: Path, victim: int) -> None:
    full = after(4, "raise OSError(errno.ENOSPC, 'No space left on device')")
    ended = ranks(3, "merge", source, tmp_path / "out", *SMALL, before={victim: full})
    assert codes(ended) == [1] * 3
    assert all("the disk is full" in e.err for e in ended), ended
    again = ranks(3, "merge", source, tmp_path / "out", "--json")
    assert json.loads(again[0].out)["kept_nbytes"] > 0
    assert equals(tmp_path / "out", MODEL)


def test_damage_is_said_by_all_in_the_same_words_and_leaves_nothing(ranks: Ranks, tmp_path: Path) -> None:
    write_dcp(tmp_path / "shards", MODEL, ranks=3)
    path = tmp_path / "shards/__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    before = left_in(tmp_path)
    ended = ranks(4, "merge", tmp_path / "shards", tmp_path / "out", "--quiet")
    assert codes(ended) == [1] * 4
    said = {e.err.split("error: ", 1)[1] for e in ended}
    assert len(said) == 1, said
    assert "__1_0.distcp" in said.pop()
    assert left_in(tmp_path) == before


@pytest.mark.parametrize(
    "differ, more, before",
    [
        ("options, plan", ("--dtype", "bfloat16"), ""),
        ("options", ("--distributed-save",), ""),
        ("version", (), "from reshard.storage import cluster; cluster.__version__ = '0'"),
    ],
)
def test_ranks_that_would_do_different_things_are_refused(
    ranks: Ranks, source: Path, tmp_path: Path, differ: str, more: tuple[str, ...], before: str
) -> None:
    ended = ranks(3, "merge", source, tmp_path / "out", "--quiet", more={2: more}, before={2: before})
    assert codes(ended) == [1] * 3
    assert all(f"rank 2 on {os.uname().nodename} is about to do something else" in e.err for e in ended)
    assert all(f"they differ in {differ}\n" in e.err for e in ended)
    assert left_in(tmp_path) == []


def test_ranks_of_different_numbers_are_refused(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    env = {"MASTER_PORT": "1234", **HURRY, "RESHARD_JOIN_TIMEOUT_S": "2"}
    pids = [ranks.start(0, 2, "merge", source, tmp_path / "out", env=env)]
    pids.append(ranks.start(1, 3, "merge", source, tmp_path / "out", env=env))
    ended = [ranks.ended(pid) for pid in pids]
    assert codes(ended) == [1, 1]
    assert not (tmp_path / "out").exists()


def test_a_refusal_keeps_what_an_earlier_run_did(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    killed = ranks(2, "merge", source, tmp_path / "out", *SMALL, before={1: after(15, "os._exit(9)")})
    assert codes(killed) == [1, 9]
    assert codes(ranks(2, "merge", source, tmp_path / "out", more={1: ["--dtype", "bfloat16"]})) == [1, 1]
    again = ranks(2, "merge", source, tmp_path / "out", "--json")
    assert json.loads(again[0].out)["kept_nbytes"] > 0


def test_a_rank_that_never_comes_is_named(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    env = {"RESHARD_JOIN_TIMEOUT_S": "1"}
    pids = [ranks.start(rank, 4, "merge", source, tmp_path / "out", env=env) for rank in (0, 1, 3)]
    ended = [ranks.ended(pid) for pid in pids]
    assert codes(ended) == [1] * 3
    assert "waited 1 s for rank 2" in ended[0].err
    assert left_in(tmp_path) == []


def test_without_the_first_rank_the_others_give_up(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    env = {"RESHARD_JOIN_TIMEOUT_S": "1"}
    pids = [ranks.start(rank, 3, "merge", source, tmp_path / "out", env=env) for rank in (1, 2)]
    ended = [ranks.ended(pid) for pid in pids]
    assert codes(ended) == [1] * 2
    assert all("for rank 0" in e.err for e in ended)
    assert left_in(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_on_another_machine_is_missed(ranks: Ranks, source: Path, tmp_path: Path, victim: int) -> None:
    apart = "import os; from reshard.storage import board; board.Directory.machine = lambda self: str(os.getpid())\n"
    before = {rank: apart + slow(0.02) for rank in range(3)}
    before[victim] = apart + after(3, "os.kill(os.getpid(), signal.SIGKILL)")
    env = {"RESHARD_SILENCE_TIMEOUT_S": "2"}
    ended = ranks(3, "merge", source, tmp_path / "out", *SMALL, before=before, env=env)
    assert codes(ended) == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)], ended
    others = [e for e in ended if e is not ended[victim]]
    assert all(f"rank {victim} on {os.uname().nodename}: not a word for 2 s" in e.err for e in others)
    assert not (tmp_path / "out").exists()
    assert codes(ranks(3, "merge", source, tmp_path / "out", before={1: apart})) == [0] * 3
    assert equals(tmp_path / "out", MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_falls_silent_counts_as_dead(ranks: Ranks, source: Path, tmp_path: Path, victim: int) -> None:
    env = {"RESHARD_SILENCE_TIMEOUT_S": "2"}
    pids = [ranks.start(r, 3, "merge", source, tmp_path / "out", *SMALL, before=slow(0.02), env=env) for r in range(3)]
    until_there(tmp_path / f".out.reshard/journal.{victim}")
    os.kill(pids[victim], signal.SIGSTOP)
    others = [ranks.ended(pid) for pid in pids if pid != pids[victim]]
    assert codes(others) == [1, 1]
    assert all(f"rank {victim} on {os.uname().nodename}: not a word for" in e.err for e in others)
    os.kill(pids[victim], signal.SIGCONT)
    assert ranks.ended(pids[victim]).code != 0
    assert not (tmp_path / "out").exists()
    assert codes(ranks(2, "merge", source, tmp_path / "out")) == [0] * 2
    assert equals(tmp_path / "out", MODEL)


def test_what_a_killed_launch_left_does_not_mislead_the_next(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    for started in [(0, 1), (1, 2), (0, 1, 2)]:
        pids = [ranks.start(rank, 4, "merge", source, tmp_path / "out") for rank in started]
        time.sleep(0.6)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert {ranks.ended(pid).code for pid in pids} == {-signal.SIGKILL}
    assert list((tmp_path / ".out.reshard").glob("ranks-*/rank.*"))
    assert codes(ranks(4, "merge", source, tmp_path / "out", env=HURRY)) == [0] * 4
    assert equals(tmp_path / "out", MODEL)
    assert left_in(tmp_path)[0] == "out"


@pytest.mark.parametrize("identity", ["", "1234"], ids=["of the same ranks", "of another launch"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_second_run_to_one_destination_is_refused(
    ranks: Ranks, source: Path, tmp_path: Path, world_size: int, identity: str
) -> None:
    before = dict.fromkeys(range(3), slow(0.15))
    first = [ranks.start(rank, 3, "merge", source, tmp_path / "out", *SMALL, before=before[rank]) for rank in range(3)]
    until_there(tmp_path / ".out.reshard/journal.2")
    second = ranks(world_size, "merge", source, tmp_path / "out", env={"MASTER_PORT": identity, **HURRY})
    assert codes(second) == [1] * world_size
    assert all("is being written by another" in e.err for e in second), second
    assert [ranks.ended(pid).code for pid in first] == [0] * 3
    assert equals(tmp_path / "out", MODEL)
    assert left_in(tmp_path)[0] == "out"


# ---------------------------------------------------------------------------------------------- who is launched how


@pytest.mark.parametrize("verb", [("merge", "--dry-run"), ("inspect",), ("verify",)], ids=" ".join)
def test_what_writes_nothing_is_done_by_the_first_rank_alone(
    ranks: Ranks, source: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    reshard.merge(source, tmp_path / "one")
    name, *more = verb
    path = tmp_path / "one" if name == "verify" else source
    ended = ranks(3, name, path, *([tmp_path / "out"] if name == "merge" else []), *more)
    assert codes(ended) == [0] * 3
    assert ended[0].out
    assert [(e.out, e.err) for e in ended[1:]] == [("", "")] * 2


def test_a_library_call_of_one_rank_runs_alone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    reshard.merge(source, tmp_path / "out")
    assert equals(tmp_path / "out", MODEL)


TOGETHER = """
import reshard, sys, os
from reshard.storage.launch import together
with together():
    for name in ("a", "b"):
        merged = reshard.merge(sys.argv[-2], sys.argv[-1] + name)
        assert merged.num_tensors
os._exit(0)
"""


def test_library_calls_of_all_ranks_run_together(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    ended = ranks(3, source, tmp_path / "out", before=dict.fromkeys(range(3), TOGETHER))
    assert codes(ended) == [0] * 3, ended
    assert equals(tmp_path / "outa", MODEL)
    assert equals(tmp_path / "outb", MODEL)
    assert len([name for name in left_in(tmp_path) if "/" not in name]) == 2


@pytest.mark.parametrize(
    "environ, wanted",
    [
        ({}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "0"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, (2, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "9", "SLURM_STEP_ID": "1"}, (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "9", "SLURM_STEP_ID": "1"}, (1, 9)),
    ],
    ids=str,
)
def test_launches_are_read_from_the_environment(environ: dict[str, str], wanted: tuple[int, int]) -> None:
    launch = detect(environ)
    assert (launch.rank, launch.world_size) == wanted


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "-1", "WORLD_SIZE": "4"},
        {"RANK": "one", "WORLD_SIZE": "4"},
        {"RANK": "1", "WORLD_SIZE": "0"},
        {"RANK": "1", "WORLD_SIZE": "99999999"},
        {"RANK": "1"},
        {"WORLD_SIZE": "4"},
        {"OMPI_COMM_WORLD_RANK": "1"},
        {"SLURM_PROCID": "x", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "RESHARD_JOIN_TIMEOUT_S": "soon"},
        {"RANK": "0", "WORLD_SIZE": "2", "RESHARD_SILENCE_TIMEOUT_S": "0"},
    ],
    ids=str,
)
def test_environments_that_contradict_themselves_are_errors(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ReshardError, match=r"^(RANK|WORLD_SIZE|OMPI|SLURM|RESHARD)"):
        detect(environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["inspect", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_store_of_torchrun_is_used_where_that_launched_us() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    assert detect(environ).store is None
    assert detect({**environ, "TORCHELASTIC_RUN_ID": "x"}).store == ("here", 29500)
    assert detect({**environ, "TORCHELASTIC_RUN_ID": "x"}).owns_store
    assert not detect({**environ, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}).owns_store


def test_save_every_n_ranks_begins_at_one(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(source), str(tmp_path / "out"), "--save-every-n-ranks", "0"]) == 1
    assert "--save-every-n-ranks 0" in capsys.readouterr().err
    assert left_in(tmp_path) == []
    assert list(Spread(save_every_n_ranks=3).writers(7)) == [0, 3, 6]
    assert Launch().is_first


@given(st.lists(st.integers(0, 50), max_size=9), st.integers(1, 5))
def test_parts_are_as_even_as_neighbours_can_be(weights: list[int], count: int) -> None:
    bounds = cut(weights, count)
    assert len(bounds) == count + 1
    assert (bounds[0], bounds[-1]) == (0, len(weights))
    assert bounds == sorted(bounds)
    assert heaviest(weights, bounds) == lightest(weights, count)


def heaviest(weights: Sequence[int], bounds: Sequence[int]) -> int:
    return max(sum(weights[a:b]) for a, b in pairwise(bounds))


def lightest(weights: Sequence[int], count: int) -> int:
    """The least that the heaviest of `count` runs can weigh, by trying all."""
    if count == 1:
        return sum(weights)
    return min(max(sum(weights[:i]), lightest(weights[i:], count - 1)) for i in range(len(weights) + 1))
