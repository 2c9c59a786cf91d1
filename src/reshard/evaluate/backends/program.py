"""A backend that runs a program for each request.

Which program, and what it leaves, is a `Harness`. Its process is a group of its own that outlives whoever started it.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from reshard.errors import ReshardError
from reshard.evaluate import process
from reshard.evaluate.backend import Phase, Refused, Request, Status, Unavailable
from reshard.evaluate.backends.catalogue import Catalogue
from reshard.evaluate.metrics import Metric

_NOT_FOUND = (126, 127)
"""What a shell's exit status is where there is no such program, or none that may be run."""
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""What a machine has no more of, and may have again."""


class Harness(Protocol):
    """What is run, and what it leaves."""

    @property
    def catalogue(self) -> Catalogue:
        """What it knows. The first time this takes as long as importing it."""

    def command(self, request: Request) -> Sequence[str]:
        """The command line. Raises Refused for what will never be evaluated."""

    def collect(self, request: Request) -> tuple[tuple[Metric, ...], tuple[Path, ...]]:
        """The metrics and the files of an evaluation that ended well. Raises InputError where they are not valid."""


class Program:
    """A process for each request."""

    def __init__(self, harness: Harness, before: Sequence[Sequence[str]] = ()) -> None:
        self._harness = harness
        self._before = before
        """Commands that have to end well first."""

    def check(self, tasks: Sequence[str]) -> Sequence[str]:
        return self._harness.catalogue.unknown(tasks)

    def submit(self, request: Request) -> str:
        words = _chained([*self._before, self._harness.command(request)])
        try:
            return str(process.start(words, request.output, request.environment))
        except OSError as error:
            said = f"{error.filename or words[0]}: {error.strerror or error}"
            raise (Unavailable if error.errno in _PASSING else Refused)(said) from error
        except ValueError as error:
            raise Refused(f"{words[0]}: {error}") from error

    def poll(self, request: Request, job_id: str) -> Status:
        seen = process.look(request.output)
        if seen is None:
            return Status(Phase.MISSING, f"nothing was started in {request.output}")
        if seen.is_running:
            return Status(Phase.RUNNING, job_id=job_id)
        if seen.status is None:
            return Status(Phase.MISSING, "it was killed, or the machine went down")
        if seen.status != 0:
            return Status(
                Phase.FAILED, f"exit status {seen.status}: {seen.last_words()}", files=(seen.log,),
                permanent=seen.status in _NOT_FOUND,
            )  # fmt: skip
        return self._completed(request, seen)

    def cancel(self, request: Request, job_id: str) -> None:
        process.kill(request.output)

    def recover(self, request: Request) -> Status:
        return self.poll(request, "")

    def _completed(self, request: Request, seen: process.Seen) -> Status:
        try:
            metrics, files = self._harness.collect(request)
        except ReshardError as error:
            return Status(Phase.FAILED, f"exit status 0, and {error}: {seen.last_words()}", files=(seen.log,))
        return Status(Phase.COMPLETED, metrics=metrics, files=(*files, seen.log))


def _chained(commands: Sequence[Sequence[str]]) -> list[str]:
    """One command that runs several, each if all before it ended well."""
    if len(commands) == 1:
        return list(commands[0])
    *before, last = map(shlex.join, commands)
    return ["/bin/sh", "-c", " && ".join([*before, f"exec {last}"])]


def launcher(python: str, module: str, num_gpus: int | None) -> list[str]:
    """The words that run a harness's module, on several GPUs as one process each."""
    if num_gpus is None or num_gpus < 2:
        return [python, "-m", module]
    return [
        python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
        "--num_processes", str(num_gpus), "-m", module,
    ]  # fmt: skip


def absolute(word: str) -> str:
    """A program that is named by a relative path, as it is found from any directory."""
    return os.path.abspath(word) if os.sep in word else word
