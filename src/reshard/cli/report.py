"""What the verbs that write say: what would be done, and what was done."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.cli import output
from reshard.errors import OutputError

if TYPE_CHECKING:
    from reshard.ops.merge import Merged, Prepared


def talk(args: argparse.Namespace, notices: tuple[str, ...]) -> None:
    """What the user should know, before the work begins."""
    for notice in () if args.quiet else notices:
        output.say(f"note: {notice}")


def show_plan(args: argparse.Namespace, prepared: Prepared, destination: Path) -> int:
    """What would be done, in the conditional. Raises OutputError when the destination would be refused."""
    from reshard.storage.staging import check_destination, check_space

    check_destination(destination, prepared.plan, args.force)
    try:
        check_space(destination, prepared.plan)
    except OutputError as error:
        output.say(f"note: {error}")
    plan, origin = prepared.plan, prepared.checkpoint.origin
    if args.json:
        files = {
            file.path: {"nbytes": file.nbytes, "tensors": [s.name for s in file.segments if s.name]}
            for file in plan.files
        }
        output.show_json(
            {
                "source": origin.path, "format": origin.format, "step": origin.step, "output": destination,
                "read_nbytes": plan.read_nbytes(), "write_nbytes": plan.nbytes, "files": files,
                "notices": prepared.notices,
            }
        )  # fmt: skip
        return 0
    talk(args, prepared.notices)
    output.show(f"would read {output.size(plan.read_nbytes())} of {origin.path} ({origin.writer}, {origin.format})")
    output.show(f"would write {output.size(plan.nbytes)} to {destination}:")
    for line in plan.explain():
        output.show(f"  {line}")
    return 0


def show_result(args: argparse.Namespace, merged: Merged) -> int:
    """What was done."""
    if args.json:
        output.show_json(merged)
        return 0
    step = "" if merged.step is None else f", step {merged.step}"
    kept = f", {output.size(merged.kept_nbytes)} of it from before the interruption" if merged.kept_nbytes else ""
    rate = output.size(merged.nbytes / max(merged.seconds, 1e-9))
    output.show(f"{merged.output}: {merged.num_tensors} tensors, {output.size(merged.nbytes)}{kept}")
    output.show(f"  from {merged.source} ({merged.format}{step}) in {output.duration(merged.seconds)}, {rate}/s")
    output.show(f"  every element from one place; {merged.num_checked} checksums of the shards confirmed")
    for path in merged.removed[:1]:
        output.show(f"  removed {len(merged.removed)} shard files from {path.parent}")
    return 0
