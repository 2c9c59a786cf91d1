"""DeepSpeed checkpoints: ZeRO 0 to 3, universal checkpoints, pipeline layers and experts.

    latest                                                  text: the name of the newest tag
    TAG/                                                    global_stepN, pytorch_model (accelerate), or any name
    ├─ mp_rank_MM_model_states.pt                           ZeRO 0 to 2: `module`, the state dict as it was trained
    ├─ zero_pp_rank_R_mp_rank_MM_model_states.pt            ZeRO 3: its parameters are empty; one a rank
    ├─ [bf16_]zero_pp_rank_R_mp_rank_MM_optim_states.pt     the fp32 weights and optimizer states of rank R, flat
    ├─ layer_LL[-model_MM]-model_states.pt                  pipeline: the state dict of one layer
    └─ layer_L_expert_E_mp_rank_MM_model_states.pt          mixture of experts: one expert, by full FQNs
    TAG_universal/
    ├─ mp_rank_00_model_states.pt                           a copy; for ZeRO 3 zero_pp_rank_0_mp_rank_00_...
    └─ zero/FQN/{fp32,exp_avg,exp_avg_sq,step}.pt           {"param": tensor, ...}, or a bare tensor

What is trained is kept twice: in 16 bits in `module`, and in float32 by the optimizer. The model is the second. A group
of parameters is one flat tensor, in the order of `param_shapes`:

    ZeRO 1, 2   rank 0 | rank 1 | ...                the ranks' parts, end to end, are all parameters, end to end
    ZeRO 3      each parameter is cut into ceil(numel / ranks) elements a rank; a rank has its parts end to end

Padding lies at the end of the group or of each parameter. What is not trained is taken from `module`: buffers and,
where there are no `frozen_param_fragments`, frozen parameters. `shared_params` names what is tied.

Source: DeepSpeed `runtime/engine.py`, `runtime/zero/{stage_1_and_2,stage3}.py`, `runtime/pipe/module.py`,
`utils/zero_to_fp32.py` and `checkpoint/ds_to_universal.py`, 0.9 to 0.19.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from reshard.core.box import Shape
from reshard.core.checkpoint import Checkpoint, KeyPath, Origin
from reshard.core.compute import cast
from reshard.core.dtypes import dtype
from reshard.core.tensor import Literal, Tensor, concat, squeeze
from reshard.errors import Corrupt, Incomplete, NotFound, Unsupported, listed
from reshard.formats import torch_save
from reshard.formats.torch_distributed import plain_tensor
from reshard.formats.torch_save import File, Leaves
from reshard.formats.torch_tensor import fqn, walk
from reshard.storage.files import Files, LazySource
from reshard.storage.unpickle import Inert, TensorRef

NAME = "deepspeed"
UNIVERSAL = "zero"
"""The directory of a universal checkpoint's parameters."""

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d{1,9})_)?mp_rank_(?P<mp>\d{1,9})_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d{1,9})_mp_rank_(?P<mp>\d{1,9})_optim_states\.pt")
_LAYER = re.compile(r"layer_(?P<layer>\d{1,9})(?:-(?P<part>[\w-]+))?-model_states\.pt")
_EXPERT = re.compile(r"layer_(?P<layer>\d{1,9})_expert_(?P<expert>\d{1,9})_mp_rank_(?P<mp>\d{1,9})_model_states\.pt")
_EXPERT_OPTIM = re.compile(r"expp_rank_\d{1,9}_mp_rank_\d{1,9}_optim_states\.pt")
_FP32 = "fp32"
_HANDLED = ("module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")
"""Keys of a model_states file whose values the model is made of."""
_COPY_AGAIN = "copy the missing files from the nodes that wrote them, or use an earlier checkpoint"


# ------------------------------------------------------------------------------------------------------------ listing


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
    universal: bool

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
    def mp_ranks(self) -> list[int]:
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
    return zero.is_dir() and any((zero / name / f"{_FP32}.pt").is_file() for name in sorted(os.listdir(zero)))


def matches(path: Path, names: Iterable[str]) -> bool:
    """Whether a directory with these names in it is a tag's or a universal checkpoint."""
    return any(is_state_file(name) for name in names) or is_universal(path)


# ------------------------------------------------------------------------------------------------------------ border


def _tensor(file: File, leaf: Any, what: str) -> Tensor:
    """A dense tensor of a file. Raises Corrupt when it is none."""
    ref = plain_tensor(leaf)
    if ref is None:
        raise Corrupt(f"{file.path}: {what} is a {type(leaf).__name__}, not a tensor")
    return file.tensor(ref)


def _entry(file: File, value: Any, key: str, *kinds: type) -> Any:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, kinds):
        raise Corrupt(f"{file.path}: {key!r} is {'missing' if found is None else f'a {type(found).__name__}'}")
    return found


def _dict(file: File, value: Any, what: str) -> dict[str, Any]:
    """A dict with text for keys; None counts as empty."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Corrupt(f"{file.path}: {what} is not a dict by FQN")
    return value


def _shapes(file: File, value: Any, what: str) -> dict[str, Shape]:
    shapes = _dict(file, value, what)
    for name, shape in shapes.items():
        if not isinstance(shape, tuple) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in shape):
            raise Corrupt(f"{file.path}: {what} has no shape for {name}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _count(value: Any) -> int | None:
    """A number of ranks: one, or the largest of a list (experts have fewer than the rest)."""
    counts = value if isinstance(value, list | tuple) else [value]
    counts = [count for count in counts if type(count) is int and count > 0]
    return max(counts, default=None)


@dataclass(frozen=True, slots=True)
class _ModelStates:
    """What one model_states file says."""

    file: File
    module: dict[str, Any]
    """Leaves by FQN; empty for pipelines, whose layers have files of their own."""
    buffer_names: frozenset[str]
    groups: tuple[dict[str, Shape], ...]
    """Shapes of what is trained, group by group; empty without ZeRO."""
    frozen_shapes: dict[str, Shape]
    frozen: dict[str, Any]
    """This rank's part of each frozen parameter."""
    shared: dict[str, Any]
    """FQN to the FQN that it is tied to."""

    @classmethod
    def of(cls, file: File) -> _ModelStates:
        value = file.value
        if not isinstance(value, dict) or "module" not in value:
            raise Corrupt(f"{file.path}: not a model_states file of DeepSpeed: it has no 'module'")
        groups = value.get("param_shapes") or []
        groups = groups if isinstance(groups, list | tuple) else [groups]
        names = value.get("buffer_names") or []
        return cls(
            file,
            _dict(file, value["module"], "'module'"),
            frozenset(name for name in names if isinstance(name, str)),
            tuple(_shapes(file, group, "'param_shapes'") for group in groups),
            _shapes(file, value.get("frozen_param_shapes"), "'frozen_param_shapes'"),
            _dict(file, value.get("frozen_param_fragments"), "'frozen_param_fragments'"),
            _dict(file, value.get("shared_params"), "'shared_params'"),
        )

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of everything that is trained."""
        return {name: shape for group in self.groups for name, shape in group.items()}

    def get(self, key: str) -> Any:
        return self.file.value.get(key)


@dataclass(frozen=True, slots=True)
class _OptimStates:
    """What one optim_states file says."""

    file: File
    is_stage3: bool
    num_ranks: int | None
    parts: tuple[Tensor, ...]
    """This rank's part of each group's flat fp32 weights."""
    states: tuple[dict[str, Any], ...]
    """Of the optimizer, group by group: flat tensors as `parts`, and what a group has one of."""
    slices: tuple[dict[str, tuple[int, int]], ...]
    """First element in this rank's part and number, by FQN, as DeepSpeed 0.7 and later also write them."""
    options: Any
    """The optimizer's `param_groups`."""

    @classmethod
    def of(cls, file: File) -> _OptimStates:
        state = _entry(file, file.value, "optimizer_state_dict", dict)
        is_stage3 = "fp32_flat_groups" in state
        key = "fp32_flat_groups" if is_stage3 else "single_partition_of_fp32_groups"
        if key not in state:
            raise Unsupported(
                f"{file.path}: no flat fp32 weights, only {listed(map(str, state))}",
                hint="DeepSpeed before 0.3.16 wrote other names; load and save it again with a newer one",
            )
        groups = _entry(file, state, key, list, tuple)
        parts = tuple(_tensor(file, leaf, f"{key}[{number}]") for number, leaf in enumerate(groups))
        if any(len(part.shape) != 1 for part in parts):
            raise Corrupt(f"{file.path}: {key} has shapes {listed(str(list(p.shape)) for p in parts)}, not flat ones")
        base = state.get("optimizer_state_dict" if is_stage3 else "base_optimizer_state")
        num_ranks = _count(state.get("partition_count"))
        for place in state.get("ds_zero_partition_groups") or []:
            if not isinstance(place, dict) or place.get("partition_count") != num_ranks:
                raise Unsupported(f"{file.path}: groups on different numbers of ranks (AutoEP) are not read")
        return cls(
            file, is_stage3, num_ranks, parts, _states(base, len(parts)), _slices(file, state, len(parts)),
            base.get("param_groups") if isinstance(base, dict) else None,
        )  # fmt: skip


def _states(base: Any, num_groups: int) -> tuple[dict[str, Any], ...]:
    """The optimizer's state of each group. Elastic checkpoints have a list, others torch's dict by number."""
    found = base.get("state") if isinstance(base, dict) else base
    if isinstance(found, list | tuple):
        found = dict(enumerate(found))
    found = found if isinstance(found, dict) else {}
    groups = (found.get(number) for number in range(num_groups))
    return tuple({str(k): v for k, v in group.items()} if isinstance(group, dict) else {} for group in groups)


def _slices(file: File, state: dict[str, Any], num_groups: int) -> tuple[dict[str, tuple[int, int]], ...]:
    mappings = state.get("param_slice_mappings")
    if not isinstance(mappings, list | tuple) or len(mappings) != num_groups:
        return ({},) * num_groups
    return tuple(
        {name: _address(file, name, address) for name, address in _dict(file, group, "param_slice_mappings").items()}
        for group in mappings
    )


def _address(file: File, name: str, address: Any) -> tuple[int, int]:
    """`deepspeed.utils.tensor_fragment.fragment_address(numel, start)`."""
    start, numel = (address.attr(key) if isinstance(address, Inert) else None for key in ("start", "numel"))
    if type(start) is not int or type(numel) is not int:
        raise Corrupt(f"{file.path}: param_slice_mappings has no numbers for {name}")
    return start, numel


# ------------------------------------------------------------------------------------------------------ flat weights


class _Flat:
    """1-D tensors end to end, from which runs are taken."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.size]
        self._ends = list(accumulate(tensor.size for tensor in self._tensors))
        self.size = self._ends[-1] if self._ends else 0

    def take(self, start: int, stop: int) -> list[Tensor]:
        """Elements start to stop, one piece of each tensor that has some."""
        pieces = []
        at = bisect_right(self._ends, start)
        while start < stop:
            tensor, first = self._tensors[at], self._ends[at] - self._tensors[at].size
            last = min(stop, self._ends[at])
            pieces.append(tensor[start - first : last - first])
            start, at = last, at + 1
        return pieces


def _joined(pieces: Sequence[Tensor], like: Tensor, shape: Shape) -> Tensor:
    """Pieces end to end, in a shape of as many elements."""
    if not pieces:
        return Literal(like.dtype, shape, b"")
    whole = concat(pieces, 0)
    return whole.reshape(shape) if shape else squeeze(whole, 0)


Groups = Sequence[Sequence[Tensor]]
"""What each rank has of each group: `groups[rank][group]`."""


def _end_to_end(ranks: Groups, shapes: Sequence[Mapping[str, Shape]], where: str) -> dict[str, Tensor]:
    """ZeRO 1 and 2: the parameters of each group out of the ranks' parts laid end to end."""
    found = {}
    align = 2 * len(ranks)  # DeepSpeed pads each group to a multiple, and may leave the padding out when it saves
    for number, group in enumerate(shapes):
        flat = _Flat([rank[number] for rank in ranks])
        start = 0
        for name, shape in group.items():
            stop = start + math.prod(shape)
            if stop > flat.size:
                raise Incomplete(
                    f"{where}: {name} is elements {start} to {stop} of group {number}, of which the {len(ranks)} ranks"
                    f" hold {flat.size}"
                )
            found[name] = _joined(flat.take(start, stop), ranks[0][number], shape)
            start = stop
        if math.ceil(start / align) != math.ceil(flat.size / align):
            raise Corrupt(
                f"{where}: group {number} has {flat.size} elements, its parameters have {start}: more is left over"
                f" than padding to a multiple of {align}"
            )
    return found


def _interleaved(ranks: Groups, shapes: Sequence[Mapping[str, Shape]], where: str) -> dict[str, Tensor]:
    """ZeRO 3: each parameter out of its parts on every rank."""
    flats = [_Flat(rank) for rank in ranks]
    params = {name: shape for group in shapes for name, shape in group.items()}
    expected = sum(math.ceil(math.prod(shape) / len(ranks)) for shape in params.values())
    for rank, flat in enumerate(flats):
        if flat.size != expected:
            raise Corrupt(f"{where}: rank {rank} holds {flat.size} elements, its parts of the parameters {expected}")
    found, at = {}, 0
    for name, shape in params.items():
        numel = math.prod(shape)
        part = math.ceil(numel / len(ranks))
        pieces = [
            piece
            for rank, flat in enumerate(flats)
            for piece in flat.take(at, at + max(0, min(part, numel - rank * part)))
        ]
        found[name] = _joined(pieces, ranks[0][0], shape)
        at += part
    return found


def _shapes_by_slices(model: _ModelStates, optim: Sequence[_OptimStates]) -> tuple[dict[str, Shape], ...]:
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


def _check_slices(optim: Sequence[_OptimStates], shapes: Sequence[Mapping[str, Shape]]) -> None:
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


# ----------------------------------------------------------------------------------------------------------- weights


@dataclass(slots=True)
class _Trained:
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


def _read(path: Path, names: Iterable[str], files: Files) -> list[File]:
    return [torch_save.read(path / name, files) for name in names]


def _rebuilt(path: Path, listing: Listing, model: _ModelStates, files: Files) -> _Trained:
    """The fp32 weights and optimizer states of a tag with one model-parallel rank."""
    ranks = {rank: listing.optim[rank, mp] for rank, mp in sorted(listing.optim)}
    optim = [_OptimStates.of(file) for file in _read(path, ranks.values(), files)]
    counts = {states.num_ranks for states in optim} - {None} or {_count(model.get("dp_world_size"))}
    if len(counts) > 1:
        raise Corrupt(f"{path}: the files are of {listed(map(str, sorted(filter(None, counts))))} ranks: several saves")
    _check_ranks(path, next(iter(ranks.values())), ranks, counts.pop() or len(ranks))
    first = optim[0]
    for states in optim:
        described = [(part.dtype, states.is_stage3) for part in states.parts]
        if described != [(part.dtype, first.is_stage3) for part in first.parts]:
            raise Corrupt(f"{states.file.path}: other groups than in {first.file.path.name}")
    shapes = model.groups or _shapes_by_slices(model, optim)
    if not first.is_stage3 and len(first.parts) != len(shapes):
        raise Corrupt(f"{path}: {len(first.parts)} groups of weights, {len(shapes)} of shapes in param_shapes")
    lay_out = _interleaved if first.is_stage3 else _end_to_end
    if not first.is_stage3:
        _check_slices(optim, shapes)
    weights = lay_out([states.parts for states in optim], shapes, str(path)) if first.parts else {}
    placement = f"ZeRO {'3: each parameter' if first.is_stage3 else '1 or 2: flat groups'} cut over {len(ranks)} ranks"
    found = _Trained(weights, num_ranks=len(ranks), placement=placement, is_stage3=first.is_stage3)
    found.files = [states.file.path for states in optim]
    _add_states(found, optim, shapes, lay_out)
    return found


def _check_ranks(path: Path, example: str, ranks: Mapping[int, str], count: int) -> None:
    """Raise Incomplete naming the files that are missing or too many."""
    missing = [rank for rank in range(min(count, len(ranks) + 10_000)) if rank not in ranks]
    if missing:
        names = (re.sub(r"(?<=zero_pp_rank_)\d+", str(rank), example) for rank in missing)
        raise Incomplete(f"{path}: {len(missing)} of {count} ranks are missing: {listed(names)}", hint=_COPY_AGAIN)
    extra = [name for rank, name in ranks.items() if rank >= count]
    if extra:
        raise Incomplete(
            f"{path}: {count} ranks wrote this, and there are files of more: {listed(extra)}",
            hint="they are left over from another save, which this one may have overwritten in part",
        )


def _add_states(
    found: _Trained,
    optim: Sequence[_OptimStates],
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


def _flat_states(states: _OptimStates, key: str) -> list[Tensor | None]:
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


def _add_numbers(found: _Trained, states: _OptimStates, shapes: Sequence[Mapping[str, Shape]], key: str) -> None:
    by_group = len(shapes) == len(states.states)
    for number, group in enumerate(shapes):
        leaf = states.states[number if by_group else 0].get(key)
        ref = plain_tensor(leaf)
        for name in group:
            if ref is not None:
                found.states[name, key] = states.file.tensor(ref)
            elif leaf is not None:
                found.objects["optimizer", "state", name, key] = leaf


# --------------------------------------------------------------------------------------------------------- universal


def _universal(path: Path, shapes: Mapping[str, Shape], files: Files) -> _Trained:
    """The parameters of a universal checkpoint. `shapes` are those of `param_shapes`, which flat tensors get."""
    zero = path / UNIVERSAL
    found = _Trained()
    names = [name for name in sorted(os.listdir(zero)) if (zero / name).is_dir()]
    missing = [name for name in shapes if name not in names]
    missing += [name for name in names if not (zero / name / f"{_FP32}.pt").is_file()]
    if missing:
        raise Incomplete(f"{zero}: no {_FP32}.pt of {listed(missing)}", hint="convert the checkpoint again")
    for name in [*(n for n in shapes if n in names), *(n for n in names if n not in shapes)]:
        for file in _read(zero / name, sorted(n for n in os.listdir(zero / name) if n.endswith(".pt")), files):
            found.files.append(file.path)
            key = file.path.stem
            value = file.value.get("param") if isinstance(file.value, dict) else file.value
            if key != _FP32 and not isinstance(value, TensorRef) and plain_tensor(value) is None:
                found.objects["optimizer", "state", name, key] = value
                continue
            tensor = _tensor(file, value, "the parameter")
            if tensor.shape:
                tensor = _shaped(file, tensor, name, shapes.get(name), flat=not isinstance(file.value, dict))
            if key == _FP32:
                found.weights[name] = tensor
            else:
                found.states[name, key] = tensor
    return found


def _shaped(file: File, tensor: Tensor, name: str, shape: Shape | None, *, flat: bool) -> Tensor:
    """A parameter in its shape: conversions from ZeRO 3 store it flat, others as it is."""
    if not flat:
        return tensor
    if shape is None:
        raise Incomplete(
            f"{file.path}: {name} is stored flat, and no model_states file says its shape",
            hint="copy zero_pp_rank_0_mp_rank_00_model_states.pt from the checkpoint that was converted",
        )
    if math.prod(shape) != tensor.size:
        raise Corrupt(f"{file.path}: {tensor.size} elements, {name} of the shape {list(shape)} has {math.prod(shape)}")
    return tensor.reshape(shape) if shape else squeeze(tensor, 0)


# ------------------------------------------------------------------------------------------------------------- model


class _Model:
    """The model's tensors, in the order of `module`, each from where it is most precise."""

    def __init__(self, models: Sequence[_ModelStates], trained: _Trained) -> None:
        self.leaves = Leaves()
        self._models = models
        self._main = models[0]
        self._trained = trained
        self._frozen = {name: self._frozen_parameter(name) for name in self._main.frozen_shapes}
        self._aliases = self._same_storage()

    def run(self) -> None:
        module = self._main.module
        missing = []
        for name in [*module, *(n for n in (*self._trained.weights, *self._frozen) if n not in module)]:
            tensor = self._known(name)
            if tensor is None and name in module and self._is_placeholder(module[name], name):
                missing.append(name)
            elif tensor is None:
                self._add_plain(name, module[name])
            else:
                self._put(name, tensor)
        for alias, source in self._main.shared.items():
            if alias not in self.leaves.tensors and source in self.leaves.tensors:
                self._put(alias, self.leaves.tensors[source])
        if missing:
            raise Incomplete(
                f"{self._main.file.path}: {listed(missing)} have no elements here, and neither param_shapes,"
                " frozen_param_shapes nor shared_params name them"
            )

    def _known(self, name: str) -> Tensor | None:
        """A parameter, under its own name or that of the one it is tied to; None for what `module` itself holds."""
        for candidate in (name, self._main.shared.get(name), self._aliases.get(name)):
            for source in (self._trained.weights, self._frozen):
                if candidate in source:
                    return source[candidate]
        return None

    def _put(self, name: str, tensor: Tensor) -> None:
        self.leaves.tensors[name], self.leaves.paths[name] = tensor, (name,)

    def _add_plain(self, name: str, leaf: Any) -> None:
        self.leaves.add(self._main.file, (name,), leaf)
        tensor = self.leaves.tensors.get(name)
        if tensor is not None and self._trained.weights and name in self._main.buffer_names and _is_narrow(tensor):
            self.leaves.tensors[name] = cast(tensor, dtype("float32"))  # exact, and what zero_to_fp32 writes

    def _is_placeholder(self, leaf: Any, name: str) -> bool:
        ref = plain_tensor(leaf)
        return self._trained.is_stage3 and ref is not None and ref.size == (0,) and name not in self._main.buffer_names

    def _same_storage(self) -> dict[str, str]:
        """What is the same part of the same storage as a trained parameter: tied, as DeepSpeed before 0.9.2 left it."""
        owners: dict[object, str] = {}
        aliases = {}
        for name, leaf in self._main.module.items():
            ref = plain_tensor(leaf)
            if ref is None:
                continue
            place = (ref.storage.key, ref.offset, tuple(ref.size), tuple(ref.stride))
            if name in self._trained.weights:
                owners.setdefault(place, name)
            elif place in owners and name not in self._frozen and name not in self._main.buffer_names:
                aliases[name] = owners[place]
        return aliases

    def _frozen_parameter(self, name: str) -> Tensor:
        """A frozen parameter: whole in one file, or for ZeRO 3 cut over the ranks as trained ones are."""
        shape = self._main.frozen_shapes[name]
        parts = []
        for model in self._models:
            if name not in model.frozen:
                raise Incomplete(f"{model.file.path}: no part of the frozen parameter {name}")
            parts.append(_tensor(model.file, model.frozen[name], name))
        if len(parts) == 1 and parts[0].shape == shape:
            return parts[0]
        numel = math.prod(shape)
        expected = [math.ceil(numel / len(parts))] * len(parts)
        if [list(part.shape) for part in parts] != [[n] for n in expected] or not self._trained.is_stage3:
            raise Corrupt(
                f"{self._main.file.path.parent}: the frozen parameter {name} of the shape {list(shape)} has parts of"
                f" the shapes {listed(str(list(part.shape)) for part in parts)}"
            )
        return _joined(_Flat(parts).take(0, numel), parts[0], shape)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.dtype.kind == "float" and tensor.dtype.itemsize == 2


# -------------------------------------------------------------------------------------------------------------- open


def open(path: Path) -> Checkpoint:
    """The checkpoint in the directory of a tag or a universal checkpoint; pickles are read, storages are not.

    The model has float32 weights where ZeRO keeps them. Optimizer states are under `optimizer.state.FQN.KEY`. Raises
    Incomplete naming the files of ranks that are missing or too many, Corrupt when flat weights and shapes do not fit,
    Unsupported for tensor parallelism.
    """
    if not path.is_dir():
        path = path.parent
    listing = Listing.of(path)
    files = Files()
    if listing.universal:
        return _open_universal(path, listing, files)
    if listing.layers or listing.experts:
        return _open_parts(path, listing, files)
    if not listing.model:
        if listing.optim:
            raise Incomplete(f"{path}: {len(listing.optim)} optim_states and no model_states files", hint=_COPY_AGAIN)
        raise NotFound(f"{path}: no files of DeepSpeed")
    _refuse_tensor_parallel(path, listing)
    models = _models(path, listing, files)
    if not listing.optim and (models[0].groups or any(rank is not None for rank, _ in listing.model)):
        raise Incomplete(
            f"{path}: the fp32 weights are missing: no *_optim_states.pt, and {models[0].file.path.name} is of ZeRO",
            hint=_COPY_AGAIN,
        )
    trained = _rebuilt(path, listing, models[0], files) if listing.optim else _Trained()
    if trained.is_stage3:
        ranks = {rank: name for (rank, _), name in sorted(listing.model.items(), key=str) if rank is not None}
        if trained.num_ranks is not None:
            _check_ranks(path, models[0].file.path.name, ranks, trained.num_ranks)
    notices = []
    if (
        not listing.optim
        and isinstance(models[0].get("optimizer"), dict)
        and "fp32_groups_flat" in models[0].get("optimizer")
    ):
        notices = [f"{path}: without ZeRO the fp32 weights are not rebuilt; these are as they were trained"]
    return _checkpoint(path, models, trained, files, _model(models, trained), notices)


def _refuse_tensor_parallel(path: Path, listing: Listing) -> None:
    if listing.mp_ranks != [0]:
        what = "tensor parallel" if 0 in listing.mp_ranks else "without the first model-parallel rank"
        raise Unsupported(
            f"{path} is {what}: it holds mp_rank {listed(f'{mp:02d}' for mp in listing.mp_ranks)}, and how their"
            " weights join is not stored",
            hint="convert it to a universal checkpoint with DeepSpeed's ds_to_universal first",
        )


def _models(path: Path, listing: Listing, files: Files) -> list[_ModelStates]:
    """The model_states files by rank: one for ZeRO 0 to 2."""
    ranks = {rank for rank, _ in listing.model}
    if None in ranks and len(ranks) > 1:
        raise Corrupt(
            f"{path}: model_states files of ZeRO 3 and of a lower stage: {listed(sorted(listing.model.values()))}",
            hint="two saves went into one directory: move the files of one away",
        )
    return [_ModelStates.of(file) for file in _read(path, _in_order(listing.model), files)]


def _open_universal(path: Path, listing: Listing, files: Files) -> Checkpoint:
    models = _models(path, listing, files) if listing.model else []
    shapes = {name: shape for model in models for name, shape in model.shapes.items()}
    trained = _universal(path, shapes, files)
    if listing.mp_ranks != [0]:
        there = (
            f"there are model_states of {len(listing.mp_ranks)} model-parallel ranks" if models else "there are none"
        )
        notice = f"{path}: buffers and frozen parameters are not read, which model_states files hold: {there}"
        return _checkpoint(path, models, trained, files, Leaves(dict(trained.weights)), [notice])
    trained.is_stage3 = any(rank is not None for rank, _ in listing.model)
    ranks = {rank: name for (rank, _), name in listing.model.items() if rank is not None}
    if trained.is_stage3 and models[0].frozen_shapes:
        count = _count(models[0].get("dp_world_size")) or len(ranks)
        _check_ranks(path, models[0].file.path.name, ranks, count)
    return _checkpoint(path, models, trained, files, _model(models, trained))


def _open_parts(path: Path, listing: Listing, files: Files) -> Checkpoint:
    """Pipeline layers and experts: every weight as it was trained, from the files that hold it."""
    models = [_ModelStates.of(file) for file in _read(path, _in_order(listing.model), files)]
    if not models:
        raise Incomplete(f"{path}: no mp_rank_00_model_states.pt beside {listed(listing.names)}", hint=_COPY_AGAIN)
    leaves = Leaves()
    for layer, names in listing.layers.items():
        if len(names) > 1:
            raise Unsupported(
                f"{path} is a tensor-parallel pipeline: layer {layer} is in {listed(names)}, and how they join is not"
                " stored",
                hint="convert it to a universal checkpoint with DeepSpeed's ds_to_universal first",
            )
        for file in _read(path, names, files):
            _add_all(leaves, file, file.value, f"{layer}.")
    _check_layers(path, models, leaves)
    if listing.experts:
        _refuse_tensor_parallel(path, listing)
        _check_experts(path, listing, models[0])
        _add_all(leaves, models[0].file, models[0].module, "")
        for file in _read(path, listing.experts.values(), files):
            _add_all(leaves, file, file.value, "")
    notices = []
    if listing.optim or listing.expert_optim:
        what = "pipeline" if listing.layers else "mixture-of-experts"
        notices = [f"{path}: the fp32 weights of a {what} checkpoint are not rebuilt; these are as they were trained"]
    trained = _Trained(files=[path / name for name in listing.names if name not in listing.model.values()])
    return _checkpoint(path, models, trained, files, leaves, notices)


def _in_order(names: Mapping[tuple[int | None, int], str]) -> list[str]:
    return [names[key] for key in sorted(names, key=lambda key: (key[1], -1 if key[0] is None else key[0]))]


def _add_all(leaves: Leaves, file: File, state: Any, prefix: str) -> None:
    for name, leaf in _dict(file, state, "the state dict").items():
        leaves.add(file, (prefix + name,), leaf)


def _check_layers(path: Path, models: Sequence[_ModelStates], leaves: Leaves) -> None:
    """Raise Incomplete when a trained parameter is in no layer. What layers tie has a name of its own."""
    layers = {name.partition(".")[0] for name in leaves.tensors}
    expected = [name for model in models for name in model.shapes if re.match(r"\d+\.", name)]
    missing = [name for name in expected if name not in leaves.tensors]
    if missing and layers:
        raise Incomplete(f"{path}: no layer file has {listed(missing)}", hint=_COPY_AGAIN)


def _check_experts(path: Path, listing: Listing, model: _ModelStates) -> None:
    if model.get("ds_autoep_layers") or model.get("autoep_layers"):
        raise Unsupported(f"{path}: the experts were cut out of fused tensors by AutoEP, which is not read")
    stated = model.get("num_experts")
    stated = stated if isinstance(stated, list | tuple) else []
    for layer in range(max(len(stated), 1 + max(layer for layer, _ in listing.experts))):
        here = [expert for number, expert in listing.experts if number == layer]
        count = max([stated[layer]] if layer < len(stated) and type(stated[layer]) is int else [], default=0)
        missing = [expert for expert in range(max(count, max(here, default=-1) + 1)) if expert not in here]
        if missing or not here:
            what = f"experts {listed(map(str, missing))}" if missing else "all experts"
            raise Incomplete(f"{path}: {what} of layer {layer} are missing", hint=_COPY_AGAIN)


def _model(models: Sequence[_ModelStates], trained: _Trained) -> Leaves:
    model = _Model(models, trained)
    model.run()
    return model.leaves


def _checkpoint(
    path: Path,
    models: Sequence[_ModelStates],
    trained: _Trained,
    files: Files,
    leaves: Leaves,
    notices: Sequence[str] = (),
) -> Checkpoint:
    for (name, key), tensor in trained.states.items():
        where: KeyPath = ("optimizer", "state", name, key)
        leaves.tensors[fqn(where)], leaves.paths[fqn(where)] = tensor, where
    for where, value in trained.objects.items():
        leaves.objects[fqn(where)], leaves.paths[fqn(where)] = value, where
    for model in models[:1]:
        for where, leaf in _rest(model):
            leaves.add(model.file, where, leaf)
    left_out = [f"optimizer states that are not cut as the weights are, left out: {listed(trained.left_out)}"]
    return Checkpoint(
        leaves.tensors,
        Origin(
            path,
            NAME,
            " ".join(["DeepSpeed", *(str(v) for v in [models[0].get("ds_version") if models else None] if v)]),
            step=_count(models[0].get("global_steps")) if models else None,
            world_size=trained.num_ranks,
            placements=(f"{trained.placement} ({len(trained.weights)} tensors)",) if trained.placement else (),
            files=tuple(dict.fromkeys([*(model.file.path for model in models), *trained.files])),
        ),
        LazySource(files),
        objects=leaves.objects,
        paths=leaves.paths,
        notices=(*notices, *leaves.notices, *(left_out if trained.left_out else ())),
    )


def _rest(model: _ModelStates) -> Iterator[tuple[KeyPath, Any]]:
    """What else a model_states file holds: the optimizer without ZeRO, schedulers, counters, the caller's own."""
    for key, value in model.file.value.items():
        if key == "optimizer" and value is not None:
            yield from walk(value, ("optimizer",))
        elif key not in (*_HANDLED, "optimizer"):
            yield from walk(value, ("extra_state", str(key)))
