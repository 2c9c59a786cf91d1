"""verify: is an output what was written, and is it what its source says?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from reshard.core.checkpoint import Checkpoint
from reshard.core.dtypes import dtype
from reshard.core.tensor import Stored, Tensor
from reshard.errors import NotFound
from reshard.formats import open_path
from reshard.ops import convert
from reshard.ops.average import Accumulate, prepare_average
from reshard.ops.merge import Options, Prepared, prepare
from reshard.storage import manifest
from reshard.storage.files import Reader, file_extent
from reshard.storage.plan import FilePlan, Plan, Seal, Segment, blocks
from reshard.storage.run import BLOCK_NBYTES, Progress, digest


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found."""

    output: Path
    against: Path | None
    num_files: int
    num_tensors: int
    nbytes: int
    problems: tuple[str, ...]
    """What is wrong, a sentence each. Empty when all is well."""

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    output: str | Path,
    against: str | Path | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Read an output again and hold every byte against its manifest; with `against`, recompute it from the source.

    An output without a manifest, from another tool, can be held against its source alone.
    """
    output = Path(output)
    problems: tuple[str, ...] = ()
    num_files = num_tensors = nbytes = 0
    try:
        held = manifest.verify(output, threads, progress)
        num_files, num_tensors, nbytes, problems = held.num_files, held.num_tensors, held.nbytes, held.problems
    except NotFound as error:
        if not output.exists():
            raise NotFound(f"{output}: no such file or directory") from error
        if against is None:
            raise
    if against is not None and not problems:
        compared, found = _compare(output, Path(against), threads, progress)
        num_tensors = num_tensors or compared
        problems += found
    return Verified(output, None if against is None else Path(against), num_files, num_tensors, nbytes, problems)


def _compare(
    output: Path, against: Path, threads: int | None, progress: Progress | None
) -> tuple[int, tuple[str, ...]]:
    """Number of tensors compared, and what differs between an output and what its source gives."""
    prepared, is_ours = _recomputed(output, against)
    wanted = prepared.checkpoint
    written = open_path(output).located()
    names = _names(written, wanted)
    problems = [f"{fqn} is in the source and not in {output}" for fqn in wanted.tensors if fqn not in names]
    problems += [f"{fqn} is in {output} and not in the source" for fqn in set(written) - set(names.values())]
    pairs = {}
    for fqn, name in names.items():
        a, b = wanted.tensors[fqn], written.tensors[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            problems.append(f"{fqn}: {b.dtype} {list(b.shape)} in {output}, {a.dtype} {list(a.shape)} from the source")
        else:
            pairs[fqn] = (a, b)
    source = _digests({fqn: a for fqn, (a, _) in pairs.items()}, threads, progress)
    target = _digests({fqn: b for fqn, (_, b) in pairs.items()}, threads, None)
    problems += [f"{fqn}: not the values of the source" for fqn in pairs if source[fqn] != target[fqn]]
    if is_ours:
        problems += _companions(output, prepared.plan)
    return len(pairs), tuple(sorted(problems))


def _recomputed(output: Path, against: Path) -> tuple[Prepared, bool]:
    """What the source gives, by the options and the recipe in the manifest; and whether there is a manifest."""
    try:
        held = manifest.read(output)
    except NotFound:
        return prepare(against, output, Options()), False
    conversion = held.source.get("convert")
    if isinstance(conversion, dict):
        return convert.prepare(against, output, convert.Options.recorded(conversion)), True
    options = Options.recorded(held.options)
    recipe = held.source.get("average")
    if not isinstance(recipe, list):
        return prepare(against, output, options), True
    sources = [Path(str(part["path"])) for part in recipe]
    sources = [path if path.exists() else against / path.name for path in sources]
    accumulate: Accumulate = "float32" if held.source.get("accumulate") == "float32" else "float64"
    return prepare_average(sources, output, options, [float(p["weight"]) for p in recipe], None, accumulate), True


def _companions(output: Path, plan: Plan) -> Iterator[str]:
    """What differs in the files that hold no tensors: config, tokenizer, index."""
    for file in plan.files:
        if any(segment.name or isinstance(segment.payload, Seal) for segment in file.segments):
            continue
        path = output / file.path
        if not path.is_file() or path.stat().st_size != file.nbytes:
            yield f"{path} is not the file that the source gives"
            continue
        there = FilePlan(file.path, (Segment(Stored(dtype("U8"), (file.nbytes,), file_extent(path))),))
        if _digest_of(there) != _digest_of(file):
            yield f"{path} is not the file that the source gives"


def _digest_of(file: FilePlan) -> str:
    hasher = xxhash.xxh3_128()
    reader = Reader()
    for segment in file.segments:
        if isinstance(segment.payload, bytes):
            hasher.update(segment.payload)
        elif isinstance(segment.payload, Tensor):
            for box in blocks(segment.payload, BLOCK_NBYTES):
                hasher.update(segment.payload.read(reader, box).data)
    return hasher.hexdigest()


def _names(written: Checkpoint, wanted: Checkpoint) -> dict[str, str]:
    """FQN of the source to FQN of the output; a `.ckpt` keeps its tensors one level down."""
    plain = {fqn: fqn for fqn in wanted if fqn in written}
    if plain:
        return plain
    ends = {".".join(map(str, written.path(name)[1:])): name for name in written if len(written.path(name)) > 1}
    return {fqn: ends[fqn] for fqn in wanted if fqn in ends}


def _digests(tensors: Mapping[str, Tensor], threads: int | None, progress: Progress | None) -> dict[str, str]:
    plan = Plan((FilePlan("", tuple(Segment(tensor, fqn) for fqn, tensor in tensors.items())),))
    found = digest(plan, threads=threads, progress=progress)
    return {segment.name: found["", index].xxh3_128 for index, _, segment in plan.files[0].placed()}
