"""One setting of NeMo 1.0 and what NeMo 2.0 makes of it: the words that the tables are written in.

    Row("model.dist_ckpt_parallel_load", "strategy.ckpt_parallel_load", absent=False, note="NeMo 2's default is True")

A place is `section.argument`, where a section is a call that the new program makes (`targets`). A place without an
argument, `scheduler.`, stands for the call itself: that it is made at all, or of which class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol


class Nothing(Enum):
    """Where None is a value, this is the absence of one."""

    NOTHING = "nothing"


NOTHING = Nothing.NOTHING
MISSING = "???"
"""What OmegaConf's YAML says for a value that whoever starts the run has to give."""


class Settings(Protocol):
    """All settings of the document, asked by their dotted names."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a setting, or `default` where it is not in the document."""


@dataclass(frozen=True, slots=True)
class Code:
    """A value that is not a literal of Python."""

    text: str
    """The expression."""
    imports: tuple[str, ...] = ()
    """The import lines that it needs."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of one value."""

    value: Any = NOTHING
    """What is written at the row's place; NOTHING writes nothing."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """Further places that this setting decides, and their values."""
    note: str = ""
    """What holds of this value, beyond the row's own note."""
    removed: bool = False
    """Whether NeMo 2 has nothing for this value, though it has for others."""
    attention: bool = False
    """Whether somebody has to look: behaviour changes, or something is left to do by hand."""


Move = Callable[[Any, Settings], Any]
"""From NeMo 1's value to NeMo 2's: a value for the row's place, or a `Moved`."""


def same(value: Any, _: Settings) -> Any:
    """The value as it is."""
    return value


@dataclass(frozen=True, slots=True)
class Row:
    """A setting of NeMo 1.0."""

    old: str
    """Its dotted name in the YAML; a last `*` stands for whatever lies below."""
    new: str | None = None
    """Its place in NeMo 2, or None where there is none."""
    note: str = ""
    """What to know: why it is gone, what changes, what to do instead."""
    move: Move = same
    """How the value changes."""
    absent: Any = NOTHING
    """What NeMo 1 takes when the key is absent, where NeMo 2 would take something else: it is then spelled out."""
    when: str = ""
    """The setting or section that has to be there, and not false, for `absent` to count; else the row's own section."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names along the way, without the final `*`."""
        return tuple(part for part in self.old.split(".") if part != "*")


def on(*, attention_when: Callable[[Any], bool], note: str) -> Move:
    """A removed setting that matters only for some of its values: those ask for attention, and say why."""

    def move(value: Any, _: Settings) -> Moved:
        told = attention_when(value)
        return Moved(note=note if told else "", attention=told)

    return move


def truthy(value: Any) -> bool:
    """Whether a setting is switched on."""
    return bool(value) and value != MISSING


def number(value: Any) -> bool:
    """Whether a value is a number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)
