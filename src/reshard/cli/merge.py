"""Turn shards into a whole model, and prove it.

SRC   a run, a checkpoint, a shard directory, a file, or an axolotl config.yml
OUT   a directory (HuggingFace), .safetensors, or .ckpt / .pt / .bin (torch.save)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.cli import options, output
from reshard.errors import ReshardError

if TYPE_CHECKING:
    from reshard.ops.merge import Merged, Prepared


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
    destination = Path(target) if target else default_output(prepared.found.root)
    if args.dry_run:
        return show_plan(args, prepared, destination)
    talk(args, prepared.notices)
    with output.progress(prepared.plan.nbytes, "merging", args.quiet) as progress:
        merged = carry_out(
            prepared, destination, force=args.force, remove_shards=args.remove_shards, threads=args.threads,
            block_nbytes=options.block_nbytes(args), progress=progress,
        )  # fmt: skip
    return show_result(args, merged)


def talk(args: argparse.Namespace, notices: tuple[str, ...]) -> None:
    """What the user should know, before the work begins."""
    for notice in () if args.quiet else notices:
        output.say(f"note: {notice}")


def show_plan(args: argparse.Namespace, prepared: Prepared, destination: Path) -> int:
    """What would be done, in the conditional."""
    from reshard.storage.run import check_destination

    check_destination(destination, prepared.plan, args.force)
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
