"""What is measured, and what has to come out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median

from bench.measure import Rounds, ratio

MIB = 1 << 20
NUM_MOE_CHUNKS = (54 * 128 * 3 + 54) * 8

RESHARD = (sys.executable, "-m", "reshard")
CP = ("cp", "-r", "--reflink=never")
OTHERS = (sys.executable, "-m", "bench.contestants")
LOOPS = (sys.executable, "-m", "bench.loops")


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
        _to_torch_dist(size_gb), _from_torch_dist(size_gb), _to_fsdp_dtensor(size_gb), _from_zarr(size_gb),
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


def _to_torch_dist(size_gb: float) -> Case:
    return Case(
        "hf-torch_dist",
        f"Llama, bfloat16, {size_gb:g} GB, from HuggingFace to torch_dist",
        {"hf": ("hf", "--size-gb", str(size_gb))},
        {
            "cp": (*CP, "{hf}", "{output}"),
            CONVERT: (*RESHARD, "convert", "{hf}", "{output}", "--to", "torch_dist"),
            LOOP: (*LOOPS, "to_torch_dist", "{hf}", "{output}"),
            **_mbridge("mbridge_import", "{hf}", "{output}"),
        },
        _converted("cp"),
        0.95,
    )


def _from_torch_dist(size_gb: float) -> Case:
    to_hub = ("--to", "hf", "--hf-model", "{config}")
    return Case(
        "torch_dist-hf",
        f"The same from torch_dist, saved on TP 2 and PP 4, to HuggingFace, {size_gb:g} GB",
        {name: (name, "--size-gb", str(size_gb)) for name in ("torch_dist", "config")},
        {
            "cp": (*CP, "{torch_dist}", "{output}"),
            CONVERT: (*RESHARD, "convert", "{torch_dist}", "{output}", *to_hub),
            LOOP: (*LOOPS, "from_torch_dist", "{torch_dist}", "{output}"),
            **_mbridge("mbridge_export", "{config}", "{torch_dist}", "{output}"),
        },
        _converted("cp"),
        0.95,
    )


def _to_fsdp_dtensor(size_gb: float) -> Case:
    convert = (*RESHARD, "convert", "{hf}", "{output}", "--to", "fsdp_dtensor")
    halved = f"{CONVERT} --dtype bfloat16"
    twice = "mkdir '{output}' && cp -r --reflink=never '{hf}' '{output}/1' && cp -r --reflink=never '{hf}' '{output}/2'"
    return Case(
        "hf-fsdp_dtensor",
        f"Llama, bfloat16, {size_gb:g} GB, from HuggingFace to fsdp_dtensor in float32, which is twice as large",
        {"hf": ("hf", "--size-gb", str(size_gb))},
        {
            "cp, twice": ("sh", "-c", twice),
            CONVERT: convert,
            LOOP: (*LOOPS, "to_fsdp_dtensor", "{hf}", "{output}"),
            "cp ": (*CP, "{hf}", "{output}"),
            halved: (*convert, "--dtype", "bfloat16"),
        },
        (*_converted("cp, twice"), at_most("cp ", 1.5, "`cp`, in bfloat16", halved)),
        0.95,
    )


def _from_zarr(size_gb: float) -> Case:
    return Case(
        "zarr-hf",
        f"The same from zarr, saved on TP 2, to HuggingFace, {size_gb:g} GB",
        {name: (name, "--size-gb", str(size_gb)) for name in ("zarr", "config")},
        {
            "cp": (*CP, "{zarr}", "{output}"),
            CONVERT: (*RESHARD, "convert", "{zarr}", "{output}", "--to", "hf", "--hf-model", "{config}"),
        },
        (at_most("cp", 1.5, name=CONVERT), in_memory(200, CONVERT)),
        0.95,
    )


CONVERT, LOOP = "reshard convert", "plain torch"


def _mbridge(*words: str) -> dict[str, tuple[str, ...]]:
    """mbridge, where it can be imported: it is not among the requirements."""
    return {"mbridge": (*LOOPS, *words)} if find_spec("mbridge") and find_spec("megatron") else {}


def _converted(cp: str) -> tuple[Target, ...]:
    """What a conversion is held against: `cp`, a loop that does the same, a bound of memory."""
    faster = Target(f"faster than {LOOP}", lambda rounds: ratio(rounds, LOOP, CONVERT), 1, "x", at_least=True)
    return at_most(cp, 1.5, name=CONVERT), faster, in_memory(200, CONVERT)


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
