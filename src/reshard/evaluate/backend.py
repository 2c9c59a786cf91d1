"""What evaluates: a backend takes a whole model and answers, later, with metrics.

A backend is a module in `backends` with `make(config) -> Backend`. It keeps nothing that matters in memory: the caller
writes the request down before it is sent and the id when it is known, so `poll`, `cancel` and `recover` must work in a
process that was started after the one that called `submit` was killed.

The output directory belongs to one attempt alone. It exists and is empty when `submit` is called; whatever is found in
it later, was made by this attempt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from reshard.errors import ReshardError
from reshard.evaluate.metrics import Metric

if TYPE_CHECKING:
    from reshard.evaluate.config import EvalConfig


class Phase(StrEnum):
    """How far an evaluation is."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    """With metrics that were validated: they are of this request's model, and none of an earlier attempt's."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    MISSING = "missing"
    """Certainly not under way and nothing to be found of it: it may be sent again."""
    UNKNOWN = "unknown"
    """It cannot be told now, because nobody answers: ask again later."""


@dataclass(frozen=True, slots=True)
class Request:
    """One attempt to evaluate one model."""

    model: Path
    """The directory of the whole model."""
    step: int
    """Of training."""
    kind: str
    """`regular` or `ema`."""
    output: Path
    """An empty directory of this attempt alone."""
    attempt: int
    """From 1."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What a process that evaluates gets on top of ours, such as CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a backend knows of an evaluation."""

    phase: Phase
    reason: str = ""
    """Why it failed, was cancelled, or is not known; for people."""
    metrics: tuple[Metric, ...] = ()
    """Of one that completed."""
    files: tuple[Path, ...] = ()
    """Where the results, samples and logs of one that ended are."""
    job_id: str | None = None
    """Of one that `recover` found under way."""
    permanent: bool = False
    """Of one that failed: trying again is of no use."""


class Unavailable(ReshardError):
    """Nobody answers at the backend. Nothing is lost: the same call is made again later."""


class Refused(ReshardError):
    """The backend will never take this request: a task or a setting that it does not know."""


class Backend(Protocol):
    """What evaluates. Every call returns or raises within seconds; none waits for an evaluation."""

    def check(self, tasks: Sequence[str]) -> Sequence[str]:
        """The tasks that this backend does not know; empty also where it cannot tell. Raises Unavailable."""

    def submit(self, request: Request) -> str:
        """Have a model evaluated; gives the id of the job.

        Raises Refused, or Unavailable; after Unavailable it may have been sent nevertheless, and `recover` is asked
        before anything is sent again.
        """

    def poll(self, request: Request, job_id: str) -> Status:
        """How far it is. MISSING when the backend has no such job (any more): `recover` is asked next."""

    def cancel(self, request: Request, job_id: str) -> None:
        """Stop it, as far as the backend can. Of one that ended already this says nothing."""

    def recover(self, request: Request) -> Status:
        """What became of a request that may have been sent, whose id is not known or not known to the backend.

        It looks in the request's output directory first: COMPLETED with what is there and valid, RUNNING with its id
        when it is under way, MISSING when it may be sent again, UNKNOWN when that cannot be told yet.
        """


def make_backend(config: EvalConfig) -> Backend:
    """The backend that the settings name."""
    module = import_module(f"reshard.evaluate.backends.{config.backend}")
    backend: Backend = module.make(config)
    return backend
