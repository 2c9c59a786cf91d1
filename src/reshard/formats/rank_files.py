"""One torch.save file a rank: what each rank held, with DTensor, ShardedTensor and plain leaves.

    model_world_size_W_rank_R.pt        verl, LMMs-Engine; also optim_, optimizer_, extra_state_, dataloader_state_
    pytorch_model_fsdp_I_rankR.bin      accelerate with use_dcp=False, and optimizer_I_rankR.bin
    pytorch_model_fsdp_rankR.bin        accelerate, FSDP1 LOCAL_STATE_DICT
    NAME.rank_R.pth                     DINO and others on FSDP1

A leaf says itself which part of its tensor it is; the parts must tile the tensor. Plain tensors (buffers, step counts)
are full copies on every rank: the first one is taken. LOCAL_STATE_DICT is different: a parameter is a 1-D run of its
unit's flattened parameter, a view of the same storage as `_flat_param`; runs in rank order give the parameter, flat.
Its shape is nowhere in the files: such tensors are `Flat` until `shaped` is told their shapes.

Source: verl 0.5 `utils/checkpoint/fsdp_checkpoint_manager.py`, lmms-engine 0.1.4 `train/fsdp2`, accelerate 1.15
`utils/fsdp_utils.py`, pytorch `torch/distributed/fsdp/_state_dict_utils.py`, 2.2 to 2.15.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from reshard.core.box import Box, Shape
from reshard.core.checkpoint import Checkpoint, KeyPath, Origin, same_bytes
from reshard.core.dtypes import dtype
from reshard.core.tensor import Concat, Deferred, Tensor
from reshard.errors import Corrupt, Incomplete, InputError, Mismatch, NotFound, Unsupported, listed
from reshard.formats import torch_save
from reshard.formats.torch_distributed import Share, is_distributed, plain_tensor, settled, share
from reshard.formats.torch_save import File, Leaves
from reshard.formats.torch_tensor import fqn, walk
from reshard.storage.files import Files, LazySource

NAME = "rank_files"

_PATTERNS = (
    re.compile(r"(?P<stem>\w+?)_world_size_(?P<world>\d{1,9})_rank_(?P<rank>\d{1,9})\.pt"),
    re.compile(r"(?P<stem>(?:pytorch_model_fsdp|optimizer)(?:_\d+)?)_rank(?P<rank>\d{1,9})\.bin"),
    re.compile(r"(?P<stem>.+)\.rank_(?P<rank>\d{1,9})\.(?:pth|pt)"),
)
_OPTIMIZER_STEMS = ("optim", "optimizer")
_OTHER_STEMS = ("extra_state", "dataloader_state")
_FLAT_PARAM = "_flat_param"


# ------------------------------------------------------------------------------------------------------------- names


@dataclass(frozen=True, slots=True)
class Group:
    """The files of one save, as a listing shows them."""

    stem: str
    """What their names begin with."""
    kind: str
    """`model`, `optimizer`, or the stem where it says something else."""
    world_size: int | None
    """As the names state it."""
    files: Mapping[int, str]
    """Names by rank."""

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that should be there and are not; without a stated world size only gaps can be seen."""
        count = self.world_size if self.world_size is not None else max(self.files) + 1
        return tuple(rank for rank in range(min(count, max(self.files) + _MAX_GAP)) if rank not in self.files)

    @property
    def is_complete(self) -> bool:
        return not self.missing and (self.world_size is None or len(self.files) == self.world_size)

    def __str__(self) -> str:
        world = "" if self.world_size is None else f"_world_size_{self.world_size}"
        of = "" if self.world_size is None else f" of {self.world_size}"
        return f"{self.stem}{world} ({len(self.files)}{of} ranks)"


_MAX_GAP = 10_000


def groups(names: Iterable[str]) -> list[Group]:
    """The sets of rank files among the names of a listing, complete or not."""
    found: dict[tuple[str, int | None, str], dict[int, str]] = defaultdict(dict)
    for name in names:
        for number, pattern in enumerate(_PATTERNS):
            match = pattern.fullmatch(name)
            if match:
                parts = match.groupdict()
                world = None if parts.get("world") is None else int(parts["world"])
                found[parts["stem"], world, str(number)][int(parts["rank"])] = name
                break
    return [
        Group(stem, _kind(stem), world, dict(sorted(files.items())))
        for (stem, world, _), files in sorted(found.items(), key=str)
    ]


def _kind(stem: str) -> str:
    if stem in _OPTIMIZER_STEMS or re.fullmatch(r"optimizer_\d+", stem):
        return "optimizer"
    return stem if stem in _OTHER_STEMS else "model"


def matches(names: frozenset[str]) -> bool:
    """Whether a directory with these names in it holds rank files."""
    return bool(groups(names))


def choose(path: Path, names: Iterable[str], kind: str = "model") -> tuple[Group, tuple[str, ...]]:
    """The one complete set of a kind (or a stem) in a listing, and notices about what else is there.

    Raises NotFound, Incomplete naming the missing ranks, or InputError when several sets are complete.
    """
    everything = groups(names)
    wanted = [g for g in everything if g.stem == kind] or [g for g in everything if g.kind == _kind(kind) == kind]
    if not wanted and kind in _OPTIMIZER_STEMS:
        wanted = [g for g in everything if g.kind == "optimizer"]
    if not wanted:
        there = f"there are {listed(map(str, everything))}" if everything else "there are no rank files"
        raise NotFound(f"{path}: no {kind} files of ranks; {there}")
    complete = [g for g in wanted if g.is_complete]
    if not complete:
        lacks = listed(f"{g}: {_ranks(g.missing)} missing" for g in wanted)
        raise Incomplete(
            f"{path}: the rank files are not all there: {lacks}",
            hint="copy the missing files from the nodes that wrote them, or wait until the save is finished",
        )
    if len(complete) > 1:
        raise InputError(
            f"{path} holds {len(complete)} complete sets of {kind} files: {listed(map(str, complete))}",
            hint="move those that are left over from another run away"
            if len({g.stem for g in complete}) == 1
            else "say which one is meant by the beginning of its name",
        )
    stale = [g for g in wanted if g is not complete[0]]
    notices = (f"{path}: {complete[0]} is read; left aside: {listed(map(str, stale))}",) if stale else ()
    return complete[0], notices


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed(map(str, ranks))}"


# -------------------------------------------------------------------------------------------------------------- open


@dataclass(frozen=True, slots=True, eq=False)
class Flat(Concat):
    """A parameter of FSDP1's LOCAL_STATE_DICT: all of its elements, its shape unknown. See `shaped`."""


class _Held(NamedTuple):
    """What one rank has under one FQN."""

    rank: int
    file: File
    path: KeyPath
    leaf: Any
    """A Share in place of a DTensor or ShardedTensor, which takes many times the memory."""


def open(path: Path, kind: str = "model", *, verify: bool = False) -> Checkpoint:
    """The rank files in a directory (or of which one is given) as a checkpoint; pickles are read, storages are not.

    `kind` is `model`, `optimizer`, or how the files' names begin. With `verify` all copies of replicated data are
    compared. Raises Incomplete when ranks are missing or the parts of a tensor leave a hole, Corrupt when a part is not
    what its placement says or replicas differ, Unsupported for partial sums.
    """
    group, notices = _find(path, kind)
    directory = path if path.is_dir() else path.parent
    files = Files()
    paths = {rank: directory / name for rank, name in group.files.items()}
    assembler = _Assembler(directory, LazySource(files) if verify else None)
    assembler.run(paths, files)
    if assembler.num_ranks > len(paths):
        absent = [rank for rank in range(min(assembler.num_ranks, len(paths) + _MAX_GAP)) if rank not in paths]
        raise Incomplete(
            f"{directory}: {len(paths)} files of {group.stem}, the tensors lie on {assembler.num_ranks} ranks:"
            f" {_ranks(absent)} missing",
            hint="copy the missing files from the nodes that wrote them",
        )
    leaves = assembler.leaves
    return Checkpoint(
        leaves.tensors,
        Origin(
            directory,
            NAME,
            f"torch.save, one file a rank ({group.stem})",
            world_size=len(paths),
            placements=assembler.placements,
            files=tuple(paths.values()),
        ),
        LazySource(files),
        objects=leaves.objects,
        paths=leaves.paths,
        notices=(*notices, *leaves.notices),
        locate=_locator(leaves.tensors),
    )


def _find(path: Path, kind: str) -> tuple[Group, tuple[str, ...]]:
    if path.is_dir():
        return choose(path, os.listdir(path), kind)
    mine = next(iter(groups([path.name])), None)
    if mine is None:
        raise NotFound(f"{path} is not named like the file of a rank")
    same = [g for g in groups(os.listdir(path.parent)) if (g.stem, g.world_size) == (mine.stem, mine.world_size)]
    return choose(path.parent, [name for g in same for name in g.files.values()], mine.stem)


class _Assembler:
    """Puts together what the ranks hold, FQN by FQN."""

    def __init__(self, directory: Path, verify: LazySource | None) -> None:
        self.leaves = Leaves()
        self.num_ranks = 0
        """As the tensors tell it."""
        self._directory = directory
        self._ranks: tuple[int, ...] = ()
        self._verify = verify
        self._cuts: dict[str, int] = defaultdict(int)
        self._joined: dict[tuple[object, ...], Tensor] = {}
        self._flat_storages: dict[int, set[str]] = {}

    @property
    def placements(self) -> tuple[str, ...]:
        """How tensors are cut, in words, most frequent first."""
        return tuple(f"{what} ({n} tensors)" for what, n in sorted(self._cuts.items(), key=lambda item: -item[1]))

    def run(self, paths: Mapping[int, Path], files: Files) -> None:
        """Read the pickles, one after the other, and put together what they hold."""
        self._ranks = tuple(paths)
        held: dict[str, list[_Held]] = defaultdict(list)
        for rank, path in paths.items():
            file = torch_save.read(path, files)
            for keys, leaf in _walked(file):
                keys = keys or (torch_save.BARE,)
                name = fqn(keys)
                leaf = share(leaf, f"{path}: {name}") if is_distributed(leaf) else leaf
                held[name].append(_Held(rank, file, keys, leaf))
            file.value = None
        self._assemble(held)

    def _assemble(self, held: Mapping[str, list[_Held]]) -> None:
        flat_units = [name for name in held if _is_flat_param(name)]
        for name in flat_units:
            self._note_flat_storages(held[name])
        flats = [name for name, found in held.items() if name not in flat_units and self._is_flat(found)]
        if flat_units and not flats:
            raise Unsupported(
                f"{self._directory}: the files hold only flattened parameters ({listed(flat_units, 3)}): FSDP1 with"
                " use_orig_params=False, whose names and shapes are not stored",
                hint="save with use_orig_params=True, or with SHARDED_STATE_DICT or FULL_STATE_DICT",
            )
        for name, found in held.items():
            if name in flat_units:
                continue
            self._check_ranks(name, found)
            if name in flats:
                self._put(name, found[0].path, self._flat(name, found))
            else:
                self._add(name, found)
        if flats:
            self.leaves.note("flat: their shapes are not stored and must come from the model's config", f"{len(flats)}")

    def _add(self, name: str, found: list[_Held]) -> None:
        distributed = [isinstance(h.leaf, Share) for h in found]
        if all(distributed):
            self._put(name, found[0].path, self._tensor(name, found))
        elif any(distributed):
            sides = [h.rank for h, yes in zip(found, distributed, strict=True) if not yes]
            raise Corrupt(f"{self._directory}: {name} is sharded on some ranks and not on {_ranks(sides)}")
        else:
            self.leaves.add(found[0].file, found[0].path, found[0].leaf)
            if name in self.leaves.tensors:
                self._cuts["plain, a copy on each rank"] += 1
                self._compare_plain(name, found)

    def _put(self, name: str, path: KeyPath, tensor: Tensor) -> None:
        if name in self.leaves.tensors:
            raise Unsupported(f"{self._directory}: {name} names two tensors")
        self.leaves.tensors[name], self.leaves.paths[name] = tensor, path

    def _check_ranks(self, name: str, found: list[_Held]) -> None:
        """One FQN, one entry a rank, at one path."""
        if len({h.rank for h in found}) != len(found) or len({h.path for h in found}) > 1:
            raise Unsupported(f"{self._directory}: {name} names several values: {listed(str(h.path) for h in found)}")

    # -------------------------------------------------------------------------------------------- DTensor and others

    def _tensor(self, name: str, found: list[_Held]) -> Tensor:
        held = settled([h.leaf for h in found])
        first = held[0]
        for h, other in zip(found, held, strict=True):
            if (other.dtype, other.shape) != (first.dtype, first.shape):
                raise Corrupt(
                    f"{h.file.path}: {name} is {other.dtype} {list(other.shape)}, {found[0].file.path.name} says"
                    f" {first.dtype} {list(first.shape)}"
                )
        self.num_ranks = max(self.num_ranks, *(s.num_ranks for s in held))
        self._cuts[first.cut] += 1
        places = self._places(name, found, held)
        parts = tuple(places.items())
        key = (first.dtype, first.shape, tuple((place, id(tensor)) for place, tensor in parts))
        if key not in self._joined:
            if len(parts) == 1 and parts[0][1].shape == first.shape:
                self._joined[key] = parts[0][1]
            else:
                self._joined[key] = self._explained(name, partial(Concat, dtype(first.dtype), first.shape, parts))
        return self._joined[key]

    def _places(self, name: str, found: Sequence[_Held], shares: Sequence[Share]) -> dict[Box, Tensor]:
        """The first rank's tensor for each place; those of later ranks are replicas."""
        places: dict[Box, Tensor] = {}
        owners: dict[Box, int] = {}
        for h, held in zip(found, shares, strict=True):
            for piece in held.pieces:
                tensor = self._explained(name, partial(h.file.tensor, piece.local))
                if piece.part.shape != tensor.shape:
                    tensor = tensor[piece.part.slices]
                if piece.place not in places:
                    places[piece.place], owners[piece.place] = tensor, h.rank
                elif self._verify is not None and not same_bytes(places[piece.place], tensor, self._verify):
                    raise Corrupt(
                        f"{h.file.path}: {name} at {list(piece.place.start)} differs from its replica on rank"
                        f" {owners[piece.place]}",
                        hint="the ranks did not hold the same weights when they saved",
                    )
        return places

    def _explained(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        try:
            return make()
        except InputError as error:
            raise type(error)(
                f"{self._directory}: {name}: {error}",
                hint=error.hint or "a rank's file is missing, or comes from another save",
            ) from error

    def _compare_plain(self, name: str, found: Sequence[_Held]) -> None:
        """Copies of a plain tensor have one shape; with verify, one content."""
        first = self.leaves.tensors[name]
        for h in found[1:]:
            ref = plain_tensor(h.leaf)
            if ref is None:
                continue
            other = self._explained(name, partial(h.file.tensor, ref))
            if (other.dtype, other.shape) != (first.dtype, first.shape):
                self.leaves.note(f"not the same on all ranks in shape or dtype; rank {found[0].rank}'s is given", name)
                return
            if self._verify is not None and not same_bytes(first, other, self._verify):
                self.leaves.note(f"not the same on all ranks; rank {found[0].rank}'s is given", name)
                return

    # --------------------------------------------------------------------------------------- LOCAL_STATE_DICT

    def _note_flat_storages(self, found: Sequence[_Held]) -> None:
        for h in found:
            if not isinstance(h.leaf, Share):
                raise Unsupported(f"{h.file.path}: a {_FLAT_PARAM} that is no ShardedTensor")
            self.num_ranks = max(self.num_ranks, h.leaf.num_ranks)
            self._flat_storages.setdefault(h.rank, set()).update(p.local.storage.key for p in h.leaf.pieces)

    def _is_flat(self, found: Sequence[_Held]) -> bool:
        """Whether a tensor lies, on some rank, in the storage of a flattened parameter."""
        for h in found:
            ref = plain_tensor(h.leaf)
            if ref is not None and ref.storage.key in self._flat_storages.get(h.rank, ()) and 0 not in ref.size:
                return True
        return False

    def _flat(self, name: str, found: Sequence[_Held]) -> Tensor:
        """The runs of a parameter, end to end in rank order."""
        if len(found) != len(self._ranks):
            absent = [rank for rank in self._ranks if rank not in {h.rank for h in found}]
            raise Corrupt(f"{self._directory}: {name} is not in the files of {_ranks(absent)}")
        parts, at, kinds = [], 0, set()
        for h in found:
            ref = plain_tensor(h.leaf)
            if ref is None or len(ref.size) != 1:
                raise Corrupt(f"{h.file.path}: {name} should be a 1-D run of a flattened parameter")
            kinds.add(ref.dtype)
            if ref.size[0]:
                tensor = self._explained(name, partial(h.file.tensor, ref))
                parts.append((Box((at,), (at + ref.size[0],)), tensor))
                at += ref.size[0]
        if len(kinds) != 1:
            raise Corrupt(f"{self._directory}: {name} has the dtypes {listed(sorted(kinds))}")
        self._cuts["flat, in rank order (FSDP1 LOCAL_STATE_DICT)"] += 1
        return self._explained(name, partial(Flat, dtype(kinds.pop()), (at,), tuple(parts)))


def _is_flat_param(name: str) -> bool:
    return name.rpartition(".")[2] == _FLAT_PARAM


def _walked(file: File) -> Iterator[tuple[KeyPath, Any]]:
    try:
        yield from walk(file.value, (), torch_save.module_state)
    except InputError as error:
        raise (
            error if str(file.path) in str(error) else type(error)(f"{file.path}: {error}", hint=error.hint)
        ) from error


def _locator(tensors: Mapping[str, Tensor]) -> Callable[[Iterable[str]], Mapping[str, Tensor]] | None:
    waiting = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Deferred)}
    return (lambda names: {name: waiting[name].find() for name in names if name in waiting}) if waiting else None


# ------------------------------------------------------------------------------------------------------------ shapes


def flat(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The FQNs whose shapes are not known: nothing should be written before `shaped` gave them theirs."""
    return tuple(name for name, tensor in checkpoint.tensors.items() if isinstance(tensor, Flat))


def shaped(checkpoint: Checkpoint, shapes: Mapping[str, Shape]) -> Checkpoint:
    """The checkpoint with every flat parameter in the shape that `shapes` gives for its FQN.

    Raises Mismatch, listing all of them, when a shape is missing or has another number of elements.
    """
    flats = flat(checkpoint)
    unknown = [name for name in flats if name not in shapes]
    if unknown:
        raise Mismatch(
            f"{checkpoint.origin.path}: the config gives no shape for {len(unknown)} of {len(flats)} flat parameters:"
            f" {listed(unknown)}",
            hint="give the config.json of the model that was trained",
        )
    wrong = [
        f"{name} ({checkpoint.tensors[name].size} elements, {list(shapes[name])} wanted)"
        for name in flats
        if checkpoint.tensors[name].size != math.prod(shapes[name])
    ]
    if wrong:
        raise Mismatch(
            f"{checkpoint.origin.path}: {len(wrong)} of {len(flats)} flat parameters do not fit the config's shapes:"
            f" {listed(wrong)}",
            hint="give the config.json of the model that was trained",
        )
    tensors = {
        name: Concat(tensor.dtype, tensor.shape, tensor.parts).reshape(shapes[name])
        if isinstance(tensor, Flat)
        else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    notices = tuple(n for n in checkpoint.notices if not n.startswith("flat: "))
    return replace(checkpoint, tensors=tensors, notices=notices)
