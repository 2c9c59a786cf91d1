"""List the model families that `convert` knows, their architectures and what was verified of each."""

from __future__ import annotations

import argparse

from reshard.cli import output


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the list as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    from reshard.families import families

    known = families()
    if args.json:
        output.show_json(
            [
                {
                    "name": f.name, "model_types": f.model_types, "architectures": f.architectures,
                    "dialects": ["hf", "transformers", "megatron"], "verified": f.verified,
                }
                for f in known
            ]
        )  # fmt: skip
        return 0
    width = max(len(f.name) for f in known)
    for family in known:
        output.show(f"{family.name:<{width}}  {', '.join(family.architectures)}")
        if family.verified:
            output.show(f"{'':<{width}}    {family.verified}")
    return 0
