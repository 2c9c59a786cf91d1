"""torch's sharded safetensors, as HuggingFaceStorageWriter(save_distributed=True) writes them.

    shard-RRRRR-model-IIIII-of-NNNNN.safetensors    what rank R - 1 holds of model file I
    ├─ __metadata__["DCP_SHARDING_INFO"]            JSON {FQN: {"saved_offsets": [...]}}: where each part begins
    └─ the parts, each an ordinary tensor
    .hf_metadata/                                   NeMo AutoModel: config, tokenizer, fqn_to_file_index_mapping.json
    sharded/                                        where the shards go when torch also consolidates them

There is no index and no global shape: a tensor reaches as far as its last part, and the parts must tile that. A part
that is missing at the very end cannot be seen, so the numbers of ranks and model files must be without gaps.

Source: pytorch `torch/distributed/checkpoint/hf_storage.py` and `_hf_utils.py`, 2.9 to 2.15; NeMo AutoModel 0.2
`components/checkpoint`.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from reshard.core.box import Box, Shape
from reshard.core.checkpoint import Checkpoint, Origin
from reshard.core.tensor import Concat, Tensor
from reshard.errors import Corrupt, Incomplete, InputError, NotFound, listed
from reshard.formats import huggingface, safetensors
from reshard.storage.files import Files, LazySource

NAME = "dcp_safetensors"
SHARDED = "sharded"
METADATA = ".hf_metadata"
_SHARD = re.compile(r"shard-(?P<rank>\d{5})-model-(?P<index>\d{5})-of-(?P<count>\d{5})\.safetensors")
_SHARDING_INFO = "DCP_SHARDING_INFO"
_MAPPING = "fqn_to_file_index_mapping.json"


class _Part(msgspec.Struct):
    saved_offsets: list[int]


def matches(names: frozenset[str]) -> bool:
    """Whether a directory with these names in it holds such shards."""
    return any(_SHARD.fullmatch(name) for name in names)


def open(path: Path) -> Checkpoint:
    """The checkpoint in a directory, or in its `sharded/`; only headers are read.

    Raises Incomplete when shard files are missing or the parts of a tensor leave a hole, Corrupt when headers
    contradict each other.
    """
    directory, names = _shards(path)
    files = Files()
    shards = [safetensors.read(directory / name, files) for name in names]
    parts: dict[str, list[tuple[Box, Tensor, Path]]] = defaultdict(list)
    for shard in shards:
        for fqn, place in _places(shard).items():
            parts[fqn].append((place, shard.tensors[fqn], shard.path))
    cuts: dict[str, int] = defaultdict(int)
    tensors: dict[str, Tensor] = {}
    for fqn, found in parts.items():
        tensors[fqn], cut = _assembled(directory, fqn, found)
        cuts[cut] += 1
    beside = next((d for d in (directory / METADATA, directory, path) if (d / "config.json").is_file()), directory)
    config, assets = huggingface.companions(beside)
    _check_mapping(directory / METADATA / _MAPPING, tensors, config)
    return Checkpoint(
        tensors,
        Origin(
            directory,
            NAME,
            f"torch {'(NeMo AutoModel)' if (directory / METADATA).is_dir() else 'HuggingFaceStorageWriter'}",
            world_size=max(int(_match(name)["rank"]) for name in names),
            placements=tuple(f"{what} ({n} tensors)" for what, n in sorted(cuts.items(), key=lambda item: -item[1])),
            files=tuple(directory / name for name in names),
        ),
        LazySource(files),
        config=config,
        assets=assets,
    )


def _shards(path: Path) -> tuple[Path, list[str]]:
    """The directory and its shard files, whose numbers have no gaps."""
    for directory in (path, path / SHARDED):
        names = sorted(n for n in os.listdir(directory) if _SHARD.fullmatch(n)) if directory.is_dir() else []
        if names:
            _check_numbers(directory, names)
            return directory, names
    raise NotFound(f"{path}: no shard-RRRRR-model-IIIII-of-NNNNN.safetensors")


def _check_numbers(directory: Path, names: Sequence[str]) -> None:
    counts = sorted({int(_match(name)["count"]) for name in names})
    if len(counts) > 1:
        raise Corrupt(
            f"{directory} holds shards of models in {listed(map(str, counts))} files",
            hint="they come from different saves: move those that are not wanted away",
        )
    lacking = []
    for field, last in (("rank", 0), ("index", counts[0])):
        numbers = {int(_match(name)[field]) for name in names}
        gaps = sorted(set(range(1, max(last, *numbers) + 1)) - numbers)
        lacking += [f"shard-{n:05d}-*" if field == "rank" else f"*-model-{n:05d}-of-{last:05d}" for n in gaps]
    if lacking:
        raise Incomplete(
            f"{directory}: {len(names)} shard files are there, none of {listed(lacking)}",
            hint="copy them from the ranks that wrote them",
        )


def _match(name: str) -> re.Match[str]:
    match = _SHARD.fullmatch(name)
    assert match
    return match


def _places(shard: safetensors.File) -> dict[str, Box]:
    """Where each tensor of a file lies in the whole one."""
    if _SHARDING_INFO not in shard.metadata:
        raise Corrupt(f"{shard.path}: no {_SHARDING_INFO} in the header: it does not say which parts it holds")
    try:
        info = msgspec.json.decode(shard.metadata[_SHARDING_INFO], type=dict[str, _Part])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{shard.path}: {_SHARDING_INFO} in the header: {error}") from error
    if info.keys() != shard.tensors.keys():
        differing = sorted(info.keys() ^ shard.tensors.keys())
        raise Corrupt(
            f"{shard.path}: the header places {len(info)} tensors and holds {len(shard.tensors)}:"
            f" {listed(differing)} only one of the two"
        )
    places = {}
    for fqn, part in info.items():
        shape = shard.tensors[fqn].shape
        if len(part.saved_offsets) != len(shape) or any(not 0 <= n < 1 << 62 for n in part.saved_offsets):
            raise Corrupt(f"{shard.path}: {fqn}: a part of shape {list(shape)} at {part.saved_offsets}")
        places[fqn] = Box.at(part.saved_offsets, shape)
    return places


def _assembled(directory: Path, fqn: str, found: Sequence[tuple[Box, Tensor, Path]]) -> tuple[Tensor, str]:
    """One tensor of its parts, and how it was cut, in words."""
    first = found[0][1]
    for _, tensor, path in found:
        if tensor.dtype is not first.dtype or len(tensor.shape) != len(first.shape):
            raise Corrupt(
                f"{path}: {fqn} is {tensor.dtype} {list(tensor.shape)}, {found[0][2].name} says {first.dtype}"
                f" {list(first.shape)}"
            )
    shape: Shape = tuple(map(max, zip(*(place.stop for place, _, _ in found), strict=True)))
    grid = [len({place.start[d] for place, _, _ in found if place.size}) for d in range(len(shape))]
    cut = ", ".join(f"Shard({d}) x {n}" for d, n in enumerate(grid) if n > 1) or "whole"
    if len(found) == 1 and not any(found[0][0].start):
        return first, cut
    try:
        return Concat(first.dtype, shape, tuple((place, tensor) for place, tensor, _ in found)), cut
    except InputError as error:
        raise type(error)(
            f"{directory}: {fqn}: {error}",
            hint="a shard file is missing, or a rank saved several parts of this tensor: torch's writer keeps one",
        ) from error


def _check_mapping(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> None:
    """AutoModel lists every FQN of the model beside the shards."""
    if not path.is_file():
        return
    mapping = huggingface.read_json(path)
    tied = {"lm_head.weight"} if config and config.get("tie_word_embeddings") else set()
    missing = sorted(set(mapping) - set(tensors) - tied)
    if missing:
        raise Incomplete(f"{path} lists {len(missing)} tensors that are in no shard: {listed(missing)}")
