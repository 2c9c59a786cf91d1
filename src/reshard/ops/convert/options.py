"""What a conversion is asked to do, and what cannot be asked of any model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from reshard.core.dtypes import dtype
from reshard.errors import Mismatch, Unsupported, listed
from reshard.formats import huggingface
from reshard.formats.fsdp_dtensor import DEFAULT_TARGET, Target, target_named
from reshard.ops.nemo2 import LIBRARIES
from reshard.ops.reference import is_float8

Format = Literal["hf", "torch_dist", "fsdp_dtensor", "nemo2"]
FORMATS: tuple[Format, ...] = ("hf", "torch_dist", "fsdp_dtensor", "nemo2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a conversion does."""

    to: Format = "hf"
    dtype: str | None = None
    """Of floating-point tensors, but for those that a family keeps in float32."""
    hf_model: str | None = None
    """A HuggingFace directory or hub id: names, dtypes, config and tokenizer. None of its values is read."""
    target: str | None = None
    """Whose loader an fsdp_dtensor directory is for; Megatron-Bridge's by default."""
    iteration: int | None = None
    """Of a run to be read; the newest complete one by default."""
    tp: int = 1
    cp: int = 1
    ep: int = 1
    pp: int = 1
    vocab_divisor: int | None = None
    """Rows of the vocabulary are padded to a multiple of this times `tp`, on the way into Megatron."""
    strict: bool = True
    """Whether a tensor that is missing is an error."""
    max_shard_size: str | int | None = None
    """Of the files that are written, such as `5GB`, or in bytes."""
    save_tokenizer: bool = True
    model_id: str | None = None
    """NVIDIA's name of the model: what a checkpoint does not say of itself."""
    tokenizer_path: str | None = None
    """Of NeMo's tokenizer; the one beside the model by default."""
    tokenizer_library: str | None = None
    """`sentencepiece` or `huggingface`; by its files where it is not said."""
    verify: bool = False
    lenient: bool = False
    """Whether an option that contradicts the rest is only said to change nothing, as in a script for another system."""

    def __post_init__(self) -> None:
        for name in ("hf_model", "model_id", "tokenizer_path"):
            named = getattr(self, name)
            object.__setattr__(self, name, named if named is None else os.fspath(named))

    def record(self) -> dict[str, Any]:
        """What differs from the defaults, for the manifest."""
        default = Options()
        changed = [n for n in self.__slots__ if n == "to" or getattr(self, n) != getattr(default, n)]
        return {name: getattr(self, name) for name in changed if name != "lenient"}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Options:
        """The options that a manifest holds, which were judged when it was written."""
        return msgspec.convert({**record, "lenient": True}, cls)

    @property
    def loader(self) -> Target:
        """Whose loader an fsdp_dtensor directory is for. Raises Unsupported for one that is not known."""
        return target_named(self.target) if self.target is not None else DEFAULT_TARGET

    @property
    def max_nbytes(self) -> int | None:
        """The size that no file may exceed, where one was asked for."""
        return huggingface.parse_size(str(self.max_shard_size)) if self.max_shard_size is not None else None


def format_named(name: str) -> Format:
    """The format of this name. Raises Unsupported, listing all."""
    for known in FORMATS:
        if name == known:
            return known
    raise Unsupported(f"no format {name!r} to convert to", hint=f"one of {listed(FORMATS)}")


def check(options: Options) -> None:
    """Raise Unsupported or Mismatch for options that no model can be converted with."""
    target_named(options.target or DEFAULT_TARGET.name)
    if options.max_shard_size is not None:
        huggingface.parse_size(str(options.max_shard_size))
    if options.dtype is not None and not _is_weights(options.dtype):
        raise Unsupported(
            f"--dtype {options.dtype}: weights are written in float32, bfloat16, float16 or float64",
            hint="name one of these; a model is quantized by the program that will serve it, once it is written",
        )
    if options.vocab_divisor is not None and options.vocab_divisor < 1:
        raise Mismatch(
            f"--make-vocab-size-divisible-by {options.vocab_divisor}: it begins at 1",
            hint="128 is what Megatron takes by default",
        )
    if options.tokenizer_library not in (None, *LIBRARIES):
        raise Unsupported(
            f"--tokenizer-library {options.tokenizer_library}: {' and '.join(LIBRARIES)} are written",
            hint="leave it out: the files of a tokenizer say what it is",
        )
    if not options.strict and options.to != "hf":
        raise Unsupported(
            f"--not-strict --to {options.to}: no loader of Megatron takes a model that lacks tensors",
            hint="leave --not-strict out, or convert --to hf",
        )


def _is_weights(name: str) -> bool:
    """Whether a dtype is known, and one of whole weights."""
    try:
        found = dtype(name)
    except Unsupported:
        return False
    return found.kind == "float" and not is_float8(found)


def check_mesh(options: Options) -> None:
    """Raise Mismatch for a mesh that cannot be, or that the ranks of this run do not divide into."""
    sizes = {"tp": options.tp, "cp": options.cp, "ep": options.ep, "pp": options.pp}
    wrong = [f"--{name} {size}" for name, size in sizes.items() if size < 1]
    if wrong:
        raise Mismatch(f"{listed(wrong)}: a mesh axis has one rank or more", hint="leave out what is not parallel")
    world, ranks = os.environ.get("WORLD_SIZE", "1"), options.tp * options.cp * options.ep
    if world.isdecimal() and int(world) > 1 and ranks > 1 and int(world) % ranks:
        raise Mismatch(
            f"WORLD_SIZE {world} is not a multiple of tp*cp*ep, {ranks}",
            hint="the files are the same for every mesh: leave --tp, --cp and --ep out, or start that many ranks",
        )


def unheeded(options: Options, *, is_megatron: bool) -> tuple[str, ...]:
    """A sentence about each option that changes nothing, by what is read and written.

    Raises Mismatch, listing all, where such an option contradicts the others, unless `lenient`.
    """
    said = _contradictions(options)
    if said and not options.lenient:
        raise Mismatch(
            "; ".join(f"{option}: {why}" for option, why in said), hint="leave out what is not meant, or mend --to"
        )
    return tuple(f"{option} changes nothing: {why}" for option, why in (*said, *_needless(options, is_megatron)))


def _contradictions(options: Options) -> list[tuple[str, str]]:
    """(option, why) of those that ask for what cannot be had of the format that is written."""
    to = f"--to {options.to}"
    said = []
    if options.target is not None and options.to != "fsdp_dtensor":
        said.append((f"--target {options.target}", f"fsdp_dtensor alone is written for a loader, and this is {to}"))
    if options.vocab_divisor is not None and options.to == "hf":
        said.append(
            (f"--make-vocab-size-divisible-by {options.vocab_divisor}", "a HuggingFace model has no rows that only pad")
        )
    tokenizer = {"--tokenizer-path": options.tokenizer_path, "--tokenizer-library": options.tokenizer_library}
    for name, value in tokenizer.items():
        if value is not None and not options.save_tokenizer:
            said.append((f"{name} {value}", "--no-save-tokenizer writes none"))
    if options.to != "nemo2" and options.tokenizer_path is None and options.tokenizer_library is not None:
        library = options.tokenizer_library
        said.append((f"--tokenizer-library {library}", f"no --tokenizer-path was named, and this is {to}"))
    return said


def _needless(options: Options, is_megatron: bool) -> list[tuple[str, str]]:
    """(option, why) of those that are granted without them."""
    said = []
    axes = {name: size for name in ("tp", "pp", "cp", "ep") if (size := getattr(options, name)) > 1}
    if options.to == "hf" and axes:
        said.append((_mesh(axes), "a HuggingFace directory is the same for every mesh"))
    if options.to == "nemo2":
        axes = {name: size for name, size in axes.items() if name != "tp" or options.vocab_divisor is None}
        said += [(_mesh(axes), "NeMo 2 takes its mesh from the trainer")] if axes else []
    if not options.strict and not is_megatron:
        said.append(("--not-strict", "a model under HuggingFace's names is read whole or not at all"))
    if options.model_id is not None and not is_megatron:
        said.append((f"--model-id {options.model_id}", "config.json says it all, and does not contradict it"))
    return said


def _mesh(axes: Mapping[str, int]) -> str:
    return " ".join(f"--{name} {size}" for name, size in axes.items())
