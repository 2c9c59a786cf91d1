"""trackio: a run of its own, which is gone on with by its name. Every call states its step, and any is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from reshard.evaluate.loggers import Point, by_step

PACKAGE = "trackio"
OPTIONS = ("project", "name", "group", "space_id")


def make(run: Path, folder: Path, options: Mapping[str, Any]) -> Trackio:
    """The logger, its run begun or gone on with."""
    settings = {"project": run.name, "name": f"{run.name}-evals", "resume": "allow"}
    trackio = import_module("trackio")
    return Trackio(trackio.init(**settings | dict(options)))


class Trackio:
    """One row for each step."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, points: Sequence[Point]) -> None:
        for step, values in by_step(points):
            self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
