"""Convert a model from one format and dialect to another, and prove it.

SRC   a HuggingFace directory or hub id, a run that merges to one, or a Megatron checkpoint (torch_dist, fsdp_dtensor,
      zarr, mp_rank_*): the run, iter_NNNNNNN or the directory of the weights; or NeMo 1's archive, a .nemo
OUT   a directory

`--input_path SRC --output_path OUT --model_id ID --tokenizer_path P --tokenizer_library L`, as NVIDIA's
convert_nemo1_to_nemo2.py spells it, is the same as `SRC OUT --to nemo2 ...`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reshard.cli import options, output
from reshard.cli.report import show_plan, show_result, talk
from reshard.errors import InputError, OutputError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", nargs="?")
    parser.add_argument("output", metavar="OUT", nargs="?")
    parser.add_argument("--to", metavar="FORMAT", help="hf, torch_dist, fsdp_dtensor or nemo2")
    parser.add_argument(
        "--hf-model", metavar="DIR_OR_HUB_ID", help="names, dtypes, config and tokenizer come from there, never a value"
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="of floating-point tensors (default: the model's)")
    parser.add_argument(
        "--not-strict", action="store_true", help="--to hf: write what there is, without what is missing"
    )
    add_mesh(parser)
    add_more(parser)
    add_nemo(parser)
    options.add_run(parser)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Sizes of the mesh that will load the output: its files are the same for each, and say which it is meant for."""
    group = parser.add_argument_group("the mesh that Megatron will load it on (any other does too)")
    for axis, what in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context"), ("ep", "expert")):
        group.add_argument(f"--{axis}", type=int, default=1, metavar="N", help=f"{what} parallel ranks")


def add_more(parser: argparse.ArgumentParser) -> None:
    """What both spellings of a conversion have."""
    group = parser.add_argument_group("what is read and written")
    group.add_argument("--target", metavar="LOADER", help="whose loader fsdp_dtensor is written for: bridge (default), "
                       "bridge-main, megatron-lm, qwen3.5-recipe or any")  # fmt: skip
    group.add_argument(
        "--iteration", type=int, metavar="N", help="of a run that is read (default: the newest complete one)"
    )
    group.add_argument(
        "--make-vocab-size-divisible-by", type=int, metavar="N", help="pad Megatron's vocabulary to a multiple of N*tp"
    )
    group.add_argument("--max-shard-size", metavar="SIZE", help="of the files written, as in 5GB")
    group.add_argument(
        "--save-tokenizer", action=argparse.BooleanOptionalAction, default=True, help="carry tokenizer files"
    )


def add_nemo(parser: argparse.ArgumentParser) -> None:
    """The tokenizer, what NeMo's weights may not say of themselves, and the paths as NVIDIA's script has them."""
    group = parser.add_argument_group("tokenizer, and NeMo")
    group.add_argument("--tokenizer-path", metavar="PATH", help="of a SentencePiece model, a directory or a hub id "
                       "(default: the tokenizer beside the model)")  # fmt: skip
    group.add_argument(
        "--tokenizer-library", metavar="LIBRARY", help="sentencepiece or huggingface (default: by files)"
    )
    group.add_argument(
        "--model-id", metavar="ID", help="NVIDIA's name of the model, for what a checkpoint does not say of itself"
    )
    group.add_argument("--input-path", metavar="SRC", help=argparse.SUPPRESS)
    group.add_argument("--output-path", metavar="OUT", help=argparse.SUPPRESS)


def chosen(
    args: argparse.Namespace, to: str, dtype: str | None, hf_model: str | None, *, lenient: bool = False
) -> dict[str, Any]:
    """The fields of `ops.convert.Options`."""
    return {
        "to": to, "dtype": dtype, "hf_model": hf_model, "target": args.target, "iteration": args.iteration,
        "tp": args.tp, "pp": args.pp, "cp": args.cp, "ep": args.ep, "strict": not getattr(args, "not_strict", False),
        "vocab_divisor": args.make_vocab_size_divisible_by, "max_shard_size": args.max_shard_size,
        "save_tokenizer": args.save_tokenizer, "verify": args.verify,
        "lenient": lenient,
        **{name: getattr(args, name, None) for name in ("model_id", "tokenizer_path", "tokenizer_library")},
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    source, target, to = _asked(args)
    return write(args, source, target, chosen(args, to.replace("huggingface", "hf"), args.dtype, args.hf_model))


def _asked(args: argparse.Namespace) -> tuple[str, str, str]:
    """Source, output and format, in either spelling; the script's writes NeMo 2 unless it is told otherwise."""
    given = [path for path in (args.source, args.output) if path is not None]
    source = args.input_path if args.input_path is not None else given.pop(0) if given else None
    target = args.output_path if args.output_path is not None else given.pop(0) if given else None
    to = args.to or ("nemo2" if args.input_path is not None else None)
    lacking = [name for name, value in (("SRC", source), ("OUT", target), ("--to", to)) if value is None]
    if source is None or target is None or to is None or given:
        said = f"there is no {', '.join(lacking)}" if lacking else f"{given[0]} is one path too many"
        raise InputError(said, hint="reshard convert SRC OUT --to hf (or torch_dist, fsdp_dtensor, nemo2)")
    return source, target, to


_FILES = (".safetensors", ".pt", ".pth", ".bin", ".nemo", ".gguf")
"""Suffixes that nobody gives to a directory."""


def write(args: argparse.Namespace, source: str, target: str, fields: dict[str, Any]) -> int:
    """Prepare, say what the user should know, and carry it out."""
    from reshard.ops.convert import Options, prepare
    from reshard.ops.merge import carry_out

    options.check_named(SRC=source, OUT=target, **{"--hf-model": fields["hf_model"]})
    destination = Path(target)
    if destination.suffix.lower() in _FILES and not destination.is_dir():
        raise OutputError(
            f"{target} is called as a file, and convert writes directories",
            hint=f"name a directory, such as {destination.with_suffix('')}; `reshard merge` makes one file of that",
        )
    prepared = prepare(source, destination, Options(**fields))
    if args.dry_run:
        return show_plan(args, prepared, destination)
    talk(args, prepared.notices)
    with output.progress(prepared.plan.nbytes, "converting", args.quiet) as progress:
        converted = carry_out(
            prepared, destination, force=args.force, threads=args.threads, block_nbytes=options.block_nbytes(args),
            progress=progress, spread=options.spread(args),
        )  # fmt: skip
    return show_result(args, converted)
