"""Where results go besides `evals.jsonl`: one module each, imported when it is named.

A module has `OPTIONS`, the settings it takes, and `make(run, options) -> Logger`. Loggers derive from `evals.jsonl`:
whatever one of them loses can be had again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
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
        """Take points, in any order of steps; when this returns they are kept. A point may come twice after a kill."""

    def close(self) -> None: ...


def open_logger(name: str, run: Path, options: Mapping[str, Any]) -> Logger:
    """The logger of this name. Raises InputError when its package is missing or a setting is unknown."""
    module = import_module(f"reshard.evaluate.loggers.{name}")
    unknown = sorted(set(options) - set(module.OPTIONS))
    if unknown:
        raise InputError(f"loggers: {name}: unknown {listed(unknown)}; it takes {listed(module.OPTIONS)}")
    try:
        logger: Logger = module.make(run, options)
    except ImportError as error:
        raise InputError(
            f"loggers: {name}: {error}", hint=f"pip install {error.name or name}, where reshard is installed"
        ) from error
    return logger
