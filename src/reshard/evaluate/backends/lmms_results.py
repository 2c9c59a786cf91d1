"""The results that lmms-eval leaves, and whether they are those that were asked for.

    OUTPUT/<last two parts of the model's path>/<YYYYMMDD_HHMMSS in Singapore>_results.json
                                                <the same>_samples_<task>.jsonl

lmms-eval ends well when it failed, and its server answers `completed` with whatever it finds in the directory. So a
file counts only if it names the model and the limit of the request, and was made after it.
Source: lmms-eval 0.7.3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from reshard.errors import Corrupt, InputError, Mismatch, NotFound
from reshard.evaluate.metrics import Metric, metrics_of, read_document

_PATTERNS = ("*_results.json", "results_*.json", "results.json")
_DEPTH = 4
_SINGAPORE = timedelta(hours=8)
_CLOCKS_S = 600.0
"""How far the clocks of two machines may be apart."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What results have to be of."""

    model: str
    limit: float | None
    since: float
    """Seconds since the epoch."""
    predict_only: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """Results that are valid."""

    path: Path
    document: Mapping[str, Any]
    metrics: tuple[Metric, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The results, and the samples that were written with them."""
        stamp = self.path.name.removesuffix("_results.json")
        return (self.path, *sorted(self.path.parent.glob(f"{stamp}_samples_*.jsonl")))


def results_in(output: Path) -> list[Path]:
    """All results files of a directory, the newest first."""
    found = set[Path]()
    for depth in range(_DEPTH):
        for pattern in _PATTERNS:
            found.update(output.glob("*/" * depth + pattern))
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name), reverse=True)


def found_in(output: Path, expected: Expected) -> Found:
    """The newest valid results of a directory. Raises InputError that says what is wrong with the newest."""
    first: InputError | None = None
    for path in results_in(output):
        try:
            return validated(path, expected)
        except InputError as error:
            first = first or error
    raise first or NotFound(f"{output} holds no results")


def validated(path: Path, expected: Expected) -> Found:
    """The results in a file. Raises Mismatch when they are of something else, Corrupt when they are none."""
    document = read_document(path)
    said = document.get("model_name")
    if not isinstance(said, str) or not _same_path(said, expected.model):
        raise Mismatch(f"{path}: it is of {said}, {expected.model} was to be evaluated")
    config = document.get("config")
    limit = config.get("limit") if isinstance(config, Mapping) else None
    if isinstance(config, Mapping) and "limit" in config and limit != expected.limit:
        raise Mismatch(f"{path}: its limit is {limit}, {expected.limit} was asked for")
    made = made_at(document)
    if made is not None and made < expected.since - _CLOCKS_S:
        raise Mismatch(f"{path}: made {_told(made)}, and asked for {_told(expected.since)}: results of earlier")
    metrics = metrics_of(document)
    if not metrics and not expected.predict_only:
        raise Corrupt(f"{path} has no metric in it")
    return Found(path, document, metrics)


def made_at(document: Mapping[str, Any]) -> float | None:
    """When results were made, in seconds since the epoch: a number in lm_eval's, a time of Singapore in lmms-eval's."""
    date = document.get("date")
    if isinstance(date, int | float) and not isinstance(date, bool):
        return float(date)
    try:
        return (datetime.strptime(str(date), "%Y%m%d_%H%M%S").replace(tzinfo=UTC) - _SINGAPORE).timestamp()
    except ValueError:
        return None


def _same_path(one: str, other: str) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _told(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
