"""HuggingFace to Megatron, with the options of Megatron-Bridge's conversion scripts.

`reshard convert HF OUT --to fsdp_dtensor` is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from reshard.cli import convert, options, output
from reshard.errors import InputError, Mismatch, Unsupported, listed

MEANINGLESS = {
    "trust_remote_code": "no code of a model is ever run",
    "device_map": "there is no device",
    "no_low_memory_save": "memory is bounded by a block",
    "low_memory_save": "memory is bounded by a block",
}
"""Options of the scripts that change nothing here, and why."""


def add_script_options(parser: argparse.ArgumentParser) -> None:
    """What both of Bridge's directions take."""
    parser.add_argument("--hf-model", "--hf-model-id", required=True, metavar="DIR_OR_HUB_ID")
    parser.add_argument("--megatron-path", required=True, metavar="DIR")
    parser.add_argument("--torch-dtype", "--dtype", dest="dtype", metavar="DTYPE", help="of floating-point tensors")
    parser.add_argument("--ckpt-format", metavar="FORMAT", help="fsdp_dtensor or torch_dist")
    parser.add_argument("--etp", type=int, default=1, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device-map", metavar="MAP", help=argparse.SUPPRESS)
    parser.add_argument("--no-progress", action="store_true", help="as --quiet")
    convert.add_mesh(parser)
    convert.add_more(parser)
    options.add_run(parser)


WRITTEN = ("fsdp_dtensor", "torch_dist")


def check_format(args: argparse.Namespace, known: Sequence[str]) -> None:
    """Raise Unsupported unless --ckpt-format is one of these."""
    if args.ckpt_format is not None and args.ckpt_format not in known:
        raise Unsupported(f"--ckpt-format: no format {args.ckpt_format!r} of Megatron", hint=f"one of {listed(known)}")


def say_meaningless(args: argparse.Namespace, **more: str) -> None:
    """Name the options that were given and have no meaning here, and why."""
    for name, why in (MEANINGLESS | more).items():
        if getattr(args, name, None) and not args.quiet:
            output.say(f"note: --{name.replace('_', '-')} changes nothing: {why}")
    if args.etp < 1:
        raise Mismatch(f"--etp {args.etp}: a mesh axis has one rank or more")
    if args.etp > 1 and not args.quiet:
        output.say(f"note: --etp {args.etp} changes nothing: the files are the same for each")


def configure(parser: argparse.ArgumentParser) -> None:
    add_script_options(parser)
    parser.add_argument("--low-memory-save", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-low-memory-save", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from reshard.ops.convert import is_megatron

    args.quiet |= args.no_progress
    check_format(args, WRITTEN)
    say_meaningless(args)
    if is_megatron(Path(args.hf_model)):
        raise InputError(
            f"--hf-model {args.hf_model} is a checkpoint of Megatron",
            hint="`reshard export` makes a HuggingFace model of it, `reshard convert` another format of Megatron's",
        )
    fields = convert.chosen(args, args.ckpt_format or "fsdp_dtensor", args.dtype, None, lenient=True)
    return convert.write(args, args.hf_model, args.megatron_path, fields)
