"""Turn a NeMo 1.0 YAML into NeMo 2.0 code: strategy, trainer, checkpoint callback, optimizer, model, data.

Every setting is kept, renamed, changed or removed, and says why; settings that no table has are listed as unknown.
A .nemo archive does as well, for its model_config.yaml. `docs/nemo.md` has the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.cli import output
from reshard.errors import OutputError

if TYPE_CHECKING:
    from reshard.ops.migrate import Finding, Migration


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="or a .nemo archive")
    parser.add_argument("--output", "-o", metavar="FILE", type=Path, help="write there instead of to stdout")
    parser.add_argument(
        "--format",
        choices=("python", "yaml", "json"),
        help="a program, or each setting with its status, place, value and note (default: by the name of FILE, python)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a setting is unknown")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--quiet", "-q", action="store_true", help="no notices on stderr")


def run(args: argparse.Namespace) -> int:
    from reshard.ops.migrate import migrated, read

    if args.output and args.output.is_dir():
        raise OutputError(f"{args.output} is a directory, and the output is a file", hint="--output DIRECTORY/name.py")
    if args.output and args.output.exists() and not args.force:
        raise OutputError(f"{args.output} exists", hint="--force replaces it")
    if args.output and not args.output.parent.is_dir():
        raise OutputError(f"{args.output}: there is no directory {args.output.parent}", hint="make it, or name another")
    migration = migrated(read(args.config))
    text = _text(migration, args.format or _format_of(args.output))
    if args.output:
        _write(args.output, text)
    else:
        output.show(text.rstrip("\n"))
    if not args.quiet:
        _tell(migration)
    return 1 if args.strict and migration.unknown else 0


def _format_of(path: Path | None) -> str:
    known = {".json": "json", ".yaml": "yaml", ".yml": "yaml"}
    return known.get(path.suffix, "python") if path else "python"


def _text(migration: Migration, form: str) -> str:
    from reshard.ops.migrate import program, report

    if form == "python":
        return program(migration)
    if form == "json":
        import json

        return json.dumps(report(migration), indent=2, ensure_ascii=False) + "\n"
    import yaml

    return yaml.dump(report(migration), Dumper=_without_aliases(), sort_keys=False, allow_unicode=True, width=120)


def _without_aliases() -> type:
    """A dumper that writes a list twice rather than referring to it."""
    import yaml

    return type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})


def _write(path: Path, text: str) -> None:
    """Beside, then renamed: never half a file under the name."""
    import os

    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _tell(migration: Migration) -> None:
    """What somebody has to look at, on stderr."""
    name = migration.document.name
    for finding in (f for f in (*migration.findings, *migration.implied) if f.attention):
        output.say(f"{'unknown' if finding.status == 'unknown' else 'look at'}: {_line(finding, name)}")
    counts = {f.status: 0 for f in migration.findings}
    for finding in migration.findings:
        counts[finding.status] += 1
    settled = ", ".join(f"{many} {status}" for status, many in sorted(counts.items()))
    output.say(
        f"{name}: {len(migration.findings)} settings: {settled}; {len(migration.implied)} implied by their absence, "
        f"spelled out; needs NeMo {migration.needs} or newer"
    )


def _line(finding: Finding, name: str) -> str:
    where = f"{name}:{finding.line}: " if finding.line else ""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in finding.key)
    return f"{where}{printable}: {finding.note}"
