"""Prove that an output is what was written (against its manifest), or what its source says (--against)."""

from __future__ import annotations

import argparse

from reshard.cli import options, output


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("--against", metavar="SRC", help="recompute the output from its source and compare")
    parser.add_argument("--threads", type=options.count, metavar="N")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--quiet", "-q", action="store_true", help="no talk, no progress")


def run(args: argparse.Namespace) -> int:
    from reshard.ops.verify import verify

    verified = verify(args.output, args.against, threads=args.threads)
    if args.json:
        output.show_json(verified)
    else:
        for problem in verified.problems:
            output.show(problem)
        against = f", and equal what {args.against} gives" if args.against else ""
        if verified.ok:
            output.show(f"{args.output}: {verified.num_tensors} tensors are what was written{against}")
        else:
            many = len(verified.problems)
            output.say(f"error: {args.output}: {many} problem{'s' * (many > 1)}")
    return 0 if verified.ok else 1
