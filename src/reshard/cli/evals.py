"""Show how far the evaluation of a run's checkpoints is, and what it measured.

RUN     the directory that `reshard watch` was given
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reshard.cli import output

if TYPE_CHECKING:
    from reshard.evaluate.records import Job, Result


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--best", metavar="TASK/METRIC", help="the checkpoint with the highest value of this metric")
    parser.add_argument("--lowest", action="store_true", help="with --best: the lowest value is the best")
    parser.add_argument("--evals-dir", metavar="DIR", help="where all is kept (default: RUN/evals)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    from reshard.evaluate.places import Places
    from reshard.evaluate.watch import open_store

    with open_store(Places.of(args.run, args.evals_dir)) as store:
        jobs, results = store.jobs(), store.results()
        if args.best:
            return _show_best(args, jobs, results)
        attempts = {job.id: store.attempts(job) for job in jobs}
    if args.json:
        rows = [
            {
                "step": job.step, "kind": job.kind, "state": job.state, "reason": job.reason, "attempts": job.attempts,
                "checkpoint": job.source, "model": job.merged, "output": job.output, "fingerprint": job.fingerprint,
                "history": attempts[job.id],
                "results": [r for r in results if r.job == job.id or _is_of(r, job)],
            }
            for job in _shown(jobs)
        ]  # fmt: skip
        output.show_json(rows)
        return 0
    _show_table(_shown(jobs), results)
    return 0


def _is_of(result: Result, job: Job) -> bool:
    return (result.step, result.kind, result.fingerprint) == (job.step, job.kind, job.fingerprint)


def _shown(jobs: Sequence[Job]) -> list[Job]:
    """By step; a save that a later one displaced is left out."""
    from reshard.evaluate.records import State

    left_out = (State.SUPERSEDED, State.SAME)
    return sorted((job for job in jobs if job.state not in left_out), key=lambda job: (job.step, job.kind, job.id))


def _show_table(jobs: Sequence[Job], results: Sequence[Result]) -> None:
    from reshard.evaluate.scan import brief

    names = sorted({result.name for result in results})
    kinds = {job.kind for job in jobs} != {"regular"}
    values = {(r.step, r.kind, r.name): f"{r.value:.6g}" for r in results if r.logged}
    head = ["step", *(["weights"] if kinds else []), "state", "attempts", *names, "why"]
    rows = [
        [
            str(job.step), *([job.kind] if kinds else []), str(job.state), str(job.attempts),
            *(values.get((job.step, job.kind, name), "") for name in names), brief(job.reason),
        ]
        for job in jobs
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        output.show(line.rstrip())


def _show_best(args: argparse.Namespace, jobs: Sequence[Job], results: Sequence[Result]) -> int:
    from reshard.errors import NotFound
    from reshard.evaluate.keep import best

    ranked = best([r for r in results if r.logged], args.best, "min" if args.lowest else "max")
    if not ranked:
        raise NotFound(f"no step has a value of {args.best} that is a number")
    first = ranked[0]
    job = next((job for job in jobs if _is_of(first, job)), None)
    checkpoint, model = (job.source, job.merged) if job else ("", "")
    if args.json:
        row = {"step": first.step, "kind": first.kind, "metric": first.name, "value": first.value}
        output.show_json({**row, "checkpoint": checkpoint, "model": model})
        return 0
    kind = "" if first.kind == "regular" else f" ({first.kind})"
    output.show(f"step {first.step}{kind}  {first.name} {first.value:.6g}  {model or checkpoint}")
    return 0
