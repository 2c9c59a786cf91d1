"""Megatron to HuggingFace, with the options of Megatron-Bridge's conversion scripts.

`reshard convert CKPT OUT --to hf --hf-model REF` is the same.
"""

from __future__ import annotations

import argparse

from reshard.cli import convert
from reshard.cli.bridge_import import add_script_options, say_meaningless
from reshard.errors import Unsupported, listed

READ = ("fsdp_dtensor", "torch_dist", "zarr", "torch")
"""What Megatron calls its formats. Which of them a checkpoint is in is seen on its files."""


def configure(parser: argparse.ArgumentParser) -> None:
    add_script_options(parser)
    parser.add_argument("--hf-path", required=True, metavar="DIR")
    parser.add_argument("--not-strict", action="store_true", help="write what there is, though tensors are missing")


def run(args: argparse.Namespace) -> int:
    args.quiet |= args.no_progress
    if args.ckpt_format is not None and args.ckpt_format not in READ:
        raise Unsupported(f"no format {args.ckpt_format!r} of Megatron", hint=f"one of {listed(READ)}")
    say_meaningless(args)
    return convert.write(args, args.megatron_path, args.hf_path, convert.chosen(args, "hf", args.dtype, args.hf_model))
