"""What a log says, for people: as a terminal would show it."""

from __future__ import annotations

import re
from pathlib import Path

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_TAIL_NBYTES = 64 << 10


def last_lines(log: Path, num_lines: int = 12) -> str:
    """The last lines of a log that say anything; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_NBYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return plain(text, num_lines)


def plain(text: str, num_lines: int | None = None) -> str:
    """Text without colours and control characters; of a progress bar its last state.

    Of several lines the last that are not empty.
    """
    lines = [_shown(line) for line in _ESCAPES.sub("", text).split("\n")]
    kept = [line for line in lines if line.strip()]
    return "\n".join(kept if num_lines is None else kept[-num_lines:])


def _shown(line: str) -> str:
    last = line.rstrip("\r").rpartition("\r")[2]
    return "".join(c for c in last if c.isprintable() or c == "\t").rstrip()
