"""inspect, of a Megatron checkpoint: which model it holds, and whether `convert` would take it. Headers only.

settings, or a config.json beside    -> what convert makes of them -> what convert would refuse
neither                              -> the names alone            -> gaps among layers and experts, rows that are lost
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from reshard.core.tensor import Source, Tensor
from reshard.dialects import apply, megatron, recognise
from reshard.dialects.table import Family
from reshard.errors import Incomplete, InputError, Unsupported, listed
from reshard.families import families
from reshard.formats import huggingface
from reshard.formats.megatron import MegatronCheckpoint
from reshard.ops.convert.model import named, understood
from reshard.ops.convert.options import Options
from reshard.ops.convert.to_huggingface import as_huggingface
from reshard.ops.family import by_config


@dataclass(frozen=True, slots=True)
class Judged:
    """The model in a Megatron checkpoint, as far as headers tell."""

    family: str
    """What it is and what the hub calls it, or why that is not known."""
    complete: bool | None
    """Whether convert would take it. None where that could not be judged."""
    problem: str = ""
    """Why not, or why it could not be judged."""
    hint: str = ""
    """What to do about it."""
    made_from: str | None = None
    """The HuggingFace model that was trained, where the checkpoint names it."""
    needs_model: bool = False
    """Whether convert has to be told the HuggingFace model."""
    notices: tuple[str, ...] = ()
    """What is in doubt about it."""


def judge(opened: MegatronCheckpoint) -> Judged:
    """Hold the tensors against the family and the config that convert would take them for."""
    made_from = _made_from(opened)
    try:
        found = understood(opened, Options(), _looks_alike)
    except Unsupported as error:
        needs = "--hf-model" in (error.hint or "")
        return replace(_refused("not recognised", error), made_from=made_from, needs_model=needs)
    except InputError as error:
        untold = opened.located.huggingface is None and recognise.lacking(opened.settings.values)
        judged = _by_names(opened, untold) if untold else _refused("", error)
        return replace(judged, made_from=made_from)
    family = f"{found.family.name} ({', '.join(map(str, found.config.get('architectures') or ()))})"
    try:
        as_huggingface(named(opened, found, Options()), Options())
    except InputError as error:
        return replace(_refused(family, error), made_from=made_from)
    return Judged(family, True, made_from=made_from, notices=found.notices)


def _refused(family: str, error: InputError) -> Judged:
    """A model that convert refuses: it lacks something, or it is of a kind that is not judged at all."""
    return Judged(family, None if isinstance(error, Unsupported) else False, str(error), error.hint or "")


def _looks_alike(one: Tensor, other: Tensor, _: Source) -> bool:
    """What headers tell of whether two tensors hold the same."""
    return one.dtype is other.dtype and one.shape == other.shape


# ------------------------------------------------------------------------------------------------- without settings


def _by_names(opened: MegatronCheckpoint, untold: list[str]) -> Judged:
    """What names alone tell, of a checkpoint whose settings do not say `untold`."""
    stored = opened.checkpoint.tensors
    try:
        tensors = megatron.in_memory(stored).tensors
        family = _family(opened, tensors)
        _check_numbers(tensors)
        apply.check_gates(tensors, (match[1] for name in stored if (match := _GATE.fullmatch(name))))
    except InputError as error:
        return replace(_refused("", error), needs_model=True)
    who = "the settings do" if opened.settings.values else "the checkpoint has no settings, and names do"
    problem = f"{who} not say {listed(untold)}: convert holds its tensors against --hf-model"
    return Judged(family, None, problem, needs_model=True)


def _family(opened: MegatronCheckpoint, names: Iterable[str]) -> str:
    """The one family that has such names, or of those that have the one that ms-swift says."""
    fit = _families_with(names)
    said = by_config({"model_type": _swift(opened).get("hf_model_type")})
    if said is not None and said in fit:
        return f"{said.name}, by args.json"
    return f"{fit[0].name}, by the names of its tensors" if len(fit) == 1 else "not told by the settings"


def _families_with(names: Iterable[str]) -> list[Family]:
    """The families whose tables have all these names, and of which no row is missing that every model has."""
    templates = {_NUMBER.sub("#", name) for name in names}
    fit = []
    for family in families():
        rows = _templates(family)
        if templates <= rows.keys():
            have = {hub for template in templates for hub in rows[template]}
            if all(set(row.hubs) <= have for row in family.rows if not row.on and not row.variant):
                fit.append(family)
    return fit


def _templates(family: Family) -> Mapping[str, tuple[str, ...]]:
    """The hub's names by the dialect's, `#` for every number in the latter."""
    return {_NUMBER.sub("#", _PLACEHOLDER.sub("#", row.name)): row.hubs for row in family.rows}


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=weight)\d+$|(?<=bias)\d+$")
_PLACEHOLDER = re.compile(r"\{\w+\}")


def _check_numbers(names: Iterable[str]) -> None:
    """Raise Incomplete for layers or experts without a tensor between or before others that have some."""
    layers: dict[str, set[int]] = {}
    experts: dict[str, set[int]] = {}
    for name in names:
        for pattern, found in ((_LAYER, layers), (_EXPERT, experts)):
            match = pattern.match(name)
            if match is not None:
                found.setdefault(match[1], set()).add(int(match[2]))
    num_experts = max((1 + max(numbers) for numbers in experts.values()), default=0)
    gaps = [(f"{path}.", numbers, 1 + max(numbers)) for path, numbers in layers.items()]
    gaps += [(path, numbers, num_experts) for path, numbers in experts.items()]
    count = sum(wanted - len(numbers) for _, numbers, wanted in gaps)
    if count:
        first = islice(_missing(gaps), 10)
        more = f" and {count - 10} more" if count > 10 else ""
        raise Incomplete(
            f"{count} layers or experts of those that are numbered are missing: {', '.join(first)}{more}",
            hint="is every shard there?",
        )


def _missing(gaps: Iterable[tuple[str, set[int], int]]) -> Iterator[str]:
    return (f"{path}{n}" for path, numbers, wanted in gaps for n in range(wanted) if n not in numbers)


_LAYER = re.compile(r"((?:.+?\.)?layers)\.(\d{1,7})\.")
_EXPERT = re.compile(r"(.+\.experts\.linear_fc[12]\.(?:weight|bias))(\d{1,7})$")


_GATE = re.compile(r"(?:(?:model|module)\.)*(.+\.linear_fc1\.weight\d*)_w")
"""A tensor of a gate alone, and the name that it has in memory, with its up projection."""


# ------------------------------------------------------------------------------------------------- what trained it


def _made_from(opened: MegatronCheckpoint) -> str | None:
    """The HuggingFace model that Megatron-Bridge, slime or ms-swift trained, as the checkpoint names it."""
    settings = opened.settings
    said = (settings.hf_model_id, settings.values.get("hf_checkpoint"), _swift(opened).get("model"))
    return next((name[:300] for name in said if isinstance(name, str) and name), None)


def _swift(opened: MegatronCheckpoint) -> Mapping[str, Any]:
    """The arguments that ms-swift keeps beside its checkpoints."""
    if opened.located.writer != "ms-swift":
        return {}
    path = next((p / "args.json" for p in opened.located.companions if (p / "args.json").is_file()), None)
    try:
        return huggingface.read_json(path) if path is not None else {}
    except InputError:
        return {}
