"""Turn shards into a whole model, and prove it.

SRC   a run, a checkpoint, a shard directory, a file, or an axolotl config.yml
OUT   a directory (HuggingFace), .safetensors, or .ckpt / .pt / .bin (torch.save)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reshard.cli import options, output
from reshard.cli.report import show_plan, show_result, talk
from reshard.errors import InputError, Mismatch


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="SRC")
    parser.add_argument("output", nargs="?", metavar="OUT")
    parser.add_argument(
        "--input-dir", "--checkpoint-path", dest="input_dir", metavar="SRC", help="SRC, for LMMs-Engine"
    )
    parser.add_argument(
        "--output",
        "--output-dir",
        "--output-path",
        dest="output_option",
        metavar="OUT",
        help="OUT, as the systems spell it",
    )
    parser.add_argument("--type", choices=("fsdp2", "hf"), help="LMMs-Engine's: fsdp2 one file a rank, hf a DCP")
    parser.add_argument("--checkpoint-type", choices=("regular", "ema"), help="LMMs-Engine's: which weights")
    parser.add_argument("--merge", action="store_true", help="LMMs-Engine's: the average of all checkpoints of a run")
    parser.add_argument("--model-name-or-class", metavar="NAME", help="LMMs-Engine's spelling of --base")
    parser.add_argument("--remove-shards", action="store_true", help="remove the shards once the output is proven")
    options.add_weights(parser)
    options.add_run(parser)


def run(args: argparse.Namespace) -> int:
    from reshard.ops.merge import Options, carry_out, default_output, prepare

    source, target = _named(args)
    chosen = _chosen(args)
    _say_meaningless(args, target)
    path = Path(source)
    if path.suffix in (".yml", ".yaml"):
        from reshard.ops import axolotl

        config = axolotl.read(path)
        path, chosen["base"] = config.output_dir, chosen["base"] or config.base_model
        target = target or str(path / "merged")
    if args.merge:
        from reshard.cli.average import write_average
        from reshard.ops.average import series

        sources = series(path, step=chosen.pop("step"))
        return write_average(args, sources, Path(target or path / "merged-average"), {**chosen, "step": None})
    prepared = prepare(path, Path(target or "merged"), Options(**chosen))
    destination = Path(target) if target else default_output(prepared.root)
    if args.dry_run:
        return show_plan(args, prepared, destination)
    talk(args, prepared.notices)
    with output.progress(prepared.plan.nbytes, "merging", args.quiet) as progress:
        merged = carry_out(
            prepared, destination, force=args.force, remove_shards=args.remove_shards, threads=args.threads,
            block_nbytes=options.block_nbytes(args), progress=progress, spread=options.spread(args),
        )  # fmt: skip
    return show_result(args, merged)


def _named(args: argparse.Namespace) -> tuple[str, str | None]:
    """Source and output, in any spelling; no output where none is named. Raises InputError for a path too many."""
    given = [path for path in (args.source, args.output) if path is not None]
    source = args.input_dir if args.input_dir is not None else given.pop(0) if given else None
    target = args.output_option if args.output_option is not None else given.pop(0) if given else None
    options.check_named(SRC=source, OUT=target, **{"--base": args.base})
    if source is None:
        raise InputError("no checkpoint was named", hint="reshard merge SRC OUT")
    if given:
        raise InputError(
            f"{given[0]} is one path too many: SRC is {source}, OUT is {target}", hint="reshard merge SRC OUT"
        )
    return source, target


def _chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ops.merge.Options`. Raises Mismatch for options that contradict each other."""
    chosen = options.weights(args)
    if args.base is not None and args.model_name_or_class not in (None, args.base):
        raise Mismatch(f"--base {args.base} and --model-name-or-class {args.model_name_or_class} are two models")
    chosen["base"] = args.base or args.model_name_or_class
    if args.checkpoint_type == "ema":
        if args.state_dict_dirname not in (None, _EMA):
            raise Mismatch(f"--checkpoint-type ema is --state-dict-dirname {_EMA}, and not {args.state_dict_dirname}")
        chosen["state_dict_dirname"] = _EMA
    if args.merge and args.remove_shards:
        raise Mismatch("--merge --remove-shards: the shards that an average is made of are not removed")
    return chosen


_EMA = "pytorch_ema_model_fsdp_0"


def _say_meaningless(args: argparse.Namespace, target: str | None) -> None:
    """Name the options that were given and change nothing."""
    from reshard.ops.merge import kind_of

    is_file, is_nested = target is not None and kind_of(Path(target)) != "huggingface", str(target).endswith(".ckpt")
    meaningless = {
        "--max-shard-size": is_file and args.max_shard_size is not None and f"{target} is one file",
        "--no-save-tokenizer": is_file and not args.save_tokenizer and f"{target} is one file",
        "--cfg-key": args.cfg_key is not None and not is_nested and "only a .ckpt has a configuration in it",
    }
    for option, why in meaningless.items():
        if why and not args.quiet:
            output.say(f"note: {option} changes nothing: {why}")
