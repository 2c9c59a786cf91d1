"""MLflow: metrics of a run that may be finished already, `run_id` or MLFLOW_RUN_ID; else a run of its own.

Any step is taken, several values a step too: what the run has is not sent again. Of names MLflow takes letters, digits
and `_-. :/` alone, so other characters become `_`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from reshard.evaluate.loggers import Point

PACKAGE = "mlflow"
OPTIONS = ("tracking_uri", "experiment", "run_id", "run_name")
_REFUSED = re.compile(r"[^\w\-./ :]")


def make(run: Path, folder: Path, options: Mapping[str, Any]) -> MLflow:
    """The logger of the run that is named, or of one with the run's name."""
    client = import_module("mlflow").MlflowClient(tracking_uri=options.get("tracking_uri"))
    run_id = options.get("run_id") or os.environ.get("MLFLOW_RUN_ID")
    return MLflow(client, run_id or _own_run(client, options, folder, options.get("run_name") or f"{run.name} evals"))


def _own_run(client: Any, options: Mapping[str, Any], folder: Path, name: str) -> str:
    """The run that an earlier watcher made for this folder, or a new one."""
    experiment = options.get("experiment") or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    found = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
    tag = str(folder).replace("'", "_")
    runs = client.search_runs([experiment_id], f"tags.`reshard.evals` = '{tag}'", max_results=1)
    run = runs[0] if runs else client.create_run(experiment_id, run_name=name, tags={"reshard.evals": tag})
    return str(run.info.run_id)


class MLflow:
    """One metric for each point."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._known: dict[str, set[int]] = {}

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            key = _REFUSED.sub("_", point.name)
            if key not in self._known:
                self._known[key] = {m.step for m in self._client.get_metric_history(self._run_id, key)}
            if point.step not in self._known[key]:
                self._client.log_metric(self._run_id, key, point.value, int(1000 * point.time), point.step)
                self._known[key].add(point.step)

    def close(self) -> None:
        return None
