"""Turn shards into a whole model, and prove it.

SRC   a run, a checkpoint, a shard directory, a file, or an axolotl config.yml
OUT   a directory (HuggingFace), .safetensors, or .ckpt / .pt / .bin (torch.save)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reshard.cli import options, output
from reshard.cli.report import show_plan, show_result, talk
from reshard.errors import ReshardError


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

    source = args.input_dir or args.source
    if source is None:
        raise ReshardError("no checkpoint was named", hint="reshard merge SRC OUT")
    target = args.output_option or (args.output if args.input_dir is None else args.output or args.source)
    chosen = options.weights(args)
    chosen["base"] = chosen["base"] or args.model_name_or_class
    if args.checkpoint_type == "ema":
        chosen["state_dict_dirname"] = chosen["state_dict_dirname"] or "pytorch_ema_model_fsdp_0"
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
