"""Where results go besides `evals.jsonl`: one module each, imported when it is named.

A module has `OPTIONS`, the settings it takes, `PACKAGE`, what has to be installed, and `make(run, folder, options) ->
Logger`. Loggers derive from `evals.jsonl`: whatever one of them loses can be had again. None of them says a word of a
step that is not the step of the weights: results come late and in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from reshard.errors import InputError, listed

LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True, slots=True)
class Point:
    """One number at one step."""

    step: int
    name: str
    """`eval/TASK/METRIC`, with `.FILTER` where there is one; `eval_ema/...` for averaged weights."""
    value: float
    time: float
    """When it was measured, in seconds since the epoch."""


class Logger(Protocol):
    """One destination, open."""

    def log(self, points: Sequence[Point]) -> None:
        """Take points, in any order of steps; when this returns they are kept.

        A point may come twice after a kill: a destination that can tell does not take it twice.
        """

    def close(self) -> None: ...


def require(name: str, options: Mapping[str, Any]) -> None:
    """Raise InputError when the package of a logger is missing, or a setting of it is unknown. Nothing is imported."""
    module = import_module(f"reshard.evaluate.loggers.{name}")
    unknown = sorted(set(options) - set(module.OPTIONS))
    if unknown:
        raise InputError(f"loggers: {name}: unknown {listed(unknown)}; it takes {listed(module.OPTIONS)}")
    if find_spec(module.PACKAGE) is None:
        raise InputError(
            f"loggers: {name} is not installed", hint=f"pip install {module.PACKAGE}, where reshard is installed"
        )


def open_logger(name: str, run: Path, folder: Path, options: Mapping[str, Any]) -> Logger:
    """The logger of this name, for a run whose evaluations are in `folder`. Raises whatever its package does."""
    logger: Logger = import_module(f"reshard.evaluate.loggers.{name}").make(run, folder, options)
    return logger


def by_step(points: Sequence[Point]) -> list[tuple[int, dict[str, float]]]:
    """Points of one step together, by ascending step."""
    rows: dict[int, dict[str, float]] = {}
    for point in points:
        rows.setdefault(point.step, {})[point.name] = point.value
    return sorted(rows.items())
