"""The settings of an evaluation, as LMMs-Engine's users write them, and ours beside them.

    eval_strategy: steps            at the top level, or under `trainer_args`
    eval_steps: 500
    eval_config: {server_url: ..., tasks: [...], ...}

A key that nobody knows is refused with the nearest one that is known; of everything else in a trainer's file nothing is
looked at. Source: lmms-engine 0.1.4 `train/config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from reshard.core.dtypes import dtype as named_dtype
from reshard.errors import InputError, NotFound, listed

_LIMIT_NBYTES = 1 << 20
_LONGEST_S = 366 * 24 * 3600.0
Kinds = Literal["regular", "ema", "both"]
KeepMerged = Literal["none", "last", "best", "all"]
KeepAttempts = Literal["last", "all"]
BACKENDS = ("lmms_eval", "lm_eval", "command")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """All settings. The names of the first block are LMMs-Engine's."""

    server_url: str = "http://127.0.0.1:8000"
    """Of an lmms-eval server, or of `reshard serve`."""
    poll_interval: float = 10.0
    """Seconds between two looks at the run and at the jobs."""
    checkpoint_key: str = "model"
    """Which of `model_args` receives the path of the whole model."""
    checkpoint_type: Kinds = "regular"
    model: str = "vllm"
    """The harness's name of the kind of model."""
    tasks: tuple[str, ...] = ()
    model_args: Mapping[str, Any] = field(default_factory=dict)
    num_fewshot: int | None = None
    batch_size: int | str | None = None
    device: str | None = None
    limit: int | float | None = None
    gen_kwargs: str | None = None
    log_samples: bool = True
    predict_only: bool = False
    num_gpus: int | None = None
    extra_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the request, or more options of lm_eval."""

    backend: str = "lmms_eval"
    """`lmms_eval`, `lm_eval` or `command`."""
    command: str | tuple[str, ...] = ()
    """With {model}, {step}, {kind} and {output} in it; leaves metrics in {output}/results.json."""
    include_path: str | None = None
    """Of lm_eval: a directory of further tasks."""
    server_token: str | None = None
    """The bearer token of the server; `$NAME` takes it from the environment."""
    timeout: float = 24 * 3600.0
    """Seconds that one attempt may take."""
    retries: int = 2
    """Attempts after the first, of one that failed as `retry_on` says."""
    retry_wait: float = 60.0
    """Seconds before the second attempt; twice as long before each further one."""
    retry_on: tuple[str, ...] = ("failed", "timed_out")
    """Which ends are tried again: failed, timed_out, cancelled."""
    max_running: int | None = None
    """Evaluations that one watcher has under way; by default 1, and 2 with a server, which has a queue."""
    keep_merged: KeepMerged = "none"
    """Which whole models stay when they are evaluated."""
    keep_best: int = 1
    """How many, with `keep_merged: best`."""
    best_metric: str | None = None
    """TASK/METRIC that says which is best."""
    best_mode: Literal["max", "min"] = "max"
    remove_shards: bool = False
    """With `keep_merged: best`: remove the shards of steps that were evaluated and are none of the best, but for the
    newest checkpoint."""
    keep_attempts: KeepAttempts = "last"
    """Of which attempts at a step the output directory stays: `last` keeps the one that counted, or that failed
    last."""
    max_merged_size: str | None = None
    """Of all whole models together, as in 500GB: a merge that would pass it waits."""
    base: str | None = None
    """Where config and tokenizer come from when a checkpoint has none."""
    dtype: str | None = None
    """What floating-point weights are cast to; by default they stay as they are."""
    loggers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """tensorboard, wandb, mlflow, trackio; each with its own settings."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(
                f"backend: {self.backend!r} is none of {listed(BACKENDS)}{_nearest(self.backend, BACKENDS)}"
            )
        if self.backend == "command" and not self.command:
            raise InputError("backend: command wants a command", hint='command: "my-eval {model} --out {output}"')
        if self.backend != "command" and not self.tasks:
            raise InputError(f"tasks: the backend {self.backend} wants at least one task")
        for name in ("poll_interval", "timeout", "retry_wait"):
            if not getattr(self, name) <= _LONGEST_S:  # NaN too
                raise InputError(f"{name}: {getattr(self, name)} seconds; a year at most is expected")
        for name in ("poll_interval", "timeout"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}: {getattr(self, name)} seconds; more than 0 are expected")
        for name, least in (("retries", 0), ("retry_wait", 0), ("keep_best", 1), ("max_running", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}: {value}; at least {least} is expected")
        wrong = set(self.retry_on) - {"failed", "timed_out", "cancelled"}
        if wrong:
            raise InputError(f"retry_on: {listed(sorted(wrong))}; failed, timed_out and cancelled are known")
        if self.keep_merged == "best" and self.best_metric is None:
            raise InputError("keep_merged: best wants best_metric", hint="best_metric: TASK/METRIC")
        if self.remove_shards and self.keep_merged != "best":
            raise InputError("remove_shards: it wants keep_merged: best, which says which shards stay")
        if self.max_merged_size is not None:
            _ = self.max_merged_nbytes
        if self.dtype is not None:
            named_dtype(self.dtype)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The sets of weights that are evaluated."""
        return ("regular", "ema") if self.checkpoint_type == "both" else (self.checkpoint_type,)

    @property
    def max_merged_nbytes(self) -> int | None:
        if self.max_merged_size is None:
            return None
        from reshard.formats.huggingface import parse_size

        return parse_size(self.max_merged_size)

    @property
    def most_running(self) -> int:
        """Evaluations that one watcher has under way."""
        return self.max_running or (2 if self.backend == "lmms_eval" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Which steps are evaluated."""

    strategy: Literal["steps", "epoch", "no"] = "steps"
    """`epoch` takes every checkpoint, as LMMs-Engine does."""
    steps: int | None = None
    """Every so many; None takes every checkpoint."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise InputError(f"eval_steps: {self.steps}; a number of steps is expected, from 1")

    def wants(self, step: int) -> bool:
        if self.strategy == "no":
            return False
        return self.strategy == "epoch" or self.steps is None or step % self.steps == 0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a file of settings says."""

    schedule: Schedule
    evaluation: EvalConfig


def read_settings(path: Path) -> Settings:
    """The settings of a YAML file. Raises InputError with line and column where it is none."""
    import yaml

    from reshard.formats.yaml_bounds import loaded

    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    if path.stat().st_size > _LIMIT_NBYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes: no file of settings")
    try:
        document = loaded(path.read_bytes(), _loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise InputError(f"{path}: {error}") from error
    try:
        return settings_of(document)
    except InputError as error:
        raise InputError(f"{path}: {error}", hint=error.hint) from error


def _loader() -> Any:
    """YAML's safe loader, which also refuses a key that is there twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set[str]()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        problem = f"the key {key.value!r} is there twice"
                        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def settings_of(document: Any) -> Settings:
    """The settings in a document, at the top level or under `trainer_args`; a list of such blocks has one."""
    blocks = [block for block in _blocks(document) if "eval_config" in block]
    if not blocks:
        known = ("eval_config", "trainer_args")
        said = _nearest_of(document, known) if isinstance(document, Mapping) else ""
        raise InputError(
            f"there is no eval_config, at the top level or under trainer_args{said}",
            hint="eval_config: {tasks: [...], ...}, beside eval_strategy and eval_steps",
        )
    if len(blocks) > 1:
        raise InputError("eval_config is there twice")
    block = blocks[0]
    for key in (key for key in block if isinstance(key, str) and key not in _EVAL_KEYS):
        close = get_close_matches(key, _EVAL_KEYS[:3], 1, 0.8)
        if close:
            raise InputError(f"unknown key {key}; did you mean {close[0]}?")
    schedule = Schedule(strategy=_strategy(block.get("eval_strategy")), steps=_steps(block.get("eval_steps")))
    return Settings(schedule, config_of(block["eval_config"]))


_EVAL_KEYS = (
    "eval_strategy", "eval_steps", "eval_config", "eval_delay", "eval_accumulation_steps", "eval_on_start",
    "eval_do_concat_batches", "eval_use_gather_object", "eval_dataset",
)  # fmt: skip
"""Ours, then those of HuggingFace's trainer that look alike."""


def _blocks(document: Any) -> Iterator[Mapping[str, Any]]:
    """Where settings may be: LMMs-Engine's files are a list of components, or one."""
    left, seen = [document], set[int]()
    while left:
        part = left.pop(0)
        if id(part) in seen:  # an alias of what it is in itself
            continue
        seen.add(id(part))
        if isinstance(part, list) and part is document:
            left += part
        if isinstance(part, Mapping):
            yield part
            left += [part[name] for name in ("trainer_args", "config") if isinstance(part.get(name), Mapping)]


def _strategy(value: Any) -> Literal["steps", "epoch", "no"]:
    match value:
        case None | "steps":
            return "steps"
        case "epoch":
            return "epoch"
        case "no" | False:  # YAML's `no` is a truth value
            return "no"
    raise InputError(f"eval_strategy: {value!r} is none of steps, epoch, no")


def _steps(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, float) and 0 < value < 1:
        raise InputError(f"eval_steps: {value} of all steps; a number of steps is expected", hint="eval_steps: 500")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value % 1:
        raise InputError(f"eval_steps: {value!r}; a number of steps is expected")
    return int(value)


def config_of(values: Any) -> EvalConfig:
    """The settings in a mapping. Raises InputError that names every unknown key and the nearest known one."""
    if not isinstance(values, Mapping):
        raise InputError(f"eval_config: settings are expected, it is a {type(values).__name__}")
    known = [f.name for f in fields(EvalConfig)]
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise InputError("; ".join(f"eval_config: unknown key {key}{_nearest(key, known)}" for key in unknown))
    hints = get_type_hints(EvalConfig)
    chosen = {key: _decoded(key, value, hints[key]) for key, value in values.items() if value is not None}
    if "keep_best" in chosen and "keep_merged" not in chosen:
        chosen["keep_merged"] = "best"
    return EvalConfig(**chosen)


def _decoded(key: str, value: Any, hint: Any) -> Any:
    """A value as the type of its field."""
    if key == "loggers":
        return _loggers(value)
    if key in ("tasks", "retry_on") and isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
    import msgspec

    try:
        decoded = msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        wanted = f"one of {listed(get_args(hint))}" if get_args(hint) and isinstance(get_args(hint)[0], str) else ""
        raise InputError(
            f"eval_config: {key}: {wanted or str(error)[0].lower() + str(error)[1:]}; it is {value!r:.80}"
        ) from error
    return decoded


def _loggers(value: Any) -> dict[str, dict[str, Any]]:
    """A name, a list of names, or a mapping of names to settings."""
    from reshard.evaluate.loggers import LOGGERS

    if isinstance(value, str):
        value = [value]
    if isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
        value = dict.fromkeys(value)
    if not isinstance(value, Mapping) or not all(isinstance(v, Mapping | None) for v in value.values()):
        raise InputError(f"eval_config: loggers: names are expected, or names with settings; it is {value!r:.80}")
    for name in value:
        if name not in LOGGERS:
            raise InputError(
                f"eval_config: loggers: {name!r} is none of {listed(LOGGERS)}{_nearest(str(name), LOGGERS)}"
            )
    return {str(name): dict(options or {}) for name, options in value.items()}


def _nearest(word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest_of(words: Mapping[Any, Any], known: Sequence[str]) -> str:
    """The first of several words that is nearly a known one."""
    return next((f" ({word}{said})" for word in words if (said := _nearest(str(word), known))), "")


__all__ = ["BACKENDS", "EvalConfig", "Schedule", "Settings", "config_of", "read_settings", "settings_of"]
