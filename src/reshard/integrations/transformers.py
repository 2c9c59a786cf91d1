"""A callback for HuggingFace's Trainer, and for TRL and axolotl, which are built on it.

    trainer.add_callback(AsyncEvalCallback({"server_url": "http://127.0.0.1:8000", "model": "hf", "tasks": ["mmlu"],
                                            "checkpoint_key": "pretrained", "loggers": ["tensorboard"]}))

Every checkpoint that the trainer saves is submitted to the server; training goes on. Results are logged at the step of
their checkpoint, though the trainer is far ahead by then: in `evals.jsonl` of the output directory, in the trainer's
own history, and in the loggers that the settings name. `Trainer.log` is not used: it knows the current step only. Use
this or `reshard watch`, not both on one run.

The class needs nothing of transformers, whose callbacks are called by their names.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from reshard.errors import InputError
from reshard.integrations.submit import Result, Submitter

NAME = "evals.jsonl"
_LOG = logging.getLogger("reshard.evaluate")
_DRAIN_S = 3600.0
_REQUEST = ("num_fewshot", "batch_size", "device", "limit", "gen_kwargs", "log_samples", "predict_only", "num_gpus")


class AsyncEvalCallback:
    """Submits what is saved, and logs what comes back."""

    def __init__(self, eval_config: Any, *, drain_s: float = _DRAIN_S) -> None:
        """`eval_config` is that of `reshard watch`: a mapping, or the path of a YAML file with it.

        At the end of training what is outstanding has `drain_s` seconds. Raises InputError for unknown settings.
        """
        from reshard.evaluate.backends.http import token_of
        from reshard.evaluate.config import EvalConfig, config_of, read_settings
        from reshard.evaluate.loggers import require

        if isinstance(eval_config, str | os.PathLike):
            eval_config = read_settings(Path(eval_config)).evaluation
        config = eval_config if isinstance(eval_config, EvalConfig) else config_of(eval_config)
        if config.backend != "lmms_eval":
            raise InputError(
                f"backend: {config.backend}: a callback submits to a server",
                hint=f"reshard serve --backend {config.backend}, or reshard watch beside the training",
            )
        for name, options in config.loggers.items():
            require(name, options)
        asked = {name: getattr(config, name) for name in _REQUEST if getattr(config, name) is not None}
        self._submitter = Submitter(
            config.server_url, list(config.tasks), config.model, dict(config.model_args), config.checkpoint_key,
            token_of(config.server_token), config.poll_interval, **asked,
        )  # fmt: skip
        self._kinds, self._options, self._drain_s = config.kinds, config.loggers, drain_s
        self._loggers: dict[str, Any] | None = None
        self._history: list[dict[str, Any]] = []
        self._submitted = set[int]()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint was written: rank 0 submits it."""
        if not state.is_world_process_zero or state.global_step in self._submitted:
            return
        self._submitted.add(state.global_step)
        path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        for kind in self._kinds:
            self._submitter.submit(path, state.global_step, kind)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Now and then: log what has arrived."""
        if state.is_world_process_zero:
            self._log(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for what is outstanding, for as long as that may take, and log it."""
        if not state.is_world_process_zero:
            return
        self._submitter.drain(self._drain_s)
        self._log(args, state)
        for logger in (self._loggers or {}).values():
            with suppress(Exception):  # a logger that cannot close does not end a training
                logger.close()
        self._loggers = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Every other event of a trainer, of which nothing is to be done."""
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(name)

    def _log(self, args: Any, state: Any) -> None:
        arrived = [result for result in self._submitter.results() if result.rows]
        if not arrived:
            return
        try:
            _append(Path(args.output_dir) / NAME, arrived, str(args.output_dir))
        except OSError as error:
            _LOG.warning("%s cannot be written: %s", NAME, error)
        for result in arrived:
            state.log_history.append({**_named(result), "step": result.step})
        self._to_loggers(Path(args.output_dir), arrived)

    def _to_loggers(self, run: Path, arrived: list[Result]) -> None:
        from reshard.evaluate.loggers import Point, open_logger

        points = [
            Point(result.step, name, value, time.time()) for result in arrived for name, value in _named(result).items()
        ]
        if self._loggers is None:
            self._loggers = {}
        for name, options in self._options.items():
            try:
                if name not in self._loggers:
                    self._loggers[name] = open_logger(name, run, run, options)
                self._loggers[name].log(points)
            except Exception as error:  # whatever a logger does, training goes on
                _LOG.warning("%s does not take the results of an evaluation: %s", name, error)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _named(result: Result) -> Mapping[str, float]:
    """Metrics as loggers name them: `eval/TASK/METRIC`."""
    group = "eval" if result.kind == "regular" else f"eval_{result.kind}"
    return {f"{group}/{name}": value for name, value in result.metrics.items()}


def _append(path: Path, results: list[Result], run: str) -> None:
    """A line for every metric, as the watcher writes it; on the disk when this returns."""
    from reshard.evaluate.log import line_of
    from reshard.evaluate.records import Result as Row

    rows = [
        Row(run, result.step, result.kind, task, metric, filter, value, "", 0, time.time(), True)
        for result in results
        for task, metric, filter, value in result.rows
    ]
    with path.open("ab") as file:
        file.write(b"".join(map(line_of, rows)))
        file.flush()
        os.fsync(file.fileno())
