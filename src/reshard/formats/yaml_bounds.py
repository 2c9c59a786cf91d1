"""YAML documents of anybody: how much one holds is counted first, by its events alone, and nothing built meanwhile.

libyaml's composer calls itself for each level, without end, and ends the process where the stack does; and a few lines
of aliases and merge keys stand for more values than any memory holds.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 32
MAX_NUM_VALUES = 1 << 20
"""With each alias counted as all that it stands for. Settings have a few thousand."""


def loaded(text: bytes, loader: Any = None) -> Any:
    """The document as a loader builds it, a safe one. Raises ValueError or yaml.YAMLError for what is none."""
    loader = loader or getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    _check_bounds(text, loader)
    try:
        return yaml.load(text, Loader=loader)
    except (AttributeError, LookupError) as error:  # PyYAML's own, of `!!timestamp x`, `!!bool x` and `!!int ""`
        raise ValueError("a value is not what its tag says") from error


def _check_bounds(text: bytes, loader: Any) -> None:
    """Raise ValueError for a document that no settings are."""
    held: dict[str | None, int] = {}
    above: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(text, Loader=loader):
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
