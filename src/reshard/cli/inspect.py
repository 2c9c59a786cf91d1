"""Say what a checkpoint is: format, writer, step, ranks, parameters, whether it is whole; and what to type next."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reshard.cli import output
from reshard.errors import InputError

if TYPE_CHECKING:
    from reshard.ops.inspect import Audit, Inspection


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step, of a run")
    parser.add_argument("--state-dict-dirname", metavar="NAME", help="the directory of the shards in a checkpoint")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--audit", action="store_true", help="list what the pickles in it want to import; nothing is run"
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    from reshard.ops.inspect import audit, inspect

    if args.audit:
        return _show_audit(args, audit(args.source))
    try:
        found = inspect(args.source, step=args.step, tensors=args.tensors, state_dict_dirname=args.state_dict_dirname)
    except InputError as error:
        if args.json:
            output.show_json({"path": args.source, "complete": None, "error": str(error), "hint": error.hint or ""})
        raise
    if args.json:
        output.show_json(found)
    else:
        _show(found)
    return 1 if found.complete is False else 0


def _show(found: Inspection) -> None:
    output.show(str(found.path) if found.format else f"{found.path}: not complete")
    for name, value in _rows(found).items():
        if value not in (None, ""):
            output.show(f"  {name:<12} {_indented(str(value))}")
    for notice in found.notices:
        output.say(f"note: {notice}")
    for fqn, dtype, shape in found.tensors:
        output.show(f"  {dtype:<10} {list(shape)!s:<24} {fqn}")
    if found.next_command:
        output.show(f"\nnext: {found.next_command}")
    elif found.hint:
        output.show(f"\nhint: {found.hint}")


def _indented(text: str) -> str:
    """Text of several lines as the value of a row."""
    return text.replace("\n", "\n" + " " * 15)


def _rows(found: Inspection) -> dict[str, object]:
    """What is shown, by what it is about."""
    if not found.format:
        return {"problem": found.problem}
    complete = {
        True: "yes, as far as headers tell",
        False: f"no: {found.problem}",
        None: f"not judged: {found.problem}",
    }
    return {
        "format": found.format,
        "written by": found.writer,
        "step": found.step,
        "ranks": found.world_size,
        "placements": "; ".join(found.placements[:4]) + (" ..." if len(found.placements) > 4 else ""),
        "tensors": f"{found.num_tensors} ({output.count(found.num_parameters)} elements, {output.size(found.nbytes)})",
        "dtypes": ", ".join(f"{name} ({count})" for name, count in found.dtypes.items()),
        "objects": found.num_objects or None,
        "also here": ", ".join(found.parts),
        **found.facts,
        "other steps": ", ".join(map(str, found.other_steps)),
        "complete": complete[found.complete],
    }


def _show_audit(args: argparse.Namespace, rows: Sequence[Audit]) -> int:
    if args.json:
        output.show_json(rows)
        return 0
    for row in rows:
        more = f" and {len(row.files) - 1} more" if len(row.files) > 1 else ""
        output.show(f"{'known  ' if row.known else 'UNKNOWN'}  {row.name}  in {row.files[0]}{more}")
    output.say(f"{len(rows)} names; nothing of them was imported")
    return 0
