"""Any command that takes a model and leaves a JSON of metrics.

    my-eval --model {model} --step {step} --kind {kind} --out {output}

{output} is the file to leave, `results.json`; `{output}/NAME` is another one beside it. The command runs in that
directory, which is its own; its program and files that it names by relative paths, as in `python my_eval.py`, are those
of the directory where we are. No shell looks at it. Exit status 0 and metrics in the file are a success: in lm-eval's
form, as {"task": {"metric": 0.5}} or as {"metric": 0.5}.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from reshard.errors import Corrupt, InputError, listed
from reshard.evaluate.backend import Request
from reshard.evaluate.backends.catalogue import Catalogue
from reshard.evaluate.backends.program import Program, absolute
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.metrics import Metric, metrics_of, read_document

RESULTS = "results.json"
_PLACE = re.compile(r"\{([A-Za-z_]+)\}")
"""Any other brace is itself: JSON, shells and Python are full of them."""
_PLACES = ("model", "step", "kind", "tasks", "output")


def make(config: EvalConfig) -> Program:
    """The backend of `backend: command`."""
    return Program(Command(words_of(config.command), config.tasks))


def words_of(command: str | Sequence[str]) -> tuple[str, ...]:
    """The words of a command as it is written. Raises InputError for a place that nobody knows."""
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError as error:
        raise InputError(f"command: {command!r}: {error}") from error
    if not words:
        raise InputError("command: it is empty", hint='"my-eval {model} --out {output}"')
    unknown = sorted({name for word in words for name in _PLACE.findall(word)} - set(_PLACES))
    if unknown:
        raise InputError(
            f"command: {listed('{' + name + '}' for name in unknown)} is not known",
            hint=f"{listed('{' + name + '}' for name in _PLACES)} are",
        )
    return (absolute(words[0]), *map(_as_found_here, words[1:]))


def _as_found_here(word: str) -> str:
    """A script or a file of settings by its whole path. A bare word, such as the name of a task, stays what it is."""
    return os.path.abspath(word) if Path(word).suffix and os.path.isfile(word) else word


class Command:
    """The harness of a command."""

    def __init__(self, words: Sequence[str], tasks: Sequence[str] = ()) -> None:
        self._words = words
        self._tasks = tasks

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue()

    def command(self, request: Request) -> Sequence[str]:
        return [self._filled(word, request) for word in self._words]

    def _filled(self, word: str, request: Request) -> str:
        output = request.output if "{output}/" in word else request.output / RESULTS
        places = {
            "model": str(request.model), "step": str(request.step), "kind": request.kind,
            "tasks": ",".join(self._tasks), "output": str(output),
        }  # fmt: skip
        return _PLACE.sub(lambda place: places[place[1]], word)

    def collect(self, request: Request) -> tuple[tuple[Metric, ...], tuple[Path, ...]]:
        path = request.output / RESULTS
        if path.is_dir():  # a command that took {output} for a directory
            path /= RESULTS
        metrics = metrics_of(read_document(path))
        if not metrics:
            raise Corrupt(f"{path} has no metric in it")
        return metrics, (path,)
