"""What the optimizer of a tag holds: the float32 weights, and its states for each of them.

The ranks' files must be of one save, and all of them there. Where they also say by `param_slice_mappings` what lies
where, that must agree with the order of `param_shapes`; for bfloat16 without ZeRO it is the only order there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from reshard.core.box import Shape
from reshard.core.checkpoint import KeyPath
from reshard.core.tensor import Tensor
from reshard.errors import Corrupt, listed
from reshard.formats.deepspeed_directory import Listing, check_ranks
from reshard.formats.deepspeed_partitions import Groups, end_to_end, interleaved
from reshard.formats.deepspeed_states import ModelStates, OptimStates, count_of, read
from reshard.formats.torch_distributed import plain_tensor
from reshard.formats.torch_tensor import walk
from reshard.storage.files import Files


@dataclass(slots=True)
class Trained:
    """What the optimizer holds: fp32 weights by FQN, and its states by FQN and key."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    states: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    objects: dict[KeyPath, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """Kinds of states that do not lie like the weights."""
    files: list[Path] = field(default_factory=list)
    num_ranks: int | None = None
    placement: str = ""
    """How the weights are cut, in words."""
    is_stage3: bool = False


def from_partitions(path: Path, listing: Listing, model: ModelStates, files: Files) -> Trained:
    """The fp32 weights and optimizer states of a tag with one model-parallel rank."""
    optim = _of_one_save(path, listing, model, files)
    first = optim[0]
    shapes = model.groups or _shapes_by_slices(model, optim)
    if not first.is_stage3 and len(first.parts) != len(shapes):
        raise Corrupt(f"{path}: {len(first.parts)} groups of weights, {len(shapes)} of shapes in param_shapes")
    lay_out = interleaved if first.is_stage3 else end_to_end
    if not first.is_stage3:
        _check_slices(optim, shapes)
    weights = lay_out([states.parts for states in optim], shapes, str(path)) if first.parts else {}
    placement = f"ZeRO {'3: each parameter' if first.is_stage3 else '1 or 2: flat groups'} cut over {len(optim)} ranks"
    found = Trained(weights, num_ranks=len(optim), placement=placement, is_stage3=first.is_stage3)
    found.files = [states.file.path for states in optim]
    _add_states(found, optim, shapes, lay_out)
    return found


def _of_one_save(path: Path, listing: Listing, model: ModelStates, files: Files) -> list[OptimStates]:
    """The optim_states files by rank: all there are of one save, with the same groups in each."""
    ranks = {rank: listing.optim[rank, mp] for rank, mp in sorted(listing.optim)}
    optim = [OptimStates.of(file) for file in read(path, ranks.values(), files)]
    counts = {states.num_ranks for states in optim} - {None} or {count_of(model.get("dp_world_size"))}
    if len(counts) > 1:
        raise Corrupt(f"{path}: the files are of {listed(map(str, sorted(filter(None, counts))))} ranks: several saves")
    check_ranks(path, next(iter(ranks.values())), ranks, counts.pop() or len(ranks))
    first = optim[0]
    for states in optim:
        described = [(part.dtype, states.is_stage3) for part in states.parts]
        if described != [(part.dtype, first.is_stage3) for part in first.parts]:
            raise Corrupt(f"{states.file.path}: other groups than in {first.file.path.name}")
    return optim


def _shapes_by_slices(model: ModelStates, optim: Sequence[OptimStates]) -> tuple[dict[str, Shape], ...]:
    """What `param_shapes` would be, for bfloat16 without ZeRO: order by `param_slice_mappings`, shapes by `module`."""
    groups = []
    for number in range(len(optim[0].parts)):
        places: dict[str, int] = {}
        first = 0
        for states in optim:
            for name, (start, _) in states.slices[number].items():
                places.setdefault(name, first + start)
            first += states.parts[number].size
        refs = {name: plain_tensor(model.module.get(name)) for name in sorted(places, key=lambda n: places[n])}
        groups.append({name: tuple(ref.size) for name, ref in refs.items() if ref is not None})
    return tuple(groups)


def _check_slices(optim: Sequence[OptimStates], shapes: Sequence[Mapping[str, Shape]]) -> None:
    """Raise Corrupt when a rank says of a parameter that it lies elsewhere than the order of `param_shapes` does."""
    for number, group in enumerate(shapes):
        ends = list(accumulate(math.prod(shape) for shape in group.values()))
        places = {name: (end - math.prod(group[name]), end) for name, end in zip(group, ends, strict=True)}
        first = 0
        for states in optim:
            last = first + states.parts[number].size
            for name, (start, numel) in states.slices[number].items():
                a, b = places.get(name, (0, 0))
                if (first + start, numel) != (max(a, first), min(b, last) - max(a, first)):
                    raise Corrupt(
                        f"{states.file.path}: {name} is elements {a} to {b} of group {number} by param_shapes, and"
                        f" {first + start} to {first + start + numel} here by param_slice_mappings"
                    )
            first = last


def _add_states(
    found: Trained,
    optim: Sequence[OptimStates],
    shapes: Sequence[Mapping[str, Shape]],
    lay_out: Callable[[Groups, Sequence[Mapping[str, Shape]], str], dict[str, Tensor]],
) -> None:
    """The optimizer's states: flat ones cut as the weights are, others once for each parameter of their group."""
    first = optim[0]
    for key in dict.fromkeys(key for group in first.states for key in group):
        if any(_is_number(group.get(key)) for group in first.states):
            _add_numbers(found, first, shapes, key)
            continue
        groups = [_flat_states(states, key) for states in optim]
        if any(None in rank for rank in groups):
            found.left_out.append(key)
            continue
        ranks = [[tensor for tensor in rank if tensor is not None] for rank in groups]
        cut = lay_out(ranks, shapes, f"{first.file.path.parent}: {key}")
        found.states |= {(name, key): tensor for name, tensor in cut.items()}
    for path, leaf in walk(first.options, ("optimizer", "param_groups")):
        found.objects[path] = leaf


def _flat_states(states: OptimStates, key: str) -> list[Tensor | None]:
    """A rank's part of a state, group by group; None where it is not as long as the weights (and their padding)."""
    parts: list[Tensor | None] = []
    for group, weights in zip(states.states, states.parts, strict=True):
        leaf = group.get(key)
        ref = plain_tensor(leaf)
        fits = ref is not None and len(ref.size) == 1 and ref.size[0] >= weights.size
        parts.append(states.file.tensor(ref) if ref is not None and fits else None)
    return parts


def _is_number(leaf: Any) -> bool:
    ref = plain_tensor(leaf)
    return isinstance(leaf, int | float) if ref is None else not ref.size


def _add_numbers(found: Trained, states: OptimStates, shapes: Sequence[Mapping[str, Shape]], key: str) -> None:
    by_group = len(shapes) == len(states.states)
    for number, group in enumerate(shapes):
        leaf = states.states[number if by_group else 0].get(key)
        ref = plain_tensor(leaf)
        for name in group:
            if ref is not None:
                found.states[name, key] = states.file.tensor(ref)
            elif leaf is not None:
                found.objects["optimizer", "state", name, key] = leaf
