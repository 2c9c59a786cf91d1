"""lm-evaluation-harness: `python -m lm_eval run`, one process for each model. Its texts, its tasks, its exit status.

    OUTPUT/<model path, sanitised>/results_<local time>.json, samples_<task>_<the same>.jsonl

Settings go to it as JSON, so that no comma and no equals sign in a path means anything. Source: lm_eval 0.4.13.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from reshard.errors import Corrupt, InputError, Mismatch, NotFound, listed
from reshard.evaluate.backend import Refused, Request
from reshard.evaluate.backends.catalogue import Catalogue, ask
from reshard.evaluate.backends.harness import settled
from reshard.evaluate.backends.program import Program, launcher
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.metrics import Metric, metrics_of, read_document

_NAME_NBYTES = 255
_CATALOGUE = """
import json, sys
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager
import lm_eval.models
print(json.dumps([TaskManager(include_path=sys.argv[1] or None).all_tasks, sorted(model_registry.keys())]))
"""


def make(config: EvalConfig) -> Program:
    """The backend of `backend: lm_eval`."""
    return Program(LmEval(settled(config)))


class LmEval:
    """The harness lm_eval."""

    def __init__(self, config: EvalConfig, python: str = sys.executable) -> None:
        self._config = config
        self._python = python
        bad = [name for name in config.extra_kwargs if not name.replace("_", "").isalnum()]
        if bad:
            raise InputError(f"extra_kwargs: {listed(bad)} is no option of lm_eval")
        if config.include_path is not None and not Path(config.include_path).is_dir():
            raise NotFound(f"include_path: {config.include_path}: no such directory")

    @cached_property
    def catalogue(self) -> Catalogue:
        return ask(self._python, _CATALOGUE, self._config.include_path or "")

    def command(self, request: Request) -> Sequence[str]:
        config = self._config
        wrong = [task for task in config.tasks if "," in task or task.startswith("-")]
        if wrong:
            raise Refused(f"{listed(wrong)}: no names of tasks")
        name = re.sub(r'["<>:/|\\?*\[\]]+', "__", str(request.model))
        if len(os.fsencode(name)) > _NAME_NBYTES:  # it would find out when everything is evaluated
            raise Refused(
                f"{request.model}: lm_eval makes one directory name of it, and {len(name)} characters are too many",
                hint="evaluate it under a shorter path",
            )
        options: dict[str, Any] = {
            "model": config.model, "model_args": json.dumps(self._model_args(request.model)),
            "tasks": ",".join(config.tasks), "output_path": str(request.output),
            "num_fewshot": config.num_fewshot, "batch_size": config.batch_size, "device": config.device,
            "limit": config.limit, "gen_kwargs": config.gen_kwargs, "include_path": _absolute(config.include_path),
            "log_samples": config.log_samples, "predict_only": config.predict_only, **config.extra_kwargs,
        }  # fmt: skip
        return [*launcher(self._python, "lm_eval", config.num_gpus), "run", *_written(options)]

    def _model_args(self, model: Path) -> dict[str, Any]:
        return {**self._config.model_args, checkpoint_key(self._config): str(model)}

    def collect(self, request: Request) -> tuple[tuple[Metric, ...], tuple[Path, ...]]:
        found = sorted(request.output.glob("*/results_*.json"))
        if not found:
            raise NotFound(f"{request.output} holds no results of lm_eval")
        document = read_document(found[-1])
        said = document.get("model_name")
        if said is not None and str(said) != str(request.model):
            raise Mismatch(f"{found[-1]}: it is of {said}, {request.model} was to be evaluated")
        metrics = metrics_of(document)
        if not metrics and not self._config.predict_only:
            raise Corrupt(f"{found[-1]} has no metric in it")
        return metrics, (found[-1], *sorted(found[-1].parent.glob("samples_*.jsonl")))


def checkpoint_key(config: EvalConfig) -> str:
    """Which of the model's settings is the path: lm_eval's own models know none of lmms-eval's `model`."""
    return "pretrained" if config.checkpoint_key == "model" else config.checkpoint_key


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _written(options: Mapping[str, Any]) -> list[str]:
    """Options as words, none of which begins another option; what is None or False is left out."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            text = json.dumps(value) if isinstance(value, Mapping | list) else str(value)
            words.append(f"--{name}={text}")
    return words
