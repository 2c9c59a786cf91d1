"""The files of one tag of DeepSpeed, by what their names say, and which of them must be there."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard.errors import Corrupt, Incomplete, Unsupported, listed

UNIVERSAL = "zero"
"""The directory of a universal checkpoint's parameters."""

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d{1,9})_)?mp_rank_(?P<mp>\d{1,9})_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d{1,9})_mp_rank_(?P<mp>\d{1,9})_optim_states\.pt")
_LAYER = re.compile(r"layer_(?P<layer>\d{1,9})(?:-(?P<part>[\w-]+))?-model_states\.pt")
_EXPERT = re.compile(r"layer_(?P<layer>\d{1,9})_expert_(?P<expert>\d{1,9})_mp_rank_(?P<mp>\d{1,9})_model_states\.pt")
_EXPERT_OPTIM = re.compile(r"expp_rank_\d{1,9}_mp_rank_\d{1,9}_optim_states\.pt")
FP32 = "fp32"
"""The file of a parameter's weights in there, without `.pt`; others are named like states of the optimizer."""
COPY_AGAIN = "copy the missing files from the nodes that wrote them, or use an earlier checkpoint"
"""A hint."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one tag, by what they are."""

    model: Mapping[tuple[int | None, int], str]
    """By ZeRO-3 rank (None for ZeRO 0 to 2) and model-parallel rank."""
    optim: Mapping[tuple[int, int], str]
    """By data-parallel and model-parallel rank."""
    layers: Mapping[int, tuple[str, ...]]
    """By number of the pipeline layer."""
    experts: Mapping[tuple[int, int], str]
    """By layer and expert."""
    expert_optim: tuple[str, ...]
    """The optimizer's files of experts."""
    universal: bool
    """Whether it is a universal checkpoint."""

    @classmethod
    def of(cls, path: Path) -> Listing:
        """What is in a directory. Raises Corrupt when two files claim one place."""
        model: dict[tuple[int | None, int], str] = {}
        optim: dict[tuple[int, int], str] = {}
        layers: dict[int, list[str]] = defaultdict(list)
        experts: dict[tuple[int, int], str] = {}
        expert_optim = []
        for name in sorted(os.listdir(path)):
            if match := _MODEL.fullmatch(name):
                rank = None if match["rank"] is None else int(match["rank"])
                _claim(model, (rank, int(match["mp"])), name, path)
            elif match := _OPTIM.fullmatch(name):
                _claim(optim, (int(match["rank"]), int(match["mp"])), name, path)
            elif match := _EXPERT.fullmatch(name):
                _claim(experts, (int(match["layer"]), int(match["expert"])), name, path)
            elif match := _LAYER.fullmatch(name):
                layers[int(match["layer"])].append(name)
            elif _EXPERT_OPTIM.fullmatch(name):
                expert_optim.append(name)
        ordered = {layer: tuple(layers[layer]) for layer in sorted(layers)}
        return cls(model, optim, ordered, dict(sorted(experts.items())), tuple(expert_optim), is_universal(path))

    @property
    def zero3_ranks(self) -> dict[int, str]:
        """The model_states files of ZeRO 3 by rank."""
        ranks = {rank: name for (rank, _), name in self.model.items() if rank is not None}
        return dict(sorted(ranks.items()))

    @property
    def mp_ranks(self) -> list[int]:
        """The model-parallel ranks that wrote something."""
        return sorted({mp for _, mp in (*self.model, *self.optim)})

    @property
    def names(self) -> list[str]:
        """Of all files but a universal checkpoint's parameters."""
        layers = [name for names in self.layers.values() for name in names]
        return [*self.model.values(), *self.optim.values(), *layers, *self.experts.values(), *self.expert_optim]


def _claim(found: dict[Any, str], key: object, name: str, path: Path) -> None:
    if key in found:
        raise Corrupt(
            f"{path}: {found[key]} and {name} are of the same rank",
            hint="one of them is left over from another run: move it away",
        )
    found[key] = name


def is_state_file(name: str) -> bool:
    """Whether DeepSpeed names a file of a tag like this."""
    return any(pattern.fullmatch(name) for pattern in (_MODEL, _OPTIM, _EXPERT, _LAYER, _EXPERT_OPTIM))


def is_universal(path: Path) -> bool:
    """Whether a directory holds a universal checkpoint."""
    zero = path / UNIVERSAL
    return zero.is_dir() and any((zero / name / f"{FP32}.pt").is_file() for name in sorted(os.listdir(zero)))


def matches(path: Path, names: Iterable[str]) -> bool:
    """Whether a directory with these names in it is a tag's or a universal checkpoint."""
    return any(is_state_file(name) for name in names) or is_universal(path)


def check_ranks(path: Path, example: str, ranks: Mapping[int, str], count: int) -> None:
    """Raise Incomplete naming the files that are missing or too many."""
    missing = lacking(ranks, count)
    if missing:
        names = (re.sub(r"(?<=zero_pp_rank_)\d+", str(rank), example) for rank in missing)
        there = sum(rank < count for rank in ranks)
        raise Incomplete(f"{path}: {count - there} of {count} ranks are missing: {listed(names)}", hint=COPY_AGAIN)
    extra = [name for rank, name in ranks.items() if rank >= count]
    if extra:
        raise Incomplete(
            f"{path}: {count} ranks wrote this, and there are files of more: {listed(extra)}",
            hint="they are left over from another save, which this one may have overwritten in part",
        )


def lacking(there: Collection[int], count: int) -> list[int]:
    """Which of so many numbers are not there; not all of them where a file claims a count beyond measure."""
    return [number for number in range(min(count, len(there) + 10_000)) if number not in there]


def refuse_tensor_parallel(path: Path, listing: Listing) -> None:
    """Raise Unsupported unless there is one model-parallel rank, the first."""
    if listing.mp_ranks != [0]:
        what = "tensor parallel" if 0 in listing.mp_ranks else "without the first model-parallel rank"
        raise Unsupported(
            f"{path} is {what}: it holds mp_rank {listed(f'{mp:02d}' for mp in listing.mp_ranks)}, and how their"
            " weights join is not stored",
            hint="convert it to a universal checkpoint with DeepSpeed's ds_to_universal first",
        )


def in_order(names: Mapping[tuple[int | None, int], str]) -> list[str]:
    """Model_states files by model-parallel rank, and of each the first ZeRO-3 rank first."""
    return [names[key] for key in sorted(names, key=lambda key: (key[1], -1 if key[0] is None else key[0]))]
