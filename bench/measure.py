"""One timed process, and rounds of them.

A run is a whole process, from exec to exit, and then the flush of all it wrote: nobody wins by leaving bytes in
memory. Contestants take turns, a different one first in each round, so that what the machine does besides, and what
one leaves behind for the next, hits all of them; ratios are taken within a round.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).resolve().parent.parent
QUIET_CORES = 0.2
QUIET_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """What one process took."""

    wall_s: float
    """Including the flush."""
    cpu_s: float
    """User and system, of the process, its children and the flush."""
    peak_nbytes: int
    """Resident, of the largest process in the tree."""
    busy_cores: float
    """What others, and the kernel on our behalf, used meanwhile."""
    output_nbytes: int


@dataclass(frozen=True, slots=True)
class Trial:
    """A program to be run, again and again."""

    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    """What is in memory, or out of it, when it starts."""
    expected_nbytes: int
    """What it writes, at least: nobody wins by leaving something out."""


Rounds = Mapping[str, Sequence[Run]]
"""Contestant to its runs, one for each round."""


def ratio(rounds: Rounds, name: str, base: str) -> float:
    """The median over rounds of one contestant's wall time in units of another's."""
    return median(a.wall_s / b.wall_s for a, b in zip(rounds[name], rounds[base], strict=True))


def take_turns(trials: Mapping[str, Trial], output: Path, repeat: int, *, cold: bool) -> Rounds:
    """Run each program `repeat` times, on inputs that are in memory or not; the output is removed after each.

    Raises CalledProcessError, or RuntimeError when a program says that it is done and is not.
    """
    names: list[str] = list(trials)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for turn in range(repeat):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            (evict if cold else warm)(trials[name].inputs)
            settle()
            run = timed(trials[name].command, output)
            clear(output)
            if run.output_nbytes < trials[name].expected_nbytes:
                raise RuntimeError(f"{name} wrote {run.output_nbytes} bytes, less than {trials[name].expected_nbytes}")
            runs[name].append(run)
    return runs


def timed(command: Sequence[str], output: Path) -> Run:
    """Run one command to its end, flush what it wrote, and say what that took. Raises when the command fails."""
    busy, own, began = _busy_s(), _own_cpu_s(), time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=complaint.decode(errors="replace"))
    flush(output)
    wall_s = time.perf_counter() - began
    cpu_s = usage.ru_utime + usage.ru_stime + _own_cpu_s() - own
    peak_nbytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    busy_cores = max(0.0, (_busy_s() - busy - cpu_s) / wall_s)
    return Run(wall_s, cpu_s, peak_nbytes, busy_cores, sum(file.stat().st_size for file in files(output)))


def files(*paths: Path) -> Iterator[Path]:
    for path in paths:
        yield from (p for p in [path, *path.rglob("*")] if p.is_file())


def flush(path: Path) -> None:
    """Return when all files below are on the disk."""
    for file in files(path):
        with _opened(file) as fd:
            os.fsync(fd)


def clear(path: Path) -> None:
    """Remove an output, and wait until the file system has done so."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    subprocess.run(["sync", "-f", path.parent], check=True)


def warm(paths: Sequence[Path]) -> None:
    """Bring files into the page cache by reading them, but for those that are holes for the most part."""
    for file in (f for f in files(*paths) if f.stat().st_blocks * 1024 > f.stat().st_size):
        with open(file, "rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass


def evict(paths: Sequence[Path]) -> None:
    """Put files out of the page cache, and see that they are; programs and libraries stay in it.

    Raises RuntimeError when pages stay, as on file systems that live in memory.
    """
    for file in files(*paths):
        with _opened(file) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    left, total = (sum(counts) for counts in zip(*(_resident(file) for file in files(*paths)), strict=True))
    if left > total // 1000:
        raise RuntimeError(f"{left} of {total} pages of the inputs stay in memory: no cold run is possible here")


def _resident(path: Path) -> tuple[int, int]:
    """Pages of a file in memory, and all of them, by mincore."""
    nbytes = path.stat().st_size
    if not nbytes:
        return 0, 0
    num_pages = -(-nbytes // mmap.PAGESIZE)
    in_memory = (ctypes.c_ubyte * num_pages)()
    with open(path, "r+b") as stream, mmap.mmap(stream.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        start = ctypes.c_ubyte.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(nbytes), in_memory)
        del start
    if failed:
        raise OSError(f"mincore of {path.name} failed")
    return sum(bytes(in_memory)), num_pages


def settle() -> None:
    """Wait until others leave the machine alone, but not for ever."""
    give_up = time.monotonic() + QUIET_WAIT_S
    while time.monotonic() < give_up:
        busy = _busy_s()
        time.sleep(0.5)
        if (_busy_s() - busy) / 0.5 < QUIET_CORES:
            return


def _busy_s() -> float:
    """CPU seconds that anybody used since the machine started; 0 where the kernel does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, stat.read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
