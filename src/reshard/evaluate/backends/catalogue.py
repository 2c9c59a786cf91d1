"""What a harness knows: its tasks and its models, asked of itself in a process of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

_ASK_S = 180.0


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Names that a harness knows; empty where it does not say."""

    tasks: frozenset[str] = frozenset()
    """Tasks, groups and tags."""
    models: frozenset[str] = frozenset()

    def unknown(self, tasks: Sequence[str]) -> list[str]:
        """The tasks that it does not know; none where it does not say."""
        if not self.tasks:
            return []
        return [task for task in tasks if not any(fnmatchcase(name, task) for name in self.tasks)]


def ask(python: str, script: str, *arguments: str) -> Catalogue:
    """What a script prints in its last line: `[tasks, models]` as JSON. Takes as long as importing the harness."""
    words = [python, "-c", script, *arguments]
    try:
        said = subprocess.run(words, capture_output=True, timeout=_ASK_S, check=True, stdin=subprocess.DEVNULL)
        tasks, models = json.loads(said.stdout.splitlines()[-1])
        return Catalogue(frozenset(map(str, tasks)), frozenset(map(str, models)))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return Catalogue()
