"""Where everything of an evaluated run lies: in `RUN/evals`, or where the user says.

evals.jsonl      every metric, once
evals.sqlite     what is known: see `store.py`
held/            shards that wait for their merge
merged/          whole models, while they are evaluated, and those that are kept
output/          a directory for each attempt that is kept, with what the backend left there
training-ended   made by whoever knows that no checkpoint will come any more
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import NotFound
from reshard.evaluate.records import Job

_NOTING_S = 60.0
"""Longer than anybody takes to note what is complete."""
_MAKING_S = 6 * 3600.0
"""Longer than copying a checkpoint takes."""


@dataclass(frozen=True, slots=True)
class Places:
    """The paths of one run."""

    run: Path
    folder: Path

    @classmethod
    def of(cls, run: Path | str, folder: Path | str | None = None) -> Places:
        """Of a run, which may not be there yet. Raises NotFound for what is no directory."""
        path = Path(os.path.abspath(run))
        if path.exists() and not path.is_dir():
            raise NotFound(f"{path}: it is no directory")
        return cls(path, path / "evals" if folder is None else Path(os.path.abspath(folder)))

    @property
    def has_begun(self) -> bool:
        """Whether there is a run to look at, and room for our own directory.

        As long as the directory is empty nothing may be put into it: trainers refuse an output directory in which there
        is something that is none of theirs, and some of their ranks look later than others.
        """
        try:
            with os.scandir(self.run) as entries:
                return self.folder.is_dir() or not self.folder.is_relative_to(self.run) or any(entries)
        except OSError:
            return False

    @property
    def store(self) -> Path:
        return self.folder / "evals.sqlite"

    @property
    def journal(self) -> Path:
        return self.folder / "evals.jsonl"

    @property
    def end(self) -> Path:
        return self.folder / "training-ended"

    @property
    def held_folder(self) -> Path:
        return self.folder / "held"

    def held(self, step: int, kind: str, fingerprint: str) -> Path:
        """Where the shards of a job are held."""
        return self.held_folder / f"step-{step}-{kind}-{fingerprint[:12]}"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    def model(self, job: Job) -> Path:
        """The whole model of a job."""
        return self.merged / f"step-{job.step}-{job.kind}-{job.fingerprint[:12]}"

    @property
    def outputs(self) -> Path:
        return self.folder / "output"

    def output(self, job: Job) -> Path:
        """A directory for the next attempt of a job that no other attempt ever had, made now."""
        name = f"attempt-{job.attempts + 1}-{secrets.token_hex(4)}"
        path = self.outputs / f"step-{job.step}-{job.kind}" / name
        path.mkdir(parents=True)
        return path


def sweep(folder: Path, wanted: set[str]) -> None:
    """Remove what nobody knows of in a directory of ours, once it is old enough not to be in the making."""
    for path in folder.iterdir() if folder.is_dir() else ():
        patience_s = _MAKING_S if path.name.startswith(".") else _NOTING_S
        if path.name not in wanted and time.time() - path.stat().st_mtime > patience_s:
            shutil.rmtree(path, ignore_errors=True)
