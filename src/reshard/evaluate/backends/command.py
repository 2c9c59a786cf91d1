"""Any command that takes a model and leaves a JSON of metrics.

    my-eval --model {model} --step {step} --kind {kind} --out {output}/results.json

It runs in the output directory, which is its own. Exit status 0 and `results.json` there are a success, in lm-eval's
form, as {"task": {"metric": 0.5}} or as {"metric": 0.5}.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from string import Formatter

from reshard.errors import InputError, ReshardError, listed
from reshard.evaluate import process
from reshard.evaluate.backend import Phase, Refused, Request, Status
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.metrics import metrics_of, read_document

RESULTS = "results.json"
_PLACES = ("model", "step", "kind", "output")


def make(config: EvalConfig) -> Command:
    """The backend of `backend: command`."""
    words = shlex.split(config.command) if isinstance(config.command, str) else list(config.command)
    used = {name for word in words for _, name, _, _ in _parsed(word) if name is not None}
    unknown = sorted(used - set(_PLACES))
    if unknown:
        raise InputError(
            f"command: {listed('{' + name + '}' for name in unknown)} is not known",
            hint="{model}, {step}, {kind} and {output} are; a brace itself is {{ or }}",
        )
    if "model" not in used:
        raise InputError("command: it says nowhere where the model goes", hint="put {model} into it")
    return Command(words)


def _parsed(word: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(Formatter().parse(word))
    except ValueError as error:
        raise InputError(f"command: {word!r}: {error}", hint="a brace itself is {{ or }}") from error


class Command:
    """A process for each request."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    def check(self, tasks: Sequence[str]) -> Sequence[str]:
        return ()

    def submit(self, request: Request) -> str:
        places = {"model": request.model, "step": request.step, "kind": request.kind, "output": request.output}
        words = [word.format_map({name: str(value) for name, value in places.items()}) for word in self._words]
        try:
            return str(process.start(words, request.output, request.environment))
        except OSError as error:
            raise Refused(f"{words[0]}: {error.strerror or error}") from error

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
                Phase.FAILED, f"exit status {seen.status}: {seen.last_words()}", permanent=seen.status in (126, 127)
            )
        return self._completed(request, seen)

    def cancel(self, request: Request, job_id: str) -> None:
        process.kill(request.output)

    def recover(self, request: Request) -> Status:
        return self.poll(request, "")

    def _completed(self, request: Request, seen: process.Seen) -> Status:
        path = request.output / RESULTS
        try:
            metrics = metrics_of(read_document(path))
        except ReshardError as error:
            return Status(Phase.FAILED, f"exit status 0, and {error}: {seen.last_words()}")
        if not metrics:
            return Status(Phase.FAILED, f"exit status 0, and {path} has no metric in it")
        return Status(Phase.COMPLETED, metrics=metrics, files=(path, seen.log))
