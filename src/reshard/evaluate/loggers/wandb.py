"""Weights & Biases: a run of its own, in the group of the training run.

A row with an explicit step below the run's is dropped, and one without advances the step of whoever else writes to the
run; so the training run is left alone, and the step of the weights is a value of the row, `eval/step`, which
`define_metric` makes the axis. The run's id follows from the directory, so a watcher that is started again goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import xxhash

from reshard.evaluate.loggers import Point, by_step

PACKAGE = "wandb"
OPTIONS = ("project", "entity", "group", "name", "id", "mode", "dir", "tags")
STEP = "eval/step"


def make(run: Path, folder: Path, options: Mapping[str, Any]) -> Wandb:
    """The logger, its run begun or gone on with."""
    settings = {"id": f"eval-{xxhash.xxh3_64_hexdigest(str(folder).encode())}", "dir": str(folder)}
    settings |= {"group": run.name, "name": f"{run.name} evaluations", "job_type": "eval", "resume": "allow"}
    return Wandb(import_module("wandb").init(**settings | dict(options)))


class Wandb:
    """One row for each step."""

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric(STEP)
        for group in ("eval/*", "eval_ema/*"):
            run.define_metric(group, step_metric=STEP)

    def log(self, points: Sequence[Point]) -> None:
        for step, values in by_step(points):
            self._run.log({**values, STEP: step})

    def close(self) -> None:
        self._run.finish()
