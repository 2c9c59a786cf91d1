"""The whole model of a checkpoint that is held: merged, or converted where it is Megatron's; proven in either case."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from reshard.errors import NotFound
from reshard.evaluate.ready import EMA_DIRECTORY
from reshard.formats.detect import MODEL, find
from reshard.storage import manifest

if TYPE_CHECKING:
    from reshard.ops.merge import Merged, Prepared


@dataclass(frozen=True, slots=True)
class Source:
    """What a whole model is made of, and as what."""

    path: Path
    kind: str
    base: str | None
    dtype: str | None


def prepare(source: Source, output: Path) -> Prepared:
    """The plan, from headers alone. Raises InputError for all that headers can reveal."""
    from reshard.ops import convert, merge

    dirname = EMA_DIRECTORY if source.kind == "ema" else None
    part = find(source.path, state_dict_dirname=dirname).part(MODEL)
    if part is not None and part.format == "megatron":
        return convert.prepare(source.path, output, convert.Options(hf_model=source.base, dtype=source.dtype))
    options = merge.Options(base=source.base, dtype=source.dtype, state_dict_dirname=dirname)
    return merge.prepare(source.path, output, options)


def write(prepared: Prepared, output: Path) -> Merged:
    """Write and prove it. What stands of an attempt that was interrupted is kept; what else is there is replaced."""
    from reshard.ops.merge import carry_out

    return carry_out(prepared, output, force=True)


def is_there(output: Path) -> bool:
    """Whether a whole model is there: it gets its name only when it is complete."""
    try:
        manifest.read(output)
    except NotFound:
        return False
    return True


def digest(output: Path) -> str:
    """Of the weights, by their manifest: the same tensors have the same, whatever lies beside them."""
    records = [
        f"{segment.fqn}\0{segment.dtype} {segment.shape} {segment.xxh3_128}\n"
        for file in manifest.read(output).files.values()
        for segment in file.segments
        if segment.fqn
    ]
    return xxhash.xxh3_128_hexdigest("".join(sorted(records)).encode())
