"""lmms-eval's protocol: what a request is, and what is said of a job.

    POST /evaluate  {"model", "tasks", "model_args", ..., "output_dir"}, and ours: "step", "checkpoint_type", "timeout"
    GET /jobs/ID    {"job_id", "status", "created_at", ..., "request", "result", "error", "position_in_queue"}

Times are local and have no zone. Fields that nobody knows are passed over, as lmms-eval does; one that is known and has
another type is refused, in FastAPI's form. `lmms_engine_kwargs` is what LMMs-Engine's trainer sends along.
Source: lmms-eval 0.7.3 `entrypoints/protocol.py`, lmms-engine 0.1.4 `train/config.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from reshard.evaluate.records import Job, State

LIMIT_NBYTES = 1 << 20
STATUSES = {
    State.QUEUED: "queued", State.SUBMITTING: "running", State.RUNNING: "running", State.DONE: "completed",
    State.CANCELLED: "cancelled",
}  # fmt: skip
"""lmms-eval's words; every other state is failed."""
_LARGEST = 1 << 53
"""Beyond it JSON's integers are not the same for everybody."""
_NO_DEFAULT = object()


class Invalid(Exception):
    """A body that cannot be decoded; `detail` is what the client is told."""

    def __init__(self, detail: list[dict[str, Any]]) -> None:
        super().__init__(detail)
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Field:
    types: tuple[type, ...]
    expected: str
    default: Any = _NO_DEFAULT


_TEXT = _Field((str,), "a string")
_NO_TEXT = _Field((str,), "a string", None)
EVALUATE = {
    "model": _TEXT,
    "tasks": _Field((list,), "a list of strings"),
    "model_args": _Field((dict,), "an object", None),
    "num_fewshot": _Field((int,), "an integer", None),
    "batch_size": _Field((int, str), "an integer or a string", None),
    "device": _NO_TEXT,
    "limit": _Field((int, float), "a number", None),
    "gen_kwargs": _NO_TEXT,
    "log_samples": _Field((bool,), "true or false", True),
    "predict_only": _Field((bool,), "true or false", False),
    "num_gpus": _Field((int,), "an integer", 1),
    "output_dir": _NO_TEXT,
}
OURS = {
    "lmms_engine_kwargs": _Field((dict,), "an object", None),
    "step": _Field((int,), "an integer, from 0", None),
    "checkpoint_type": _Field((str,), "'regular' or 'ema'", None),
    "timeout": _Field((int, float), "a number of seconds", None),
}
MERGE = {
    "checkpoint_path": _TEXT,
    "output_path": _NO_TEXT,
    "checkpoint_type": _Field((str,), "'regular' or 'ema'", "regular"),
}


def decoded(data: bytes, fields: Mapping[str, _Field]) -> dict[str, Any]:
    """The fields of a body, defaults filled in. Raises Invalid with everything that is wrong."""
    try:
        body = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Invalid([_wrong("json_invalid", ["body"], f"JSON decode error: {error}", None)]) from error
    if not isinstance(body, dict):
        raise Invalid([_wrong("model_attributes_type", ["body"], "Input should be an object", None)])
    values, wrong = dict[str, Any](), list[dict[str, Any]]()
    for name, field in fields.items():
        value = body.get(name)
        if name not in body or (value is None and field.default is not _NO_DEFAULT):
            if field.default is _NO_DEFAULT:
                wrong.append(_wrong("missing", ["body", name], "Field required", body))
            values[name] = field.default
        elif not _fits(value, field):
            wrong.append(_wrong("type_error", ["body", name], f"Input should be {field.expected}", value))
        else:
            values[name] = value
    if wrong:
        raise Invalid(wrong)
    return values


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _fits(value: Any, field: _Field) -> bool:
    if isinstance(value, bool) and bool not in field.types:
        return False
    if "'ema'" in field.expected:
        return value in ("regular", "ema")
    if isinstance(value, int) and abs(value) > _LARGEST:
        return False
    if field.expected.endswith("from 0"):
        return isinstance(value, int) and value >= 0
    if isinstance(value, list):
        return list in field.types and bool(value) and all(isinstance(part, str) and part for part in value)
    if isinstance(value, str):
        return str in field.types and "\0" not in value
    return isinstance(value, field.types)


def _wrong(kind: str, where: list[str], message: str, value: Any) -> dict[str, Any]:
    return {"type": kind, "loc": where, "msg": message, "input": value}


# ------------------------------------------------------------------------------------------------------ what is said


def status_of(job: Job) -> str:
    """One of lmms-eval's five words."""
    return STATUSES.get(job.state, "failed")


def job_info(job: Job, position: int) -> dict[str, Any]:
    """What is said of a job: lmms-eval's fields, and the metrics, the step and where the log is."""
    payload = job.payload
    status = status_of(job)
    return {
        "job_id": job.fingerprint, "status": status, "created_at": _time(job.created),
        "started_at": _time(payload.get("started") or 0.0),
        "completed_at": _time(job.changed) if job.is_final else None,
        "request": payload["request"], "result": payload.get("result"),
        "error": None if status in ("queued", "running", "completed") else job.reason or status,
        "position_in_queue": position, "step": None if job.step < 0 else job.step,
        "metrics": payload.get("metrics") or [], "output": job.output or None, "merged_from": payload["source"],
        "attempts": job.attempts,
    }  # fmt: skip


def _time(seconds: float) -> str | None:
    return datetime.fromtimestamp(seconds).isoformat() if seconds else None
