"""What is removed once it is done with: whole models, shards where the settings say so, and outputs of attempts.

Nothing goes before its results are in evals.jsonl, and nothing but what a watcher made itself; shards excepted, and of
those only what `remove_shards` says.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from pathlib import Path

from reshard.evaluate import process
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.keep import kept
from reshard.evaluate.places import Places
from reshard.evaluate.protect import is_intact
from reshard.evaluate.records import FINAL, Attempt, Job, State
from reshard.evaluate.scan import called
from reshard.evaluate.store import Store
from reshard.storage.staging import staging_of

_ATTEMPT = re.compile(r"attempt-\d+-[0-9a-f]{8}")
_ENDED = (State.FAILED, State.CANCELLED)
"""How attempts end of which the backend itself said that they did; of others something may go on."""
_QUIET_S = 900.0
"""How long nothing must have been written to the output of such another."""
Say = Callable[[str], None]


class Pruner:
    """Removes what the settings of a run do not keep."""

    def __init__(self, places: Places, store: Store, config: EvalConfig, run: str, say: Say) -> None:
        self._places, self._store, self._config, self._run, self._say = places, store, config, run, say

    def prune(self) -> None:
        """Remove all that is done with and not to be kept."""
        self._prune_models()
        if self._config.keep_attempts == "last":
            for attempt in self._store.spent_attempts(self._run):
                self._remove_output(attempt)

    def forget(self, job: Job) -> None:
        """Drop a job that is to be tried anew, with the outputs of its attempts."""
        if self._config.keep_attempts == "last":
            for attempt in self._store.attempts(job):
                self._remove_output(attempt)
        self._store.drop(job)

    def _prune_models(self) -> None:
        ended = [job for job in self._store.with_models(self._run) if job.state in FINAL]
        if not ended:
            return
        jobs = self._store.jobs(run=self._run)
        stay = kept(jobs, self._store.results(run=self._run), self._config)
        if self._config.remove_shards:
            self._remove_shards(jobs, stay)
        for job in ended:
            path = Path(job.merged)
            if job.id not in stay and path.parent == self._places.merged:
                shutil.rmtree(path, ignore_errors=True)
                shutil.rmtree(staging_of(path), ignore_errors=True)
                self._store.change(job, merged="", payload={**job.payload, "merged_nbytes": 0})

    def _remove_shards(self, jobs: Sequence[Job], stay: Container[int]) -> None:
        """Of steps that were evaluated and are none of the best; never of the newest, from which training resumes."""
        newest = max(job.step for job in jobs)
        for job in jobs:
            if job.state != State.DONE or job.id in stay or job.step == newest:
                continue
            if job.files and is_intact(Path(job.source), job.files, job.fingerprint):
                for name in job.files:
                    (Path(job.source) / name).unlink(missing_ok=True)
                self._say(f"{called(job)}: its shards were removed, as remove_shards says")

    def _remove_output(self, attempt: Attempt) -> None:
        path = Path(attempt.output)
        if not attempt.output or not self._is_ours(path) or _may_be_written(path, attempt):
            return
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
            self._store.output_removed(attempt)

    def _is_ours(self, path: Path) -> bool:
        """Whether a path is that of an attempt of this run, through no link."""
        outputs = self._places.outputs
        real = Path(os.path.realpath(outputs)) / path.parent.name / path.name
        is_named_so = path.parent.parent == outputs and _ATTEMPT.fullmatch(path.name) is not None
        return is_named_so and Path(os.path.realpath(path)) == real


def _may_be_written(path: Path, attempt: Attempt) -> bool:
    """Whether a process may still be at work on an attempt that was given up."""
    seen = process.look(path)
    if seen is not None:
        return seen.is_running
    if attempt.state in _ENDED:
        return False
    return time.time() - _last_written(path) < _QUIET_S


def _last_written(path: Path) -> float:
    """When anything below a directory changed last; links are not followed. 0 where there is nothing."""
    last = 0.0
    for folder, _, names in os.walk(path):
        for name in (".", *names):
            with suppress(FileNotFoundError):
                last = max(last, os.lstat(os.path.join(folder, name)).st_mtime)
    return last


__all__ = ["Pruner"]
