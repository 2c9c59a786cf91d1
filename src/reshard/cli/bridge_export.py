"""Megatron to HuggingFace, with the options of Megatron-Bridge's conversion scripts.

`reshard convert CKPT OUT --to hf --hf-model REF` is the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reshard.cli import convert, options
from reshard.cli.bridge_import import add_script_options, check_format, say_meaningless
from reshard.errors import NotFound

READ = ("fsdp_dtensor", "torch_dist", "zarr", "torch")
"""What Megatron calls its formats. Which of them a checkpoint is in is seen on its files."""


def configure(parser: argparse.ArgumentParser) -> None:
    add_script_options(parser)
    parser.add_argument("--hf-path", required=True, metavar="DIR")
    parser.add_argument("--not-strict", action="store_true", help="write what there is, though tensors are missing")


def run(args: argparse.Namespace) -> int:
    from reshard.ops.convert import is_megatron

    args.quiet |= args.no_progress
    check_format(args, READ)
    say_meaningless(args, ckpt_format="it is seen on the files")
    options.check_named(**{"--megatron-path": args.megatron_path})
    source = Path(args.megatron_path)
    if not is_megatron(source):
        what = "no checkpoint of Megatron is there" if source.exists() else "no such file or directory"
        raise NotFound(
            f"--megatron-path {source}: {what}",
            hint="name the run (latest_checkpointed_iteration.txt, iter_0000500/); "
            "`reshard convert` takes models of other systems, `reshard inspect` says what this is",
        )
    fields = convert.chosen(args, "hf", args.dtype, args.hf_model, lenient=True)
    return convert.write(args, args.megatron_path, args.hf_path, fields)
