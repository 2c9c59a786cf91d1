"""Write the mean of checkpoints, straight from their shards: the exact mean, rounded once.

SRC   checkpoints of any formats; or one run, of which all numbered checkpoints are taken, in ascending order
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reshard.cli import options, output
from reshard.cli.report import show_plan, show_result, talk
from reshard.errors import ReshardError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SRC")
    parser.add_argument("--output", "--output-dir", "--output-path", dest="output", required=True, metavar="OUT")
    parser.add_argument("--weights", metavar="W,W,...", help="one for each source (default: equal)")
    parser.add_argument("--last", type=int, metavar="K", help="only the newest K checkpoints of a run")
    parser.add_argument("--ema", type=float, metavar="DECAY", help="an exponential moving average over the series")
    parser.add_argument("--accumulate", choices=("float64", "float32"), default="float64", help="float32 is faster")
    options.add_weights(parser)
    options.add_run(parser)


def run(args: argparse.Namespace) -> int:
    from reshard.ops.average import series

    sources = [Path(s) for s in args.sources]
    chosen = options.weights(args)
    if len(sources) == 1:
        sources = series(sources[0], step=args.step, last=args.last)
        chosen["step"] = None
    elif args.last is not None:
        sources = sources[-args.last :]
    return write_average(args, sources, Path(args.output), chosen)


def write_average(args: argparse.Namespace, sources: Sequence[Path], target: Path, chosen: dict[str, Any]) -> int:
    """Average and report; `merge --merge` comes here too."""
    from reshard.ops.average import NonFinite, prepare_average
    from reshard.ops.merge import Options, carry_out

    bad = NonFinite()
    prepared = prepare_average(
        sources, target, Options(**chosen), _weights(getattr(args, "weights", None)), getattr(args, "ema", None),
        getattr(args, "accumulate", "float64"), bad,
    )  # fmt: skip
    if args.dry_run:
        return show_plan(args, prepared, target)
    talk(args, prepared.notices)
    with output.progress(prepared.plan.nbytes, "averaging", args.quiet) as progress:
        merged = carry_out(
            prepared, target, force=args.force, threads=args.threads, block_nbytes=options.block_nbytes(args),
            progress=progress, spread=options.spread(args), tell=lambda: bad.said(sources),
        )  # fmt: skip
    for line in merged.notices[len(prepared.notices) :]:
        output.say(f"warning: {line}")
    return show_result(args, merged)


def _weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise ReshardError(f"--weights {text}: numbers with commas between them are expected") from error
