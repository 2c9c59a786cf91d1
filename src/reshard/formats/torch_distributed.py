"""What DTensor and ShardedTensor say, in a torch pickle, of the share that one rank holds of a tensor.

    DTensor         _local_tensor, and _spec: a DTensorSpec
                    ├─ mesh          a DeviceMesh: _coordinate_on_dim, and the shape as `mesh` (a tensor, up to 2.9),
                    │                `_layout` with `shape` (2.10 to 2.12) or with `axes` (2.13 and later)
                    ├─ placements    a tuple of Shard(dim), Replicate(), _StridedShard(dim, split_factor), Partial(op)
                    ├─ tensor_meta   shape, stride and dtype of the whole tensor
                    └─ shard_order   2.10 and later: the order in which mesh axes cut one dimension, or None
    ShardedTensor   a tuple: [Shard(tensor, metadata: shard_offsets, shard_sizes)], ShardedTensorMetadata, ...

Source: pytorch `torch/distributed/tensor/{_api,_dtensor_spec,placement_types}.py`, `torch/distributed/device_mesh.py`
and `torch/distributed/_shard/sharded_tensor`, 2.0 to 2.15. The modules moved; class names did not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

from reshard.core.box import Box, Shape
from reshard.core.mesh import Mesh, Placement, Replicate, Shard, StridedShard, local_shape, shard
from reshard.errors import Corrupt, Unsupported
from reshard.storage.unpickle import Inert, Rebuilt, TensorRef

MAX_NUM_PIECES = 1 << 20
"""More pieces than this are not cut out of one dimension, whatever a file claims."""
_PLAIN_CLASSES = ("Tensor", "Parameter", "Buffer", "UninitializedParameter")


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the whole tensor, and where a rank stores it."""

    place: Box
    local: TensorRef
    part: Box
    """Of `local`."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of a tensor."""

    dtype: str
    """Torch name."""
    shape: Shape
    """Of the whole tensor."""
    pieces: tuple[Piece, ...]
    cut: str
    """How the tensor is cut, in words."""
    num_ranks: int
    """How many ranks the tensor lies on, at least."""
    problem: str = ""
    """Why `pieces` cannot be right: the local tensor has another shape."""
    literal: tuple[Piece, ...] | None = None
    """The other reading of strided placements (see `core.mesh`), where the local tensor has its shape."""

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds every element."""
        return sum(piece.place.size for piece in self.pieces) == math.prod(self.shape)


def is_distributed(leaf: object) -> bool:
    """Whether a leaf of a pickle is a DTensor or a ShardedTensor."""
    return isinstance(leaf, Rebuilt) and leaf.cls.name in ("DTensor", "ShardedTensor")


def share(leaf: Rebuilt, where: str) -> Share:
    """The share of the rank whose file this leaf is from; `settled` says which of its readings holds.

    `where` names file and FQN for messages. Raises Unsupported for partial sums and for placements and local tensors
    that are not known, Corrupt for what torch does not write.
    """
    try:
        return _sharded_tensor(leaf, where) if leaf.cls.name == "ShardedTensor" else _dtensor(leaf, where)
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise Corrupt(f"{where}: not a {leaf.cls.name} as torch pickles them: {error}"[:400]) from error


def settled(shares: Sequence[Share]) -> list[Share]:
    """What all ranks hold of one tensor, strided placements read so that every rank has the shape that it has.

    Where both readings fit, they are the same (tried on all meshes up to 8 x 8 and sizes up to 100). Raises Corrupt
    when neither does.
    """
    problem = next((s.problem for s in shares if s.problem), "")
    if not problem:
        return list(shares)
    if any(s.literal is None for s in shares):
        raise Corrupt(problem)
    return [replace(s, pieces=s.literal or (), problem="", literal=None) for s in shares]


def plain_tensor(value: object) -> TensorRef | None:
    """The dense tensor that a value is, if it is one and nothing more."""
    if isinstance(value, Rebuilt) and value.cls.name in _PLAIN_CLASSES and isinstance(value.inner, TensorRef):
        return value.inner
    return value if isinstance(value, TensorRef) else None


# -------------------------------------------------------------------------------------------------------- DTensor


def _dtensor(leaf: Rebuilt, where: str) -> Share:
    spec = _inert(leaf.attr("_spec"), where, "a DTensor's _spec")
    local = _local(leaf.attr("_local_tensor"), where)
    shape = _global_shape(leaf, spec, where)
    mesh, coordinate = _mesh(_inert(spec.attr("mesh"), where, "a DTensor's mesh"), where)
    placements = [_placement(p, len(shape), where) for p in spec.attr("placements")]
    cut = _words(placements, mesh)
    if coordinate is None:
        return Share(local.dtype, shape, (), cut, mesh.num_ranks)
    if not len(placements) == len(coordinate) == len(mesh.sizes):
        raise Corrupt(f"{where}: {len(placements)} placements at {list(coordinate)} on a mesh of {list(mesh.sizes)}")
    if any(not 0 <= c < n for c, n in zip(coordinate, mesh.sizes, strict=True)):
        raise Corrupt(f"{where}: the rank is at {list(coordinate)} of a mesh of {list(mesh.sizes)}")
    _check_pieces(placements, mesh, where)
    order = _axis_order(spec.attr("shard_order"), placements, where)
    by_order = tuple(zip(*((mesh.sizes[i], placements[i], coordinate[i]) for i in order), strict=True))
    found = _cut(shape, by_order, False)
    problem = ""
    pieces = _pieces(found, local)
    literal: tuple[Piece, ...] | None = pieces
    if not _fits(found, shape, local):
        problem = (
            f"{where}: {cut} of shape {list(shape)} gives the rank at {list(coordinate)} the shape"
            f" {list(local_shape(found, shape))}, it holds {list(local.size)}"
        )
    if any(isinstance(p, StridedShard) for p in placements):
        others = _cut(shape, by_order, True)
        literal = _pieces(others, local) if _fits(others, shape, local) else None
    elif problem:
        literal = None
    return Share(local.dtype, shape, pieces, cut, mesh.num_ranks, problem, literal)


_ByOrder: TypeAlias = tuple[Any, ...]


@lru_cache(maxsize=4096)
def _cut(shape: Shape, by_order: _ByOrder, literal: bool) -> tuple[tuple[Box, Box], ...]:
    """`core.mesh.shard`, whose answer is the same for hundreds of tensors; sizes, placements, coordinate in order."""
    sizes, placements, coordinate = by_order or ((), (), ())
    return tuple((a, b) for a, b in shard(shape, Mesh(sizes), placements, coordinate, literal=literal) if a.size)


def _pieces(places: Sequence[tuple[Box, Box]], local: TensorRef) -> tuple[Piece, ...]:
    return tuple(Piece(place, local, part) for place, part in places)


def _fits(places: Sequence[tuple[Box, Box]], shape: Shape, local: TensorRef) -> bool:
    held = local_shape(places, shape)
    return held == tuple(local.size) or (0 in held and 0 in local.size)


def _local(value: object, where: str) -> TensorRef:
    local = plain_tensor(value)
    if local is None:
        what = value.cls.name if isinstance(value, Inert) else type(value).__name__
        raise Unsupported(
            f"{where}: a DTensor whose local tensor is a {what[:100]}",
            hint="turn such tensors into plain ones before saving: their layout is known to their own library only",
        )
    return local


def _global_shape(leaf: Rebuilt, spec: Inert, where: str) -> Shape:
    """As the wrapper and the spec both say it."""
    if not isinstance(leaf.inner, Inert):
        raise Corrupt(f"{where}: a DTensor that is not made by _rebuild_wrapper_subclass")
    shape = _counts(leaf.inner.args[2], where)
    meta = spec.attr("tensor_meta")
    if isinstance(meta, Inert):
        said = meta.attr("shape", meta.args[0] if meta.args else None)
        if said is not None and _counts(said, where) != shape:
            raise Corrupt(f"{where}: a DTensor of shape {list(shape)} whose spec says {list(said)}")
    return shape


def _mesh(mesh: Inert, where: str) -> tuple[Mesh, Shape | None]:
    """The mesh, and this rank's coordinate; None for a rank outside of it."""
    layout, tensor = mesh.attr("_layout"), plain_tensor(mesh.attr("mesh"))
    if isinstance(layout, Inert):
        axes = layout.attr("axes")
        sizes = layout.attr("shape") if axes is None else [axis.attr("shape") for axis in axes]
        shape = tuple(_product(size, where) for size in (sizes if isinstance(sizes, tuple | list) else (sizes,)))
    elif tensor is not None:
        shape = _counts(tensor.size, where)
    else:
        raise Unsupported(f"{where}: a DeviceMesh that does not tell its shape")
    if min(shape, default=1) < 1:
        raise Corrupt(f"{where}: a mesh of {list(shape)}")
    names = mesh.attr("_mesh_dim_names", mesh.attr("mesh_dim_names"))
    known = tuple(map(str, names)) if isinstance(names, tuple | list) and len(names) == len(shape) else ()
    coordinate = mesh.attr("_coordinate_on_dim")
    return Mesh(shape, known), None if coordinate is None else _counts(coordinate, where)


def _product(size: object, where: str) -> int:
    """The length of an axis, which a flattened mesh gives as nested lengths."""
    if isinstance(size, tuple | list):
        return math.prod(_product(n, where) for n in size)
    return _counts((size,), where)[0]


def _placement(value: object, rank: int, where: str) -> Placement:
    placement = _inert(value, where, "a placement")
    name = placement.cls.name
    if name == "Replicate":
        return Replicate()
    if name not in ("Shard", "_StridedShard"):
        raise Unsupported(
            f"{where}: its placement is {name[:100]}",
            hint="partial sums are not weights: redistribute such tensors to Shard or Replicate before saving"
            if "Partial" in name
            else None,
        )
    dim = placement.attr("dim", placement.args[0] if placement.args else None)
    if type(dim) is not int or not -rank <= dim < rank:
        raise Corrupt(f"{where}: Shard({dim!r}) of a tensor of {rank} dimensions"[:400])
    dim %= rank
    if name == "Shard":
        return Shard(dim)
    return StridedShard(dim, _counts((placement.attr("split_factor"),), where)[0])


def _check_pieces(placements: Sequence[Placement], mesh: Mesh, where: str) -> None:
    splits = [p.split for p in placements if isinstance(p, StridedShard)]
    if min(splits, default=1) < 1 or math.prod(splits) > MAX_NUM_PIECES or mesh.num_ranks > 1 << 32:
        raise Corrupt(f"{where}: a mesh of {list(mesh.sizes)} with split factors {splits}")


def _axis_order(order: object, placements: Sequence[Placement], where: str) -> list[int]:
    """The axes in the order in which they cut. Axes that cut different dimensions do not depend on each other."""
    axes = list(range(len(placements)))
    if not order or any(isinstance(p, StridedShard) for p in placements):
        return axes
    if not isinstance(order, tuple | list):
        raise Corrupt(f"{where}: a shard_order that is no tuple")
    first: list[int] = []
    for entry in order:
        dims = entry.attr("mesh_dims", entry.args[1] if len(entry.args) > 1 else None)
        first += _counts(dims, where)
    if len(set(first)) != len(first) or not set(first) <= set(axes):
        raise Corrupt(f"{where}: a shard_order over the axes {first} of {len(axes)}")
    return first + [axis for axis in axes if axis not in first]


def _words(placements: Sequence[Placement], mesh: Mesh) -> str:
    cuts = []
    for axis, placement in enumerate(placements[: len(mesh.sizes)]):
        on = f"{mesh.names[axis]}={mesh.sizes[axis]}" if mesh.names else str(mesh.sizes[axis])
        match placement:
            case Shard(dim):
                cuts.append(f"Shard({dim}) x {on}")
            case StridedShard(dim, _):
                cuts.append(f"StridedShard({dim}) x {on}")
            case Replicate():
                cuts.append(f"Replicate x {on}")
    return ", ".join(cuts) or "whole"


# -------------------------------------------------------------------------------------------------- ShardedTensor


def _sharded_tensor(leaf: Rebuilt, where: str) -> Share:
    shards, metadata, group = leaf.state[:3]
    shape = _counts(_inert(metadata, where, "a ShardedTensor's metadata").attr("size"), where)
    num_shards = len(metadata.attr("shards_metadata", ()))
    pieces, kind = [], ""
    for held in shards:
        described = _inert(held.attr("metadata"), where, "a Shard's metadata")
        offsets = _counts(described.attr("shard_offsets"), where)
        sizes = _counts(described.attr("shard_sizes"), where)
        local = _local(held.attr("tensor"), where)
        if tuple(local.size) != sizes or len(offsets) != len(shape):
            raise Corrupt(f"{where}: a shard of {list(sizes)} at {list(offsets)} that holds {list(local.size)}")
        kind = local.dtype
        if math.prod(sizes):
            pieces.append(Piece(Box.at(offsets, sizes), local, Box.whole(sizes)))
    num_ranks = group.attr("global_world_size", 0) if isinstance(group, Inert) else 0
    num_ranks = num_ranks if type(num_ranks) is int else 0
    cut = f"ShardedTensor x {num_ranks or num_shards}"
    return Share(kind or _named_dtype(leaf, where), shape, tuple(pieces), cut, max(num_ranks, 1))


def _named_dtype(leaf: Rebuilt, where: str) -> str:
    """Of a rank that holds nothing: what the wrapper says."""
    name = getattr(leaf.inner.args[1], "name", None) if isinstance(leaf.inner, Inert) else None
    if not isinstance(name, str):
        raise Corrupt(f"{where}: a ShardedTensor without a dtype")
    return name


# -------------------------------------------------------------------------------------------------------- borders


def _inert(value: object, where: str, what: str) -> Inert:
    if not isinstance(value, Inert):
        raise Corrupt(f"{where}: {what} is a {type(value).__name__}")
    return value


def _counts(value: Any, where: str) -> Shape:
    """A shape, offsets or coordinates. Raises Corrupt unless they are counts."""
    counts = tuple(value)
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in counts):
        raise Corrupt(f"{where}: numbers that are no counts in a shape or place")
    return counts
