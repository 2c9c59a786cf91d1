"""lmms-eval as a program: `python -m lmms_eval`, one process for each model, for a server that is not its own.

It ends with exit status 0 also when it failed, so its results are all that counts: see `lmms_results.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from reshard.evaluate.backend import Request
from reshard.evaluate.backends.catalogue import Catalogue, ask
from reshard.evaluate.backends.harness import lmms_model_args, model_named_in
from reshard.evaluate.backends.lmms_results import Expected, found_in
from reshard.evaluate.backends.program import launcher
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.metrics import Metric

_CATALOGUE = """
import json
from lmms_eval.models import list_available_models
from lmms_eval.tasks import TaskManager
print(json.dumps([TaskManager().all_tasks, list_available_models()]))
"""


class LmmsEval:
    """The harness lmms-eval."""

    def __init__(self, config: EvalConfig, python: str = sys.executable) -> None:
        self._config = config
        self._python = python

    @cached_property
    def catalogue(self) -> Catalogue:
        return ask(self._python, _CATALOGUE)

    def command(self, request: Request) -> Sequence[str]:
        config = self._config
        model_args = lmms_model_args(config, str(request.model))
        options = {
            "model": config.model, "model_args": ",".join(f"{name}={value}" for name, value in model_args.items()),
            "tasks": ",".join(config.tasks), "output_path": request.output, "batch_size": config.batch_size,
            "limit": config.limit, "num_fewshot": config.num_fewshot, "gen_kwargs": config.gen_kwargs,
        }  # fmt: skip
        flags = {"log_samples": config.log_samples, "predict_only": config.predict_only}
        words = [f"--{name}={value}" for name, value in options.items() if value is not None]
        return [
            *launcher(self._python, "lmms_eval", config.num_gpus), *words,
            *(f"--{name}" for name, wanted in flags.items() if wanted),
        ]  # fmt: skip

    def collect(self, request: Request) -> tuple[tuple[Metric, ...], tuple[Path, ...]]:
        config = self._config
        model = model_named_in({**config.model_args, config.checkpoint_key: str(request.model)})
        expected = Expected(model or "", config.limit, 0.0, config.predict_only)
        found = found_in(request.output, expected)
        return found.metrics, found.files
