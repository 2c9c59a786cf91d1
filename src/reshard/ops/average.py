"""average: the mean of checkpoints, straight from their shards.

The sources may be of any mixture of formats. Each block is read from all of them, summed, divided and rounded once.
What is not a floating-point tensor must agree, or is taken from the last and named.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from reshard.core.checkpoint import same_bytes
from reshard.core.dtypes import DType, dtype
from reshard.core.mean import Mean
from reshard.core.tensor import Tensor
from reshard.errors import InputError, Mismatch, NotFound, listed
from reshard.formats.detect import find, numbered
from reshard.ops.merge import Merged, Options, Prepared, carry_out, planned, prepare
from reshard.storage.run import Progress

Accumulate = Literal["float64", "float32"]


@dataclass(slots=True)
class NonFinite:
    """Counts of NaN and infinite elements, by source and FQN, from all threads."""

    counts: dict[tuple[int, str], int] = field(default_factory=lambda: defaultdict(int))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, fqn: str, index: int, count: int) -> None:
        with self.lock:
            self.counts[index, fqn] += count

    def said(self, sources: Sequence[str | Path]) -> tuple[str, ...]:
        """A sentence for each source and FQN that has any."""
        return tuple(
            f"{sources[index]}: {fqn} has {count} NaN or infinite elements"
            for (index, fqn), count in sorted(self.counts.items())
        )


def average(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    accumulate: Accumulate = "float64",
    force: bool = False,
    threads: int | None = None,
    block_nbytes: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Merged:
    """Write the weighted mean of checkpoints; equal weights by default.

    `ema` gives the weights of an exponential moving average over the series, oldest first: starting at the first and
    updated as `decay * average + (1 - decay) * next`. `options` are those of `merge`. Raises Mismatch, listing every
    difference, unless all sources have the same names and shapes.
    """
    bad = NonFinite()
    prepared = prepare_average(
        [Path(s) for s in sources], Path(output), Options(**options), weights, ema, accumulate, bad
    )
    return carry_out(
        prepared, Path(output), force=force, threads=threads, block_nbytes=block_nbytes, progress=progress,
        tell=lambda: bad.said(sources),
    )  # fmt: skip


def prepare_average(
    sources: Sequence[Path],
    output: Path,
    options: Options,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    accumulate: Accumulate = "float64",
    bad: NonFinite | None = None,
) -> Prepared:
    """Everything up to the plan, from headers alone, except that what must agree is compared."""
    if len(sources) < 1:
        raise InputError("nothing to average")
    shares = _weights(len(sources), weights, ema)
    untouched = replace(options, dtype=None)
    prepared = [prepare(source, output, untouched) for source in sources]
    _check_aligned(prepared)
    last = prepared[-1].checkpoint
    to = None if options.dtype is None else dtype(options.dtype)
    tensors, taken = {}, []
    for fqn in last.tensors:
        parts = tuple(p.checkpoint.tensors[fqn] for p in prepared)
        if last.tensors[fqn].dtype.kind == "float":
            tensors[fqn] = _mean(fqn, parts, shares, to or last.tensors[fqn].dtype, accumulate, bad)
        else:
            tensors[fqn] = last.tensors[fqn]
            if not all(same_bytes(part, last.tensors[fqn], last.source) for part in parts[:-1]):
                taken.append(fqn)
    recipe = listed(f"{s.name} x {w:g}" for s, w in zip(sources, shares, strict=True))
    notices = (*last.notices, f"the mean of {len(sources)}: {recipe}")
    if taken:
        notices += (f"not numbers to average, and different: taken from {sources[-1].name}: {listed(taken)}",)
    checkpoint = replace(last, tensors=tensors, notices=notices)
    parts_of = [{"path": str(s), "weight": w} for s, w in zip(sources, shares, strict=True)]
    recipe_facts = {"average": parts_of, "accumulate": accumulate}
    return planned(prepared[-1].root, prepared[-1].opened, checkpoint, output, options, recipe_facts)


def series(run: Path, *, step: int | None = None, last: int | None = None) -> list[Path]:
    """The checkpoints of a run in ascending order; only that of `step`, or only the `last` ones."""
    found = numbered(run)
    if not found:
        find(run)  # explains what is there instead
        raise NotFound(f"{run} holds no numbered checkpoints", hint="name the checkpoints one by one")
    if step is not None:
        chosen = [path for number, path in found if number == step]
        if not chosen:
            steps = listed(str(number) for number, _ in found)
            raise NotFound(f"{run} has no checkpoint of step {step}", hint=f"it has the steps {steps}")
        return chosen
    return [path for _, path in found][-last if last else None :]


def ema_weights(count: int, decay: float) -> list[float]:
    """The share of each of `count` checkpoints, oldest first, in an exponential moving average."""
    if not 0 <= decay < 1:
        raise InputError(f"--ema {decay}: a decay lies between 0 and 1")
    return [decay ** (count - 1 - i) * (1.0 if i == 0 else 1 - decay) for i in range(count)]


def _weights(count: int, weights: Sequence[float] | None, ema: float | None) -> list[float]:
    if weights is not None and ema is not None:
        raise InputError("--weights and --ema exclude each other")
    if ema is not None:
        return ema_weights(count, ema)
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights for {count} checkpoints")
    if sum(weights) <= 0 or min(weights) < 0:
        raise InputError(f"weights {listed(f'{w:g}' for w in weights)}: none is negative, and not all are 0")
    return [float(w) for w in weights]


def _mean(
    fqn: str,
    parts: tuple[Tensor, ...],
    shares: Sequence[float],
    to: DType,
    accumulate: Accumulate,
    bad: NonFinite | None,
) -> Tensor:
    report = None if bad is None else lambda index, count: bad.add(fqn, index, count)
    return Mean(to, parts[0].shape, parts, tuple(shares), accumulate, report)


def _check_aligned(prepared: Sequence[Prepared]) -> None:
    """Raise one Mismatch that lists every name, shape and dtype in which the sources differ."""
    first = prepared[0].checkpoint
    problems = []
    for other in prepared[1:]:
        where = other.checkpoint.origin.path.name
        a, b = first.tensors, other.checkpoint.tensors
        problems += [f"{fqn} is not in {where}" for fqn in a if fqn not in b]
        problems += [f"{fqn} is only in {where}" for fqn in b if fqn not in a]
        for fqn in a:
            if fqn in b and (a[fqn].dtype, a[fqn].shape) != (b[fqn].dtype, b[fqn].shape):
                here, there = (f"{t.dtype} {list(t.shape)}" for t in (a[fqn], b[fqn]))
                problems.append(f"{fqn} is {here} in {first.origin.path.name} and {there} in {where}")
    if problems:
        shown = "\n  ".join(problems[:50]) + ("" if len(problems) <= 50 else f"\n  and {len(problems) - 50} more")
        raise Mismatch(
            f"the checkpoints do not match in {len(problems)} places:\n  {shown}",
            hint="average checkpoints of one model",
        )
