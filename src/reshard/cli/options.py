"""Options that several verbs share."""

from __future__ import annotations

import argparse
from typing import Any

from reshard.errors import ReshardError
from reshard.storage.launch import Spread


def add_weights(parser: argparse.ArgumentParser) -> None:
    """What is taken from a checkpoint, and as what."""
    group = parser.add_argument_group("what is written")
    group.add_argument("--dtype", metavar="DTYPE", help="cast floating-point tensors (default: keep)")
    group.add_argument("--max-shard-size", metavar="SIZE", help="of the files of a HuggingFace directory, as in 5GB")
    group.add_argument(
        "--base", metavar="DIR_OR_HUB_ID", help="where config and tokenizer come from when the checkpoint has none"
    )
    group.add_argument("--include", metavar="GLOB", action="append", default=[], help="only FQNs that match")
    group.add_argument("--exclude", metavar="GLOB", action="append", default=[], help="not FQNs that match")
    group.add_argument("--keep-names", action="store_true", help="every FQN as stored; no hub names, no ties")
    what = group.add_mutually_exclusive_group()
    what.add_argument(
        "--model", dest="what", action="store_const", const="model", default="model", help="the model alone (default)"
    )
    what.add_argument(
        "--optimizer", dest="what", action="store_const", const="optimizer", help="the optimizer's state alone"
    )
    what.add_argument("--all", dest="what", action="store_const", const="all", help="model, optimizer and the rest")
    group.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step, of a run")
    group.add_argument("--state-dict-dirname", metavar="NAME", help="the directory of the shards in a checkpoint")
    group.add_argument("--cfg-key", metavar="KEY", help="where the config is in meta.pt, for .ckpt outputs")
    group.add_argument(
        "--save-tokenizer", action=argparse.BooleanOptionalAction, default=True, help="carry tokenizer files"
    )


def count(text: str) -> int:
    """A number of things of which there is at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {number}")
    return number


def add_run(parser: argparse.ArgumentParser) -> None:
    """How the work is done."""
    group = parser.add_argument_group("how")
    group.add_argument(
        "--force", action="store_true", help="replace an output that exists, once the new one is complete"
    )
    group.add_argument(
        "--verify", action="store_true", help="compare replicas that ranks hold, and read the output again afterwards"
    )
    group.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    group.add_argument("--threads", type=count, metavar="N", help="that move data (default: one a core, 4 at most)")
    group.add_argument("--memory", metavar="SIZE", help="bound of the buffers, as in 64MB")
    group.add_argument(
        "--distributed-save", action="store_true",
        help="where several ranks were launched (torchrun, srun): each file is written by one of them, else by all",
    )  # fmt: skip
    group.add_argument(
        "--save-every-n-ranks",
        type=int,
        metavar="K",
        default=1,
        help="only the ranks that K divides write (default: 1)",
    )
    group.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    group.add_argument("--quiet", "-q", action="store_true", help="no talk, no progress")


def weights(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ops.merge.Options`."""
    return {
        "what": args.what, "dtype": args.dtype, "max_shard_size": args.max_shard_size, "base": args.base,
        "include": tuple(args.include), "exclude": tuple(args.exclude), "keep_names": args.keep_names,
        "step": args.step, "state_dict_dirname": args.state_dict_dirname, "cfg_key": args.cfg_key,
        "save_tokenizer": args.save_tokenizer, "verify": args.verify,
    }  # fmt: skip


def check_named(**paths: str | None) -> None:
    """Raise ReshardError for a path that is empty, as one of a shell's variable that is not set."""
    empty = [name.replace("_", "-") for name, path in paths.items() if path == ""]
    if empty:
        raise ReshardError(f"{', '.join(empty)} is empty", hint="is a variable of the shell not set?")


def spread(args: argparse.Namespace) -> Spread:
    """How the work is spread over ranks."""
    return Spread(args.distributed_save, args.save_every_n_ranks)


def block_nbytes(args: argparse.Namespace) -> int | None:
    """The size of a block such that all buffers of all threads stay below --memory."""
    if args.memory is None:
        return None
    from reshard.formats.huggingface import parse_size
    from reshard.storage.run import default_threads

    buffers = 4 * (args.threads or default_threads())
    limit = parse_size(args.memory) // buffers
    if limit < 4096:
        raise ReshardError(
            f"--memory {args.memory} is too little for {buffers} buffers", hint=f"it begins at {buffers * 4096} bytes"
        )
    return min(limit, 1 << 24)
