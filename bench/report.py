"""The table: facts in, Markdown out."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

from bench.cases import MIB, Case
from bench.measure import REPOSITORY, Rounds, ratio

HEAD = """# Benchmarks

Written by `python -m bench`; run it where your checkpoints lie. Every contestant is a whole process, and its output is
flushed to the disk within the time that is shown. They take turns, in an order that shifts from round to round.
Times are medians over rounds; "x" is the median of the ratios within a round to the first line, or to the `cp` above.
Peak memory is the resident set of the largest process, at its largest. Inputs are in the page cache, but for files that
are mostly holes, and for cases called cold: there they were put out of it before each run (`posix_fadvise`, and
`mincore` says they are gone), while programs and libraries were not.

* `cp`: `cp -r --reflink=never` of the shards, which neither checks nor merges them.
* `floor`: every byte read, summed with CRC-32 and xxh3-128 and written by two threads, and nothing else.
* `dcp_to_torch_save`: `torch.distributed.checkpoint.format_utils`. `accelerate merge-weights`: what it calls.
* `plain torch`: a conversion as a script does it: safetensors, `torch.cat`, `torch.stack`, torch's DCP. `mbridge`: its
  own code, into and out of a model of Megatron-Core on the CPU, where it is installed.
"""


def write(path: Path, measured: Sequence[tuple[Case, Rounds]], work: Path, repeat: int) -> None:
    """Write the report over a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(measured, [*machine(work), f"{date.today()}, {repeat} rounds"]), encoding="utf-8")


def render(measured: Sequence[tuple[Case, Rounds]], facts: Iterable[str]) -> str:
    parts = [HEAD, *(f"* {fact}" for fact in facts), "", "## Targets", "", *_targets(measured)]
    for case, rounds in measured:
        parts += ["", f"## {case.title}", "", *_contestants(rounds)]
    return "\n".join(parts) + "\n"


def _targets(measured: Sequence[tuple[Case, Rounds]]) -> list[str]:
    rows = []
    for case, rounds in measured:
        for target in case.targets:
            bound = f"{'at least' if target.at_least else 'at most'} {target.limit:g} {target.unit}"
            value = f"{target.figure(rounds):.3g} {target.unit}"
            rows.append((case.title, target.text, value, bound, "met" if target.met(rounds) else "**missed**"))
    return _table(("case", "figure", "measured", "target", ""), rows)


def _contestants(rounds: Rounds) -> list[str]:
    base, rows = next(iter(rounds)), []
    for name, runs in rounds.items():
        walls = [run.wall_s for run in runs]
        base = name if name.startswith("cp ") else base
        rows.append(
            (
                name,
                f"{median(walls):.2f}",
                f"{min(walls):.2f} - {max(walls):.2f}",
                f"{ratio(rounds, name, base):.2f} x",
                f"{median(run.cpu_s for run in runs):.2f}",
                f"{max(run.peak_nbytes for run in runs) / MIB:,.0f}",
            )
        )
    others = median(run.busy_cores for runs in rounds.values() for run in runs)
    note = f"Cores used by anything else meanwhile, the kernel's own writing included: {others:.1f}."
    return [*_table(("", "wall s", "range", "", "CPU s", "peak MiB"), rows), "", note]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def machine(work: Path) -> list[str]:
    """What the figures depend on; names nobody and no path."""
    memory_gb = psutil.virtual_memory().total / 1e9
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "numpy", "xxhash"))
    return [
        f"{len(os.sched_getaffinity(0))} cores ({_processor()}), {memory_gb:.0f} GB of memory",
        f"Linux {platform.release().split('-')[0]}, {_file_system(work)}",
        f"reshard {version('reshard')} at {_commit()}, Python {platform.python_version()}, {packages}",
    ]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _file_system(work: Path) -> str:
    mounts = [m for m in psutil.disk_partitions(all=True) if work.resolve().is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype


def _commit() -> str:
    command = ("git", "rev-parse", "--short", "HEAD")
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
