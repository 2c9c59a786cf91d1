"""What can go wrong, drawn as a tree.

ReshardError
├── InputError            what the user gave cannot be used as it is (exit code 1)
│   ├── NotFound          nothing there, or nothing that any format recognises
│   ├── Incomplete        a checkpoint with parts missing: files, chunks, ranks
│   ├── Corrupt           bytes that contradict themselves: checksums, offsets, sizes, headers
│   ├── Unsupported       well-formed, and deliberately not read
│   └── Mismatch          checkpoints, or a checkpoint and its config, that do not fit together
├── OutputError           the destination cannot be written, or exists already (exit code 1)
└── RankFailed            another rank of the run died, or never came (exit code 1)

Messages say what was being done, the path and the FQN, what was expected and what was found. `hint` is the next step
for the user; the command line prints it on a line of its own.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable


class ReshardError(Exception):
    """The base of every error that reshard raises on purpose."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InputError(ReshardError):
    """What the user gave cannot be used as it is."""


class NotFound(InputError):
    """Nothing is there, or nothing that any format recognises."""


class Incomplete(InputError):
    """A checkpoint with parts missing: files, chunks or ranks."""


class Corrupt(InputError):
    """Bytes that contradict themselves: checksums, offsets, sizes or headers."""


class Unsupported(InputError):
    """Well-formed, and deliberately not read."""


class Mismatch(InputError):
    """Checkpoints, or a checkpoint and its config, that do not fit together."""


class OutputError(ReshardError):
    """The destination cannot be written, or exists already."""


class RankFailed(ReshardError):
    """Another rank of the run died, or never came."""


def listed(names: Iterable[str], limit: int = 10) -> str:
    """`a, b, c` for a message: the first `limit` names, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def command(*words: str | os.PathLike[str]) -> str:
    """A command line of ours for a hint, which a shell takes as it is meant whatever the paths in it are called."""
    return shlex.join(["reshard", *(word if isinstance(word, str) else _no_option(os.fspath(word)) for word in words)])


def _no_option(path: str) -> str:
    """A path that no parser takes for an option."""
    return f"./{path}" if path.startswith("-") else path
