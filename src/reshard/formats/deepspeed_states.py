"""What one file of DeepSpeed says: a model_states file, or an optim_states file.

    model_states    `module`, which of it are buffers, and how what is trained or frozen is shaped and tied
    optim_states    one rank's part of the flat float32 weights, and of what the optimizer keeps for them

Both are pickles of anybody, decoded and checked here once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard.core.box import Shape
from reshard.core.tensor import Tensor
from reshard.errors import Corrupt, Unsupported, listed
from reshard.formats import torch_save
from reshard.formats.torch_distributed import plain_tensor
from reshard.formats.torch_save import File
from reshard.storage.files import Files
from reshard.storage.unpickle import Inert


@dataclass(frozen=True, slots=True)
class ModelStates:
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
    shared: dict[str, str]
    """FQN to the FQN that it is tied to."""

    @classmethod
    def of(cls, file: File) -> ModelStates:
        """Raises Corrupt when it says nothing of the kind."""
        value = file.value
        if not isinstance(value, dict) or "module" not in value:
            raise Corrupt(f"{file.path}: not a model_states file of DeepSpeed: it has no 'module'")
        groups = value.get("param_shapes") or []
        groups = groups if isinstance(groups, list | tuple) else [groups]
        return cls(
            file,
            dict_of(file, value["module"], "'module'"),
            _names(file, value.get("buffer_names"), "'buffer_names'"),
            tuple(_shapes(file, group, "'param_shapes'") for group in groups),
            _shapes(file, value.get("frozen_param_shapes"), "'frozen_param_shapes'"),
            dict_of(file, value.get("frozen_param_fragments"), "'frozen_param_fragments'"),
            _ties(file, value.get("shared_params"), "'shared_params'"),
        )

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of everything that is trained."""
        return {name: shape for group in self.groups for name, shape in group.items()}

    def get(self, key: str) -> Any:
        return self.file.value.get(key)


@dataclass(frozen=True, slots=True)
class OptimStates:
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
    def of(cls, file: File) -> OptimStates:
        state = _entry(file, file.value, "optimizer_state_dict", dict)
        is_stage3 = "fp32_flat_groups" in state
        key = "fp32_flat_groups" if is_stage3 else "single_partition_of_fp32_groups"
        if key not in state:
            raise Unsupported(
                f"{file.path}: no flat fp32 weights, only {listed(map(str, state))}",
                hint="DeepSpeed before 0.3.16 wrote other names; load and save it again with a newer one",
            )
        groups = _entry(file, state, key, list, tuple)
        parts = tuple(tensor_of(file, leaf, f"{key}[{number}]") for number, leaf in enumerate(groups))
        if any(len(part.shape) != 1 for part in parts):
            raise Corrupt(f"{file.path}: {key} has shapes {listed(str(list(p.shape)) for p in parts)}, not flat ones")
        base = state.get("optimizer_state_dict" if is_stage3 else "base_optimizer_state")
        num_ranks = count_of(state.get("partition_count"))
        places = state.get("ds_zero_partition_groups") or []
        places = places if isinstance(places, list | tuple) else [places]
        if any(not isinstance(place, dict) or place.get("partition_count") != num_ranks for place in places):
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
        {name: _address(file, name, address) for name, address in dict_of(file, group, "param_slice_mappings").items()}
        for group in mappings
    )


def _address(file: File, name: str, address: Any) -> tuple[int, int]:
    """`deepspeed.utils.tensor_fragment.fragment_address(numel, start)`."""
    start, numel = (address.attr(key) if isinstance(address, Inert) else None for key in ("start", "numel"))
    if type(start) is not int or type(numel) is not int:
        raise Corrupt(f"{file.path}: param_slice_mappings has no numbers for {name}")
    return start, numel


def read(path: Path, names: Iterable[str], files: Files) -> list[File]:
    """Files in a directory; their pickles, not their storages."""
    return [torch_save.read(path / name, files) for name in names]


def tensor_of(file: File, leaf: Any, what: str) -> Tensor:
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


def dict_of(file: File, value: Any, what: str) -> dict[str, Any]:
    """A dict with text for keys; None counts as empty."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Corrupt(f"{file.path}: {what} is not a dict by FQN")
    return value


def _shapes(file: File, value: Any, what: str) -> dict[str, Shape]:
    shapes = dict_of(file, value, what)
    for name, shape in shapes.items():
        if not isinstance(shape, tuple) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in shape):
            raise Corrupt(f"{file.path}: {what} has no shape for {name}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _names(file: File, value: Any, what: str) -> frozenset[str]:
    if not isinstance(value, list | tuple | None):
        raise Corrupt(f"{file.path}: {what} is a {type(value).__name__}, not a list of FQNs")
    return frozenset(name for name in value or () if isinstance(name, str))


def _ties(file: File, value: Any, what: str) -> dict[str, str]:
    ties = dict_of(file, value, what)
    if not all(isinstance(source, str) for source in ties.values()):
        raise Corrupt(f"{file.path}: {what} is not a dict from FQN to FQN")
    return ties


def count_of(value: Any) -> int | None:
    """A number of ranks: one, or the largest of a list (experts have fewer than the rest)."""
    counts = value if isinstance(value, list | tuple) else [value]
    counts = [count for count in counts if type(count) is int and count > 0]
    return max(counts, default=None)
