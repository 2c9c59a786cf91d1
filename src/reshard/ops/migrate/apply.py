"""From a document and the rows to a migration: one finding a setting, and the arguments of the new program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from reshard.ops.migrate.document import Document, Setting
from reshard.ops.migrate.odd import remark
from reshard.ops.migrate.row import MISSING, NOTHING, Code, Moved, Row
from reshard.ops.migrate.tables import ROWS
from reshard.ops.migrate.targets import FIRST, TARGETS, Target

Status = Literal["kept", "renamed", "changed", "removed", "unknown"]
STATUSES: tuple[Status, ...] = ("kept", "renamed", "changed", "removed", "unknown")

_EXACT: Mapping[tuple[str, ...], Row] = {row.parts: row for row in ROWS if not row.old.endswith("*")}
_BELOW: Mapping[tuple[str, ...], Row] = {row.parts: row for row in ROWS if row.old.endswith("*")}
_ABOVE = frozenset(row.parts[:n] for row in ROWS for n in range(1, len(row.parts)))
_STRATEGY = "MegatronStrategy swallows what it does not know, so nothing is written for it"


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one setting."""

    key: str
    """Its dotted name in NeMo 1."""
    line: int | None
    """Where it stands in the YAML; None if it does not, and NeMo 1's meaning of its absence is spelled out."""
    status: Status
    """kept: same name, same value; renamed: another name; changed: another value; removed: NeMo 2 has none."""
    old: Any
    """Its value in NeMo 1, interpolations resolved."""
    new: str | None
    """Its new place, as `Class.argument`."""
    value: Any
    """Its value there."""
    note: str
    """What to know."""
    attention: bool
    """Whether somebody has to look."""
    written: bool
    """Whether the Python has it: what equals the default of a later release is left out, and so is what belongs to a
    call that is not made."""
    interpolation: str | None = None
    """What the YAML says instead of the value, if that is an interpolation."""


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a call of the new program."""

    name: str
    value: Any
    finding: Finding
    """Where it comes from."""


@dataclass(frozen=True, slots=True)
class Migration:
    """A NeMo 1.0 YAML, settled."""

    document: Document
    findings: tuple[Finding, ...]
    """One for every setting of the YAML, in its order."""
    implied: tuple[Finding, ...]
    """What the YAML does not say and NeMo 2 would take otherwise than NeMo 1."""
    calls: Mapping[str, tuple[Argument, ...]] = field(default_factory=dict)
    """The sections that are made, and their arguments; an argument without a name says of which class."""

    @property
    def unknown(self) -> tuple[Finding, ...]:
        """The settings that no table has."""
        return tuple(f for f in self.findings if f.status == "unknown")

    @property
    def needs(self) -> str:
        """The first release of NeMo that takes every argument that is written."""
        releases = [
            TARGETS[section].later[argument.name].since
            for section, arguments in self.calls.items()
            for argument in arguments
            if argument.name in TARGETS[section].later
        ]
        return max([FIRST, *releases], key=lambda release: tuple(map(int, release.split("."))))


def migrated(document: Document) -> Migration:
    """The migration of a document. Never raises: what is not understood is a finding that says so."""
    builder = _Builder(document)
    findings = [builder.settle(setting) for setting in document.settings]
    implied = [finding for row in ROWS if (finding := builder.spell_out(row)) is not None]
    made = builder.made()
    spelled_out = tuple(f for f in builder.seen(implied, made) if f.written or f.attention)
    return Migration(document, builder.seen(findings, made), spelled_out, made)


def row_of(path: tuple[str, ...]) -> Row | None:
    """The row of a setting: its own, else that of the nearest section whose settings share one."""
    if path in _EXACT:
        return _EXACT[path]
    for length in range(len(path), 0, -1):
        if path[:length] in _BELOW:
            return _BELOW[path[:length]]
    if len(path) == 2 and path[0] == "model" and TARGETS["config"].takes(path[1]):
        return Row(".".join(path), f"config.{path[1]}", "a field of TransformerConfig")
    if path[:2] == ("model", "mcore_customization_config") and len(path) == 3 and TARGETS["config"].takes(path[2]):
        return Row(".".join(path), f"config.{path[2]}", "set on the config as it is")
    return None


@dataclass(slots=True)
class _Builder:
    """The arguments collected so far."""

    document: Document
    places: dict[str, tuple[Any, Finding]] = field(default_factory=dict)

    def settle(self, setting: Setting) -> Finding:
        """The finding of a setting; its values are taken to their places."""
        row = row_of(setting.path)
        if row is None:
            return self._rowless(setting)
        return self._settled(row, self._moved(row, setting), setting.key, setting.value, setting)

    def spell_out(self, row: Row) -> Finding | None:
        """The finding of a setting that is not there, where that means something else in NeMo 2."""
        when = row.when or row.old.partition(".")[0]
        given = self.document.has(row.old) or (row.new is not None and row.new in self.places)
        if row.absent is NOTHING or given or not (self.document.get(when) or when in self.document.sections):
            return None
        moved = _as_moved(row.move(row.absent, self.document))
        if moved.value is NOTHING and not moved.attention:
            return None
        return self._settled(row, moved, row.old, row.absent, None)

    def _rowless(self, setting: Setting) -> Finding:
        """A section without settings, or a setting that nobody knows."""
        empty = setting.value in (None, {}) and setting.path in _ABOVE
        note = "an empty section" if empty else "in no table"
        if setting.path[-1].startswith(("dist_ckpt_", "ckpt_")):
            note = f"no setting of NeMo 1, and {_STRATEGY}"
        status: Status = "removed" if empty else "unknown"
        return Finding(setting.key, setting.line, status, setting.value, None, None, note, not empty, False)

    def _moved(self, row: Row, setting: Setting) -> Moved:
        """What the row makes of the value, unless the value is not known."""
        if not setting.unresolved and setting.value != MISSING:
            return _with_remark(_as_moved(row.move(setting.value, self.document)), row, setting.value)
        left = "an interpolation that the YAML alone does not answer" if setting.unresolved else "left open by the YAML"
        if row.new is None or row.new.endswith("."):
            return Moved(removed=True, note=left, attention=row.new is not None)
        return Moved(setting.value, attention=True, note=f"{left}: write the value")

    def _settled(self, row: Row, moved: Moved, key: str, old: Any, setting: Setting | None) -> Finding:
        finding = Finding(
            key,
            setting.line if setting else None,
            _status(row, moved, key, old),
            old,
            None if row.new is None or moved.removed else _shown(row.new, moved.value),
            None if moved.value is NOTHING else moved.value,
            "; ".join(filter(None, (row.note, moved.note))),
            moved.attention,
            False,
            str(setting.written) if setting and setting.written != setting.value else None,
        )
        own = {row.new: moved.value} if row.new is not None and moved.value is not NOTHING else {}
        places = {**own, **moved.also}
        clashes = [self._take(place, value, finding) for place, value in places.items()]
        if any(clashes):
            other = ", ".join(filter(None, clashes))
            finding = replace(finding, note=f"{finding.note}; {other} says otherwise, and was taken", attention=True)
        return finding

    def _take(self, place: str, value: Any, finding: Finding) -> str | None:
        """Note an argument. The name of the setting that keeps another value there, if one does."""
        taken = self.places.get(place)
        if taken is None or taken[0] is None:
            self.places[place] = (value, finding)
        elif value is not None and value != taken[0]:
            return taken[1].key
        return None

    def made(self) -> dict[str, tuple[Argument, ...]]:
        """The calls that are made, in the order of the targets."""
        calls: dict[str, tuple[Argument, ...]] = {}
        for section, target in TARGETS.items():
            arguments = {
                place.partition(".")[2]: Argument(place.partition(".")[2], value, finding)
                for place, (value, finding) in self.places.items()
                if place.partition(".")[0] == section
            }
            if arguments and _is_made(target, arguments):
                kept = (a for a in arguments.values() if not _is_later_default(target, a))
                calls[section] = tuple(kept)
        return calls

    def seen(self, findings: list[Finding], calls: Mapping[str, tuple[Argument, ...]]) -> tuple[Finding, ...]:
        """The findings, each with whether the program has it."""
        written = {argument.finding.key for arguments in calls.values() for argument in arguments}
        return tuple(self._told(finding, finding.key in written) for finding in findings)

    def _told(self, finding: Finding, written: bool) -> Finding:
        if written or finding.new is None or finding.value is None:
            return replace(finding, written=written)
        return replace(finding, note=_because(finding))


def _because(finding: Finding) -> str:
    """The note of a setting whose value the program does not have."""
    name = (finding.new or "").rpartition(".")[2]
    section = next((t for t in TARGETS.values() if (finding.new or "").startswith(f"{t.shown}.")), None)
    if section is not None and name in section.later and finding.value == section.later[name].default:
        reason = f"the default, left out: the name is of {section.later[name].since} and later"
    else:
        reason = "not written: the call is not made"
    return "; ".join(filter(None, (finding.note, reason)))


def _is_made(target: Target, arguments: Mapping[str, Argument]) -> bool:
    if target.on_demand and "" not in arguments:
        return False
    return "" in arguments or target.needs <= arguments.keys()


def _is_later_default(target: Target, argument: Argument) -> bool:
    later = target.later.get(argument.name)
    return later is not None and argument.value == later.default and type(argument.value) is type(later.default)


def _as_moved(result: Any) -> Moved:
    return result if isinstance(result, Moved) else Moved(result)


def _with_remark(moved: Moved, row: Row, value: Any) -> Moved:
    """With what is odd about the value, where it goes on."""
    said = "" if row.new is None or moved.removed else remark(row.new, value)
    return replace(moved, note="; ".join(filter(None, (moved.note, said))), attention=True) if said else moved


def _shown(place: str, value: Any) -> str:
    """`MegatronStrategy.save_ckpt_format`; of a call, its class."""
    section, _, argument = place.partition(".")
    target = TARGETS[section].shown
    if argument:
        return f"{target}.{argument}"
    return value if isinstance(value, str) else target


def _status(row: Row, moved: Moved, key: str, old: Any) -> Status:
    if row.new is None or moved.removed:
        return "removed"
    new = row.new.rpartition(".")[2]
    if isinstance(moved.value, Code) or not new or not _equal(moved.value, old):
        return "changed"
    return "kept" if key.rpartition(".")[2] == new else "renamed"


def _equal(new: Any, old: Any) -> bool:
    new = list(new) if isinstance(new, tuple) else new
    return new is not NOTHING and isinstance(new, bool) == isinstance(old, bool) and bool(new == old)
