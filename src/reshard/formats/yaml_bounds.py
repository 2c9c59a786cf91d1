"""How much a YAML document holds, by its events alone: nothing is built meanwhile.

libyaml's composer calls itself for each level, without end, and ends the process where the stack does; and a few lines
of aliases and merge keys stand for more values than any memory holds.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 32
MAX_NUM_VALUES = 1 << 20
"""With each alias counted as all that it stands for. Settings have a few thousand."""


def check_bounds(text: bytes, loader: Any = None) -> None:
    """Raise ValueError for a document that no settings are, yaml.YAMLError, the `loader`'s, for what is none."""
    held: dict[str | None, int] = {}
    above: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(text, Loader=loader or getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            above.append((event.anchor, count))
            if len(above) > MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels{_at(event)}")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = above.pop()
            count += 1
            held[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            count += held.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            held[event.anchor] = 1
        if count > MAX_NUM_VALUES:
            raise ValueError(f"it stands for more than {MAX_NUM_VALUES} values{_at(event)}")


def _at(event: yaml.Event) -> str:
    return f", in line {event.start_mark.line + 1}" if event.start_mark else ""
