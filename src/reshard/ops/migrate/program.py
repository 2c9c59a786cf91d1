"""A migration as a Python program for NeMo 2.0, with a comment at whatever changed and a list of what is gone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from pathlib import PurePath
from typing import Any

from reshard.ops.migrate.apply import Argument, Finding, Migration
from reshard.ops.migrate.row import Code
from reshard.ops.migrate.targets import CLASSES, TARGETS

_WIDTH = 116
_CALLBACKS = ("early_stopping", "preemption", "timing", "nsys", "garbage", "overlap")


def program(migration: Migration) -> str:
    """The text of the program. It compiles, and whatever the YAML holds stays inside literals and comments."""
    calls = migration.calls
    body = [line for section in TARGETS for line in _section(section, calls)]
    imports = sorted({line for section in TARGETS for line in _imports(section, calls)})
    parts = [_head(migration), *_grouped(imports), "", *body, *_model(calls), *_main(calls), *_left(migration)]
    return "\n".join(parts).rstrip("\n") + "\n"


def _head(migration: Migration) -> str:
    name = _printable(PurePath(migration.document.name).name).replace("\\", "/").replace('"', "'")
    counts = ", ".join(f"{n} {word}" for word, n in _counts(migration.findings).items() if n)
    swallows = "MegatronStrategy ignores a keyword that it does not know, without an error."
    return (
        f'"""NeMo 2.0 settings made of {name}.\n\n'
        f"Needs NeMo {migration.needs} or newer: {swallows}\n"
        f"Of {len(migration.findings)} settings: {counts}. The last comments list those that are not in the program.\n"
        f'"""\n'
    )


def _counts(findings: Iterable[Finding]) -> dict[str, int]:
    counts = dict.fromkeys(("kept", "renamed", "changed", "removed", "unknown"), 0)
    for finding in findings:
        counts[finding.status] += 1
    return counts


# --------------------------------------------------------------------------------------------------------------- calls


def _section(section: str, calls: Mapping[str, tuple[Argument, ...]]) -> list[str]:
    """The lines of one call."""
    made = section in calls
    wired = list(_wired(section, calls))
    if not made and not wired:
        return []
    target = TARGETS[section]
    call, _ = _class(section, calls.get(section, ()))
    arguments = calls.get(section, ())
    above = [line for a in arguments if not a.name and (note := _note(a)) for line in _comment(note, "")]
    lines = [*_arguments(arguments), *(f"    {name}={value}," for name, value in wired)]
    if not lines:
        return [*above, f"{target.variable} = {call}()", ""]
    return [*above, f"{target.variable} = {call}(", *lines, ")", ""]


def _wired(section: str, calls: Mapping[str, tuple[Argument, ...]]) -> Iterator[tuple[str, str]]:
    """Arguments that are other calls' results."""
    match section:
        case "strategy":
            yield from (("ddp", "ddp"),) * ("ddp" in calls)
        case "trainer" if "strategy" in calls:
            yield "strategy", "strategy"
            yield from (("plugins", "precision"),) * ("precision" in calls)
            callbacks = [name for name in _CALLBACKS if name in calls]
            yield from (("callbacks", f"[{', '.join(callbacks)}]"),) * bool(callbacks)
        case "logger":
            yield from ((name, value) for name, value in _LOGGERS if value in calls)
        case "resume":
            yield from (("restore_config", "restore"),) * ("restore" in calls)
        case "data":
            yield from (("tokenizer", "tokenizer"),) * ("tokenizer" in calls and "data" in calls)
        case _:
            return


_LOGGERS = (("ckpt", "checkpoint"), ("tensorboard", "tensorboard"), ("wandb", "wandb"))


def _class(section: str, arguments: Iterable[Argument]) -> tuple[str, tuple[str, ...]]:
    """How the class is spelled, and its import lines."""
    for argument in arguments:
        if not argument.name and isinstance(argument.value, str) and argument.value in CLASSES:
            call, line = CLASSES[argument.value]
            return call, (line,)
    return TARGETS[section].call, TARGETS[section].imports


def _arguments(arguments: Iterable[Argument]) -> Iterator[str]:
    """A line each; above those that one setting decides, what changed, once."""
    told = {argument.finding.key for argument in arguments if not argument.name}
    for argument in arguments:
        if not argument.name:
            continue
        line = f"    {argument.name}={_literal(argument.value)},"
        aside = _aside(argument.finding)
        note = _note(argument) if argument.finding.key not in told else ""
        told.add(argument.finding.key)
        if note:
            yield from _comment(note, "    ")
        elif aside and len(line) + len(aside) > _WIDTH:
            yield from _comment(aside.removeprefix("  # "), "    ")
            aside = ""
        yield f"{line}{aside}"


def _note(argument: Argument) -> str:
    finding = argument.finding
    if finding.line is None:
        return f"{finding.key} is not in the YAML: {finding.note}"
    if finding.status in ("changed", "removed"):
        return f"{finding.key} = {_literal(finding.old)}: {finding.note}".removesuffix(": ")
    return f"{finding.key}: {finding.note}" if finding.attention else ""


def _aside(finding: Finding) -> str:
    """What stands behind an argument: the old name where it differs, and the interpolation that gave the value."""
    words = [finding.key] if finding.status == "renamed" and not finding.attention else []
    words += [finding.interpolation] if finding.interpolation else []
    return f"  # {_printable(' = '.join(words))}" if words else ""


def _imports(section: str, calls: Mapping[str, tuple[Argument, ...]]) -> Iterator[str]:
    """The lines that a call needs, and what is made of it."""
    arguments = calls.get(section, ())
    if section in calls or any(_wired(section, calls)):
        yield from _class(section, arguments)[1]
    if section in calls and section in _MADE_INTO:
        yield _MADE_INTO[section]
    for argument in arguments:
        if isinstance(argument.value, Code):
            yield from argument.value.imports


_MADE_INTO = {"config": "from nemo.collections import llm", "optimizer": "from nemo import lightning as nl"}
"""Calls whose results `_model` hands to others, and what those need."""


def _grouped(imports: list[str]) -> list[str]:
    return [line for line in imports if line.startswith("import ")] + [
        line for line in imports if not line.startswith("import ")
    ]


# ----------------------------------------------------------------------------------------------------- what binds them


def _model(calls: Mapping[str, tuple[Argument, ...]]) -> list[str]:
    """The optimizer's module, and the model."""
    lines: list[str] = []
    if "optimizer" in calls:
        schedule = ", lr_scheduler=scheduler" if "scheduler" in calls else ""
        lines += [f"optim = nl.MegatronOptimizerModule(config=optimizer{schedule})", ""]
    if "config" in calls:
        llama = any(argument.value == "Llama31Config" for argument in calls["config"] if not argument.name)
        tokenizer = ", tokenizer=tokenizer" if "tokenizer" in calls else ""
        lines += _comment(
            "Exports know families: LlamaModel, MistralModel, NemotronModel, ... with the same values in their config.",
            "",
        )
        lines += [f"model = llm.{'LlamaModel' if llama else 'GPTModel'}(config{tokenizer})", ""]
    return lines


def _main(calls: Mapping[str, tuple[Argument, ...]]) -> list[str]:
    if not {"config", "data", "trainer", "strategy"} <= calls.keys():
        return []
    extra = [("log", "logger"), ("resume", "resume")]
    words = [f"{name}={section}" for name, section in extra if section in calls or any(_wired(section, calls))]
    words += ["optim=optim"] * ("optimizer" in calls)
    return [
        "",
        'if __name__ == "__main__":',
        f"    llm.pretrain({', '.join(['model', 'data', 'trainer', *words])})",
        "",
    ]


# ------------------------------------------------------------------------------------------------ what is not in there


def _left(migration: Migration) -> list[str]:
    """Comments: the settings that are not in the program."""
    left = [finding for finding in migration.findings if not finding.written]
    groups = (
        ("Unknown: in no table. Look each of them up.", [f for f in left if f.status == "unknown"]),
        ("To do by hand.", [f for f in left if f.attention and f.status != "unknown"]),
        ("Not written.", [f for f in left if not f.attention and f.status not in ("removed", "unknown")]),
        ("Removed.", [f for f in left if not f.attention and f.status == "removed"]),
    )
    lines: list[str] = []
    for title, findings in groups:
        if findings:
            lines += ["", f"# {title}", "#"]
            lines += [line for f in findings for line in _comment(_said(f), "", "    ")]
    return lines


def _said(finding: Finding) -> str:
    value = finding.interpolation or _literal(finding.old)
    value = value if len(value) <= _WIDTH else f"{value[: _WIDTH - 3]}..."
    place = f" -> {finding.new}" if finding.new and finding.status != "removed" else ""
    return f"{finding.key} = {value}{place}: {finding.note}".removesuffix(": ")


def _comment(text: str, indent: str, hanging: str = "") -> list[str]:
    first = f"{indent}# "
    return textwrap.wrap(
        _printable(text), _WIDTH, initial_indent=first, subsequent_indent=first + hanging, break_on_hyphens=False
    )


def _printable(text: str) -> str:
    """On one line, whatever it holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _literal(value: Any) -> str:
    """A value as Python spells it."""
    match value:
        case Code():
            return value.text
        case float() if not isfinite(value):
            return f'float("{value}")'
        case str():
            plain = repr(value)
            return f'"{plain[1:-1]}"' if plain[0] == "'" and '"' not in plain else plain
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case tuple():
            return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
        case dict():
            return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
        case _:
            return repr(value)
