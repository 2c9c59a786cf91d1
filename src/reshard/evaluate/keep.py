"""Which whole models stay when they are evaluated, and which checkpoint is best. Shards are never touched here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from reshard.errors import InputError, NotFound, listed
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.records import Job, Result, State

Step = tuple[int, str]
"""(step, kind)."""


def scores(results: Iterable[Result], wanted: str) -> Mapping[Step, Result]:
    """The result of every step under a name: `TASK/METRIC`, with `.FILTER` where there are several.

    Raises NotFound when there is none of this name, InputError when it means several.
    """
    results = list(results)
    exact = [r for r in results if wanted in (r.name, f"{r.task}/{r.metric}.{r.filter}")]
    chosen = exact or [r for r in results if wanted in (f"{r.task}/{r.metric}", r.metric)]
    names = sorted({r.name for r in chosen})
    if not names:
        known = sorted({r.name for r in results})
        raise NotFound(f"no result is called {wanted}", hint=f"there are {listed(known)}" if known else None)
    if len(names) > 1:
        raise InputError(f"{wanted} may be {listed(names)}", hint="name one of them")
    return {(r.step, r.kind): r for r in chosen}


def best(results: Iterable[Result], wanted: str, mode: str = "max") -> list[Result]:
    """The results under a name, the best first; of equal ones the later step. NaN is no candidate."""
    sign = -1 if mode == "max" else 1
    found = [r for r in scores(results, wanted).values() if not math.isnan(r.value)]
    return sorted(found, key=lambda r: (sign * r.value, -r.step, r.kind))


def kept(jobs: Sequence[Job], results: Sequence[Result], config: EvalConfig) -> set[int]:
    """The jobs whose whole models stay, of those that are done with."""
    done = [job for job in jobs if job.state == State.DONE]
    match config.keep_merged:
        case "all":
            return {job.id for job in done}
        case "last":
            newest = {job.kind: job for job in sorted(done, key=lambda job: (job.step, job.id))}
            return {job.id for job in newest.values()}
        case "best":
            steps = _best_steps(results, config)
            return {job.id for job in done if (job.step, job.kind) in steps}
    return set()


def _best_steps(results: Sequence[Result], config: EvalConfig) -> set[Step]:
    if config.best_metric is None:
        return set()
    try:
        ranked = best(results, config.best_metric, config.best_mode)
    except NotFound:
        return set()
    return {(r.step, r.kind) for r in ranked[: config.keep_best]}


__all__ = ["best", "kept", "scores"]
