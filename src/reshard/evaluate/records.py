"""What is known of evaluations, as values: jobs, their attempts, their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from reshard.evaluate.metrics import metric_name


class State(StrEnum):
    """Where a job is."""

    SEEN = "seen"
    """A checkpoint that is wanted and not whole yet."""
    READY = "ready"
    """Whole, and its shards are held."""
    MERGED = "merged"
    SUBMITTING = "submitting"
    """May have been sent: it is looked for before it is sent (again)."""
    QUEUED = "queued"
    RUNNING = "running"
    MEASURED = "measured"
    """Its results are here, and not in evals.jsonl yet."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    """The checkpoint was removed before it could be held."""
    SUPERSEDED = "superseded"
    """The step was saved again, with other weights, before this was logged."""
    SAME = "same"
    """The step was saved again with the weights that it had: the earlier job counts."""
    REWRITTEN = "rewritten"
    """The step was saved again with other weights after its results had been logged: they stand."""


FINAL = frozenset({
    State.DONE, State.FAILED, State.CANCELLED, State.TIMED_OUT, State.LOST, State.SUPERSEDED, State.SAME,
    State.REWRITTEN,
})  # fmt: skip
"""States that a job stays in."""
OPEN = frozenset(State) - FINAL


@dataclass(frozen=True, slots=True)
class Key:
    """What one evaluation is of."""

    run: str
    step: int
    kind: str = "regular"
    """`regular` or `ema`."""
    fingerprint: str = ""
    """Of the shards; empty while they are not whole. The server has its own id of the job here."""


@dataclass(frozen=True, slots=True)
class Job:
    """One row of `jobs`."""

    id: int
    run: str
    step: int
    kind: str
    fingerprint: str
    state: State
    reason: str
    """Why it is in this state, for people."""
    attempts: int
    """Begun so far; the number of the last one."""
    failures: int
    """Attempts that count against the retries."""
    job_id: str
    """The backend's, of the last attempt."""
    output: str
    """The directory of the last attempt."""
    source: str
    """The checkpoint."""
    held: str
    """Where its shards are kept from being deleted; empty when they are not."""
    merged: str
    """The whole model; empty when there is none (any more)."""
    digest: str
    """Of the weights, once merged: the same weights have the same."""
    files: Mapping[str, Any]
    """Of the shards: [size, mtime_ns] by path relative to the checkpoint."""
    payload: Mapping[str, Any]
    """Whatever else the owner of the queue keeps."""
    not_before: float
    """When it may be taken up (again), in seconds since the epoch."""
    created: float
    changed: float
    began: float
    """When the last attempt was submitted; 0 before."""
    owner: str
    expires: float

    @property
    def key(self) -> Key:
        return Key(self.run, self.step, self.kind, self.fingerprint)

    @property
    def is_final(self) -> bool:
        return self.state in FINAL


@dataclass(frozen=True, slots=True)
class Attempt:
    """One row of `attempts`."""

    job: int
    number: int
    output: str
    """Empty when it was removed."""
    job_id: str
    state: str
    """Of a job that is under way: `submitting` or `running`; else how it ended."""
    reason: str
    began: float
    ended: float
    """0 while it is under way."""


@dataclass(frozen=True, slots=True)
class Result:
    """One row of `results`."""

    run: str
    step: int
    kind: str
    task: str
    metric: str
    filter: str
    value: float
    fingerprint: str
    job: int
    time: float
    """When it was collected, in seconds since the epoch."""
    logged: bool
    """Whether it is in evals.jsonl."""

    @property
    def name(self) -> str:
        return metric_name(self.task, self.metric, self.filter)

    @property
    def key(self) -> tuple[str, int, str, str, str, str]:
        return self.run, self.step, self.kind, self.task, self.metric, self.filter


@dataclass(frozen=True, slots=True)
class New:
    """What is known of a job when it is added."""

    key: Key
    state: State
    source: str = ""
    reason: str = ""
    files: Mapping[str, Any] = field(default_factory=dict)
    payload: Mapping[str, Any] = field(default_factory=dict)


__all__ = ["FINAL", "OPEN", "Attempt", "Job", "Key", "New", "Result", "State"]
