"""What a request will evaluate, decided before it is queued: which model, merged or as it is, and where to.

Everything that can be told now is an error now: a path outside the roots, a checkpoint that is not there, a task that
the harness does not know, a setting that it would misunderstand.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from reshard.errors import InputError, ReshardError, listed
from reshard.evaluate.backend import Refused, Request
from reshard.evaluate.backends.catalogue import Catalogue
from reshard.evaluate.backends.command import Command
from reshard.evaluate.backends.harness import PATH_KEYS, settled
from reshard.evaluate.backends.lm_eval import LmEval
from reshard.evaluate.backends.lmms_program import LmmsEval
from reshard.evaluate.backends.program import Harness
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.serve.settings import ServeSettings, devices_of_slots
from reshard.formats.detect import EMA, MODEL, find

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WHOLE = ("huggingface", "torch_save")
_STEP = re.compile(r"(?:checkpoint|step|global_step|iter|epoch)[-_]?(\d+)")


class NotAdmitted(ReshardError):
    """A request that is not queued; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


@dataclass(frozen=True, slots=True)
class Admitted:
    """What is known of a job when it is queued."""

    key: str
    """Which of `model_args` is the model."""
    model: str
    """A path, or a name on the hub."""
    source: str
    """The checkpoint that is merged first; empty when the model is evaluated as it is."""
    merged_to: str
    """Where the request wants the merged model; empty when that is nobody's business."""
    kind: str
    step: int
    """-1 when nothing tells."""
    run: str


def admit(values: Mapping[str, Any], settings: ServeSettings, catalogue: Catalogue | None) -> Admitted:
    """What a request will evaluate. Raises NotAdmitted. `catalogue` is None as long as nobody knows it."""
    model_args = values["model_args"] or {}
    _check_settings(values, model_args, settings)
    engine = values["lmms_engine_kwargs"] or {}
    key, model = _model_of(model_args, engine)
    path = _local(model)
    source = _text(engine, "model_path") or model
    kind = _text(engine, "checkpoint_type") or values["checkpoint_type"] or "regular"
    if kind not in ("regular", "ema"):
        raise NotAdmitted(f"checkpoint_type: {kind!r} is neither 'regular' nor 'ema'", 422)
    if engine or path is not None:
        model = source = str(existing(source, settings))
    is_merged = needs_merge(Path(source), asked=bool(engine), kind=kind) if engine or path is not None else False
    merged_to = _text(engine, "output_path")
    if merged_to:
        inside(merged_to, settings)
    if values["output_dir"]:
        inside(values["output_dir"], settings)
    admitted = Admitted(
        key, model, source if is_merged else "", merged_to, kind, _step(values["step"], source), _run(source)
    )
    _check_harness(values, admitted, settings, catalogue)
    return admitted


def needs_merge(path: Path, *, asked: bool, kind: str) -> bool:
    """Whether the weights of this kind are shards, rather than the whole model that is at the path already.

    Of what is neither that says who asks: it may be shards that are still written.
    """
    try:
        found = find(path)
    except InputError:
        return asked
    part = found.part(MODEL)
    is_sharded = part is not None and part.format not in _WHOLE
    return is_sharded or (kind == "ema" and found.part(EMA) is not None)


def harness_of(values: Mapping[str, Any], key: str, settings: ServeSettings) -> Harness:
    """What evaluates a request."""
    names = ("model", "num_fewshot", "batch_size", "device", "limit", "gen_kwargs", "log_samples", "predict_only")
    asked = {name: values[name] for name in names}
    model_args = {name: value for name, value in (values["model_args"] or {}).items() if name != key}
    config = EvalConfig(
        backend=settings.backend, command=settings.command, tasks=tuple(values["tasks"]), checkpoint_key=key,
        model_args=model_args, include_path=settings.include_path, num_gpus=values["num_gpus"], **asked,
    )  # fmt: skip
    config = settled(config)
    if settings.backend == "command":
        return Command(settings.command, config.tasks)
    python = {"python": settings.python} if settings.python else {}
    return LmEval(config, **python) if settings.backend == "lm_eval" else LmmsEval(config, **python)


# ------------------------------------------------------------------------------------------------------------ paths


def inside(path: str | Path, settings: ServeSettings) -> Path:
    """A path as it really is. Raises NotAdmitted when that is outside the roots, links followed."""
    try:
        real = Path(os.path.realpath(path))
        real.exists()
    except (ValueError, OSError) as error:  # a byte that no name has, or too many of them
        raise NotAdmitted(f"{str(path)[:200]!r} is no path: {getattr(error, 'strerror', None) or error}") from error
    if not os.path.isabs(path):
        raise NotAdmitted(f"{path}: a path from the root directory is expected", 403)
    if not any(real == root or real.is_relative_to(root) for root in settings.roots):
        raise NotAdmitted(
            f"{path} is outside the directories that this server works in", 403,
            hint=f"its --root are {listed(str(root) for root in settings.roots)}",
        )  # fmt: skip
    return real


def existing(path: str | Path, settings: ServeSettings) -> Path:
    """The same, of something that is there. Raises NotAdmitted when it is not."""
    real = inside(path, settings)
    if not real.exists():
        raise NotAdmitted(f"{path}: no such file or directory")
    return real


def _local(model: str) -> Path | None:
    """A model as a path; None when it is a name on the hub."""
    return None if _HUB_ID.fullmatch(model) and not os.path.exists(model) else Path(model)


def _paths_in(value: Any) -> Iterator[str]:
    """Everything in a setting that may be a path."""
    if isinstance(value, str):
        if value.startswith(("/", ".", "~")) or "/.." in value or "://" in value or os.path.exists(value):
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _paths_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths_in(inner)


# ----------------------------------------------------------------------------------------------------------- checks


def _check_settings(values: Mapping[str, Any], model_args: Mapping[str, Any], settings: ServeSettings) -> None:
    if not re.fullmatch(r"[\w.-]+", values["model"]) or values["model"].startswith("-"):
        raise NotAdmitted(f"model: {values['model']!r} is no name of a kind of model")
    wrong = [task for task in values["tasks"] if not re.fullmatch(r"[\w.*?@:+-]+", task) or task.startswith("-")]
    if wrong:
        raise NotAdmitted(f"tasks: {listed(map(repr, wrong))}: names of tasks are expected, no paths")
    if values["timeout"] is not None and values["timeout"] <= 0:
        raise NotAdmitted(f"timeout: {values['timeout']}: more than 0 seconds are expected")
    devices = devices_of_slots(settings.slots)[0]
    num_devices = len(devices.split(",")) if devices else 0
    if devices and (values["num_gpus"] or 1) > num_devices:
        raise NotAdmitted(f"num_gpus: {values['num_gpus']} are wanted, a slot of this server has {num_devices}")
    if str(model_args.get("trust_remote_code", "")).lower() in ("true", "1") and not settings.trust_remote_code:
        raise NotAdmitted("trust_remote_code: this server does not", 403, hint="start it with --trust-remote-code")
    for name, value in model_args.items():
        if not re.fullmatch(r"\w+", name):
            raise NotAdmitted(f"model_args: {name!r} is no name of a setting")
        for path in _paths_in(value):
            if path.startswith("~") or "://" in path:
                raise NotAdmitted(f"model_args: {name}: {path}: a path from the root directory is expected", 403)
            inside(path, settings)


def _model_of(model_args: Mapping[str, Any], engine: Mapping[str, Any]) -> tuple[str, str]:
    """(which of the settings is the model, what it is)."""
    named = [key for key in PATH_KEYS if isinstance(model_args.get(key), str)]
    asked = _text(engine, "model_path")
    same = [key for key in named if model_args[key] == asked]
    if asked:
        return (same or named or ["pretrained"])[0], asked
    if not named:
        raise NotAdmitted(f"model_args: there is no model in it; it is looked for in {listed(PATH_KEYS)}")
    paths = [key for key in named if _local(model_args[key]) is not None]
    key = next((key for key in ("pretrained", "model") if key in paths), (paths or named)[0])
    return key, model_args[key]


def _check_harness(
    values: Mapping[str, Any], admitted: Admitted, settings: ServeSettings, catalogue: Catalogue | None
) -> None:
    unknown = catalogue.unknown(values["tasks"]) if catalogue else []
    if catalogue and unknown:
        near = [match for task in unknown for match in get_close_matches(task, catalogue.tasks, 1, 0.6)]
        raise NotAdmitted(
            f"tasks: {settings.backend} knows no {listed(unknown)}", hint=f"did you mean {near[0]}?" if near else None
        )
    if catalogue and catalogue.models and values["model"] not in catalogue.models:
        near = get_close_matches(values["model"], catalogue.models, 1, 0.5)
        raise NotAdmitted(
            f"model: {settings.backend} knows no {values['model']!r}", hint=f"did you mean {near[0]}?" if near else None
        )
    target = Path(admitted.model if not admitted.source else settings.merged / "x" / Path(admitted.source).name)
    try:
        harness_of(values, admitted.key, settings).command(
            Request(target, admitted.step, admitted.kind, settings.jobs / "x", 1)
        )
    except (Refused, InputError) as error:
        raise NotAdmitted(str(error), hint=error.hint) from error


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise NotAdmitted(f"lmms_engine_kwargs: {name}: a string is expected, it is {value!r:.80}", 422)
    return value


def _step(asked: int | None, model: str) -> int:
    """The step of training: as the request says, or as the checkpoint's directory is called."""
    if asked is not None:
        return asked
    for part in reversed(Path(model).parts[-2:]):
        if match := _STEP.fullmatch(part):
            return int(match[1])
    return -1


def _run(model: str) -> str:
    """What the checkpoints of one run have in common: the directory that they are in."""
    path = Path(model)
    parts = [place for place in (path, path.parent) if _STEP.fullmatch(place.name)]
    return str((parts or [path])[-1].parent) if path.is_absolute() else model
