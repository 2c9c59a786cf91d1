"""What is measured, and what has to come out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from bench.measure import Rounds, ratio

MIB = 1 << 20
NUM_MOE_CHUNKS = (54 * 128 * 3 + 54) * 8

RESHARD = (sys.executable, "-m", "reshard")
CP = ("cp", "-r", "--reflink=never")
OTHERS = (sys.executable, "-m", "bench.contestants")


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that the rounds give, and its bound."""

    text: str
    figure: Callable[[Rounds], float]
    limit: float
    unit: str
    at_least: bool = False

    def met(self, rounds: Rounds) -> bool:
        value = self.figure(rounds)
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True, slots=True)
class Case:
    """Contestants that do the same work, taking turns."""

    name: str
    title: str
    inputs: Mapping[str, tuple[str, ...]]
    """Name to the arguments of `bench.build`."""
    commands: Mapping[str, tuple[str, ...]]
    """Contestant to its words, in which {NAME} is an input and {output} what it writes."""
    targets: tuple[Target, ...]
    output_share: float = 0.0
    """What is written, at least, as a share of the input."""
    cold: bool = False


def cases(size_gb: float) -> list[Case]:
    """All cases; `size_gb` is the input of a merge."""
    return [
        _dense(size_gb, cold=False), _dense(size_gb, cold=True), _cast(size_gb), _mesh(size_gb), _moe(size_gb),
        _average(size_gb / 2), _growth(size_gb / 2), _table(), _plan(), _start(),
    ]  # fmt: skip


def _dense(size_gb: float, *, cold: bool) -> Case:
    commands: dict[str, tuple[str, ...]] = {
        "cp": (*CP, "{dense}", "{output}"),
        "reshard merge": (*RESHARD, "merge", "{dense}", "{output}"),
    }
    commands["floor"] = (*OTHERS, "floor", "{dense}", "{output}")
    return Case(
        "cold" if cold else "dense",
        f"Llama, 8 FSDP2 ranks, bfloat16, {size_gb:g} GB" + (", cold" if cold else ""),
        {"dense": ("dense", "--size-gb", str(size_gb))},
        commands if cold else commands | _peers("dense"),
        (at_most("cp", 1.1), in_memory(200)) if cold else (at_most("cp", 1.1), *_beaten(), in_memory(200)),
        0.9,
        cold,
    )


def _cast(size_gb: float) -> Case:
    return Case(
        "cast",
        f"The same in float32, {size_gb:g} GB, written as bfloat16",
        {"single": ("dense", "--size-gb", str(size_gb), "--dtype", "float32")},
        {
            "cp": (*CP, "{single}", "{output}"),
            "reshard merge": (*RESHARD, "merge", "{single}", "{output}", "--dtype", "bfloat16"),
        },
        (at_most("cp", 0.8, "`cp` of the input"), in_memory(200)),
        0.45,
    )


def _mesh(size_gb: float) -> Case:
    return Case(
        "mesh",
        f"Llama, tensor parallel 2 x FSDP2 4, bfloat16, {size_gb:g} GB: columns to be woven together",
        {"mesh": ("dense", "--size-gb", str(size_gb), "--tp", "2")},
        {"cp": (*CP, "{mesh}", "{output}"), "reshard merge": (*RESHARD, "merge", "{mesh}", "{output}")}
        | _peers("mesh"),
        (at_most("cp", 1.5), *_beaten(1), in_memory(200)),
        0.9,
    )


def _moe(size_gb: float) -> Case:
    return Case(
        "moe",
        f"Mixture of experts, 20,790 tensors in {NUM_MOE_CHUNKS:,} chunks of about {size_gb * 10:g} KB, bfloat16",
        {"moe": ("moe", "--size-gb", str(size_gb))},
        {"cp": (*CP, "{moe}", "{output}"), "reshard merge": (*RESHARD, "merge", "{moe}", "{output}")} | _peers("moe"),
        (Target("beyond `cp`, per chunk", _chunk_us, 40, "us"), *_beaten(1)),
        0.85,
    )


def _average(size_gb: float) -> Case:
    names = ("one", "two", "three", "four")
    sources = tuple(f"{{{name}}}" for name in names)
    read = " ".join(f"'{source}'/*" for source in sources)
    average = (*RESHARD, "average", *sources, "--output", "{output}")
    return Case(
        "average",
        f"The mean of 4 checkpoints of {size_gb:g} GB, bfloat16",
        {name: ("dense", "--size-gb", str(size_gb), "--seed", str(seed)) for seed, name in enumerate(names)},
        {
            "cat 4, cp 1": ("sh", "-c", f"cat {read} > /dev/null && cp -r --reflink=never '{{one}}' '{{output}}'"),
            "reshard average": average,
            "reshard average --accumulate float32": (*average, "--accumulate", "float32"),
        },
        (
            at_most("cat 4, cp 1", 2.0, "reading 4 and writing 1", "reshard average"),
            at_most("cat 4, cp 1", 1.5, "that, summed in float32", "reshard average --accumulate float32"),
            in_memory(200, "reshard average"),
        ),
        0.22,
    )


def _growth(size_gb: float) -> Case:
    sizes = [size_gb * factor for factor in (1, 2, 4, 8)]
    commands: dict[str, tuple[str, ...]] = {}
    for number, size in enumerate(sizes):
        commands[f"cp {size:g} GB"] = (*CP, f"{{number_{number}}}", "{output}")
        commands[f"reshard merge {size:g} GB"] = (*RESHARD, "merge", f"{{number_{number}}}", "{output}")
    first, last = f"{sizes[0]:g} GB", f"{sizes[-1]:g} GB"
    return Case(
        "growth",
        f"Growth from {first} to {last}: memory stays",
        {f"number_{number}": ("dense", "--size-gb", str(size)) for number, size in enumerate(sizes)},
        commands,
        (
            at_most(f"cp {last}", 1.1, f"`cp` at {last}", f"reshard merge {last}"),
            in_memory(200, f"reshard merge {last}"),
            Target(
                f"peak memory at {last} against {first}",
                lambda rounds: _peak(rounds, f"reshard merge {last}") / _peak(rounds, f"reshard merge {first}"),
                1.1,
                "x",
            ),
        ),
        0.9,
    )


def _table() -> Case:
    return Case(
        "inspect",
        "`inspect` of 288,000 chunks",
        {"table": ("table",)},
        {"reshard inspect": (*RESHARD, "inspect", "{table}", "--json")},
        (Target("wall", lambda rounds: _wall(rounds, "reshard inspect"), 5, "s"),),
    )


def _plan() -> Case:
    name = "reshard merge --dry-run"
    return Case(
        "plan",
        "The plan for Llama 405B of 128 ranks, 810 GB",
        {"sparse": ("sparse",)},
        {name: (*RESHARD, "merge", "{sparse}", "{output}", "--dry-run")},
        (Target("wall", lambda rounds: _wall(rounds, name), 10, "s"), in_memory(1024, name)),
    )


def _start() -> Case:
    name = "reshard --help"
    return Case(
        "start", "Start-up", {}, {name: (*RESHARD, "--help")},
        (Target("CPU", lambda rounds: median(run.cpu_s for run in rounds[name]), 0.15, "s"),),
    )  # fmt: skip


def _peers(source: str) -> dict[str, tuple[str, ...]]:
    return {
        "dcp_to_torch_save": (*OTHERS, "torch", f"{{{source}}}", "{output}"),
        "accelerate merge-weights": (*OTHERS, "accelerate", f"{{{source}}}", "{output}"),
    }


def at_most(base: str, limit: float, text: str = "`cp`", name: str = "reshard merge") -> Target:
    """So many times the wall time of the base, in the median round."""
    return Target(f"against {text}", lambda rounds: ratio(rounds, name, base), limit, "x")


def in_memory(limit_mib: float, name: str = "reshard merge") -> Target:
    return Target("peak memory", lambda rounds: _peak(rounds, name) / MIB, limit_mib, "MiB")


def _beaten(times: float = 8) -> tuple[Target, ...]:
    def beaten(peer: str) -> Target:
        text = f"faster than {peer}"
        return Target(text, lambda rounds: ratio(rounds, peer, "reshard merge"), times, "x", at_least=True)

    return tuple(beaten(peer) for peer in _peers(""))


def _peak(rounds: Rounds, name: str) -> float:
    return max(run.peak_nbytes for run in rounds[name])


def _wall(rounds: Rounds, name: str) -> float:
    return median(run.wall_s for run in rounds[name])


def _chunk_us(rounds: Rounds) -> float:
    pairs = zip(rounds["reshard merge"], rounds["cp"], strict=True)
    return median(ours.wall_s - cp.wall_s for ours, cp in pairs) / NUM_MOE_CHUNKS * 1e6
