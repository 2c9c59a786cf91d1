"""A migration for machines: plain values, to be written as JSON or YAML."""

from __future__ import annotations

from math import isfinite
from typing import Any

from reshard.ops.migrate.apply import STATUSES, Finding, Migration
from reshard.ops.migrate.row import Code
from reshard.ops.migrate.targets import CLASSES, TARGETS


def report(migration: Migration) -> dict[str, Any]:
    """Every setting with its status, what is implied, and the calls with their arguments."""
    return {
        "source": migration.document.name,
        "needs_nemo": migration.needs,
        "counts": {status: sum(f.status == status for f in migration.findings) for status in STATUSES},
        "settings": [_finding(finding) for finding in migration.findings],
        "implied": [_finding(finding) for finding in migration.implied],
        "calls": {
            section: {
                "class": _class(section, {a.name: a.value for a in arguments}),
                "arguments": {a.name: _plain(a.value) for a in arguments if a.name},
            }
            for section, arguments in migration.calls.items()
        },
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "key": finding.key,
        "line": finding.line,
        "status": finding.status,
        "old": _plain(finding.old),
        **({"interpolation": finding.interpolation} if finding.interpolation else {}),
        "new": finding.new,
        "value": _plain(finding.value),
        "note": finding.note,
        "attention": finding.attention,
        "written": finding.written,
    }


def _class(section: str, arguments: dict[str, Any]) -> str:
    chosen = arguments.get("")
    call = CLASSES[chosen][0] if isinstance(chosen, str) and chosen in CLASSES else TARGETS[section].call
    return call.rpartition(".")[2]


def _plain(value: Any) -> Any:
    """What JSON has a form for: expressions and numbers without end as text."""
    if isinstance(value, Code):
        return value.text
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
