"""Metrics: what an evaluation measured, without what it merely says besides.

    {"results": {TASK: {"alias": ..., "sample_len": 8, "acc,none": 0.5, "acc_stderr,none": 0.2}}}   lm-eval, lmms-eval
    {TASK: {METRIC: 0.5}}, {METRIC: 0.5}                                                            any other command

In the first form a metric is a key with a comma in it, `metric,filter`; a key without one tells of the task. Standard
errors, texts and lists are no metrics. Source: lm_eval 0.4.13 and lmms-eval 0.7.3, their results files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from reshard.errors import Corrupt, NotFound

NO_FILTER = "none"
"""How the harnesses name the absence of a filter."""
_LIMIT_NBYTES = 256 << 20
_MOST = 1 << 1000
_STANDARD_ERROR = re.compile(r".*_stderr(_\w+)?")


@dataclass(frozen=True, slots=True, order=True)
class Metric:
    """One number of one evaluation."""

    task: str
    """Empty where the command names none."""
    metric: str
    filter: str
    """Of the answers, such as `strict-match`; `none` without one."""
    value: float
    """May be NaN."""

    @property
    def name(self) -> str:
        """`task/metric`, with `.filter` where there is one."""
        return metric_name(self.task, self.metric, self.filter)


def metric_name(task: str, metric: str, filter: str = NO_FILTER) -> str:
    """`task/metric`, with `.filter` where there is one: no two metrics share a name."""
    return (f"{task}/" if task else "") + metric + ("" if filter == NO_FILTER else f".{filter}")


def read_document(path: Path) -> dict[str, Any]:
    """The object in a results file. Raises NotFound when there is no file, Corrupt when it is no JSON object."""
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    nbytes = path.stat().st_size
    if nbytes > _LIMIT_NBYTES:
        raise Corrupt(f"{path} has {nbytes} bytes: no file of metrics")
    try:
        document = _decoded(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise Corrupt(f"{path}: an object of metrics is expected, it holds a {type(document).__name__}")
    return document


def _decoded(data: bytes) -> Any:
    """JSON, with the NaN and Infinity that Python's own writer puts into it."""
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        import json

        document = json.loads(data)
        json.dumps(document, ensure_ascii=False).encode()  # which half of a character is no part of
        return document


def metrics_of(document: Mapping[str, Any]) -> tuple[Metric, ...]:
    """All metrics of a results document, sorted. Raises Corrupt when it names one twice."""
    results = document.get("results")
    if isinstance(results, Mapping):
        found = list(_of_harness(results))
    else:
        found = list(_of_command(document))
    if len({(m.task, m.metric, m.filter) for m in found}) != len(found):
        raise Corrupt("the results name one metric twice")
    return tuple(sorted(found, key=lambda m: (m.task, m.metric, m.filter)))


def _of_harness(results: Mapping[str, Any]) -> Iterator[Metric]:
    for task, values in results.items():
        if not isinstance(values, Mapping):
            continue
        for key, value in values.items():
            metric, comma, filter = str(key).partition(",")
            if comma and is_number(value) and not _STANDARD_ERROR.fullmatch(metric):
                yield Metric(str(task), metric, filter or NO_FILTER, float(value))


def _of_command(document: Mapping[str, Any]) -> Iterator[Metric]:
    for name, value in document.items():
        inner = value.items() if isinstance(value, Mapping) else [(name, value)]
        task = str(name) if isinstance(value, Mapping) else ""
        for key, number in inner:
            metric, _, filter = str(key).partition(",")
            if is_number(number) and not _STANDARD_ERROR.fullmatch(metric):
                yield Metric(task, metric, filter or NO_FILTER, float(number))


def is_number(value: object) -> bool:
    """Whether a value can be plotted: an int or a float, NaN too; no truth value, nothing that no float can hold."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _MOST
    return isinstance(value, float)


def as_text(value: float) -> float | str:
    """A number as JSON can hold it."""
    return value if math.isfinite(value) else str(value)
