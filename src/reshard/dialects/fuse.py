"""Fuses: how tensors of the hub lie in one tensor of a dialect.

A fuse joins hub parts into the dialect's tensor and splits it back; both are views, `split(join(x)) == x`. Sizes that
the shapes do not tell (heads, groups, ...) come by name from the model's facts.

    QKV         [q heads of the group; k; v] of each key-value group, one group below the other
    GatedQkv    the same, with the output gates of the group's heads between q and k
    Glu         [gate; up]
    Rows        parts one below the other, each of a named number of rows
    Beside      parts next to each other, each of as many columns
    Rotary      rows of a head by pairs or by halves
    Chained     a fuse whose parts have a fuse each
    Stacked     what a fuse makes of the parts of each number, along a new first dimension

Legend of shapes: R query heads in a group, G groups, D size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from reshard.core.compute import shift
from reshard.core.dtypes import DType
from reshard.core.tensor import Filled, Tensor, concat, stack, unsqueeze
from reshard.errors import Mismatch, listed

Sizes = Mapping[str, int]
"""Named sizes of a model: `heads`, `groups`, `head_dim`, `vocab`, ..."""


class Fuse(Protocol):
    """One tensor of a dialect, made of hub parts."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        """The dialect's tensor. Raises Mismatch when the parts do not have the shapes that the sizes ask for."""

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        """The parts, in the order in which `join` takes them."""


@dataclass(frozen=True, slots=True)
class Same:
    """One tensor, the same in both."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        return parts[0]

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        return (tensor,)


@dataclass(frozen=True, slots=True)
class Glu:
    """[gate; up]: two halves of equal rows."""

    packed: bool = False
    """Whether the hub has them in one tensor too, the same one."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        if self.packed:
            self._half(parts[0])
            return parts[0]
        gate, up = parts
        _expect(gate.shape == up.shape, f"gate {list(gate.shape)} and up {list(up.shape)} are not alike")
        _expect_alike(parts)
        return concat([gate, up], 0)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        half = self._half(tensor)
        return (tensor,) if self.packed else (tensor[:half], tensor[half:])

    @staticmethod
    def _half(tensor: Tensor) -> int:
        return _half_of(tensor, "rows")


@dataclass(frozen=True, slots=True)
class Qkv:
    """Query, key and value grouped by key-value head; of weights (rows, H) and biases (rows) alike."""

    gated: bool = False
    """Whether each query head of the hub's q is followed by its output gate."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        q, k, v = parts
        groups, per_group, head = _grouping(sizes)
        kinds = 2 if self.gated else 1
        _expect_rows(q, groups * per_group * kinds * head, "q_proj")
        _expect_rows(k, groups * head, "k_proj")
        _expect_rows(v, groups * head, "v_proj")
        _expect_alike(parts)
        q_GR = q.unflatten(0, (groups, per_group, kinds, head))
        if self.gated:
            q_GR = q_GR.permute(0, 2, 1, 3, *range(4, len(q_GR.shape)))
        grouped = [q_GR.flatten(1, 3), k.unflatten(0, (groups, head)), v.unflatten(0, (groups, head))]
        return concat(grouped, 1).flatten(0, 1)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        groups, per_group, head = _grouping(sizes)
        kinds = 2 if self.gated else 1
        rows_q = per_group * kinds * head
        _expect_rows(tensor, groups * (rows_q + 2 * head), "linear_qkv")
        grouped = tensor.unflatten(0, (groups, rows_q + 2 * head))
        q = grouped[:, :rows_q].unflatten(1, (kinds, per_group, head))
        if self.gated:
            q = q.permute(0, 2, 1, 3, *range(4, len(q.shape)))
        k, v = grouped[:, rows_q : rows_q + head], grouped[:, rows_q + head :]
        return q.flatten(0, 3), k.flatten(0, 1), v.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class PackedQkv:
    """The hub's one tensor [all q; all k; all v], grouped by key-value head in the dialect."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        groups, per_group, head = _grouping(sizes)
        rows = _cut(parts[0], (groups * per_group * head, groups * head, groups * head), "qkv_proj")
        return Qkv().join(rows, sizes)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        return (concat(Qkv().split(tensor, sizes), 0),)


@dataclass(frozen=True, slots=True)
class HeadQkv:
    """The hub's [all q; all k; all v] of as many heads each; per head [q; k; v] in the dialect (vision towers)."""

    heads: str
    """The name of the size that counts the heads."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        return self._turned(parts[0], (3, sizes[self.heads]))

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        return (self._turned(tensor, (sizes[self.heads], 3)),)

    def _turned(self, tensor: Tensor, outer: tuple[int, int]) -> Tensor:
        rows = _num_rows(tensor)
        _expect(rows > 0 and rows % (outer[0] * outer[1]) == 0, f"{rows} rows are not q, k and v of {max(outer)} heads")
        cut = tensor.unflatten(0, (*outer, rows // (outer[0] * outer[1])))
        return cut.permute(1, 0, 2, *range(3, len(cut.shape))).flatten(0, 2)


@dataclass(frozen=True, slots=True)
class Rows:
    """Hub tensors one below the other."""

    rows: tuple[str, ...]
    """For each part the name of the size that counts its rows; `a+b` is a sum of sizes."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        for part, rows in zip(parts, self.counts(sizes), strict=True):
            _expect_rows(part, rows, "the part")
        _expect_alike(parts)
        return concat(list(parts), 0)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        return _cut(tensor, self.counts(sizes), "the tensor")

    def counts(self, sizes: Sizes) -> tuple[int, ...]:
        """The rows of each part."""
        return tuple(sum(sizes[name] for name in rows.split("+")) for rows in self.rows)


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Parts that the hub interleaves by key head (rows of each part for head 0, for head 1, ...), whole in the dialect.

    Two hub tensors after one another, each a list of parts (Qwen3-Next's `in_proj_qkvz` and `in_proj_ba`).
    """

    heads: str
    parts: tuple[tuple[str, ...], ...]
    """For each hub tensor the sizes (all heads together) of the parts in it."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        whole: list[Tensor] = []
        heads = sizes[self.heads]
        _expect_alike(parts)
        for hub, names in zip(parts, self.parts, strict=True):
            per_head = [self._per_head(name, sizes) for name in names]
            _expect_rows(hub, heads * sum(per_head), "the interleaved projection")
            rows = hub.unflatten(0, (heads, sum(per_head)))
            at = 0
            for n in per_head:
                whole.append(rows[:, at : at + n].flatten(0, 1))
                at += n
        return concat(whole, 0)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        heads = sizes[self.heads]
        counts = tuple(sizes[name] for names in self.parts for name in names)
        cut = iter(_cut(tensor, counts, "the projection"))
        return tuple(
            concat([next(cut).unflatten(0, (heads, self._per_head(name, sizes))) for name in names], 1).flatten(0, 1)
            for names in self.parts
        )

    def _per_head(self, name: str, sizes: Sizes) -> int:
        heads, rows = sizes[self.heads], sizes[name]
        _expect(heads > 0 and rows % heads == 0, f"{rows} rows of {name} for {heads} heads")
        return rows // heads


@dataclass(frozen=True, slots=True)
class Transposed:
    """The hub's matrices (..., in, out), the dialect's (..., out, in); vectors are the same in both."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        return _transposed(parts[0])

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        return (_transposed(tensor),)


@dataclass(frozen=True, slots=True)
class HalvesSwapped:
    """A matrix of two inputs side by side, in the other order in the dialect."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        tensor = parts[0]
        columns = tensor.shape[1] if len(tensor.shape) == 2 else 0
        _expect(columns > 0 and columns % 2 == 0, f"{list(tensor.shape)} is not a matrix of two inputs")
        return concat([tensor[:, columns // 2 :], tensor[:, : columns // 2]], 1)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        return (self.join((tensor,), sizes),)


@dataclass(frozen=True, slots=True)
class OneRow:
    """A vector in the dialect, a matrix of one row on the hub."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        _expect(
            len(parts[0].shape) == 2 and parts[0].shape[0] == 1, f"{list(parts[0].shape)} is not a matrix of one row"
        )
        return parts[0][0]

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        return (unsqueeze(tensor, 0),)


@dataclass(frozen=True, slots=True)
class InterleavedGlu:
    """[gate; up] in the dialect; (in, gate and up by turns) in the hub. Biases by turns too."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        turns = _transposed(parts[0])
        return _by_turns(turns, (_half_of(turns, "columns"), 2))

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        return (_transposed(_by_turns(tensor, (2, _half_of(tensor, "rows")))),)


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows by token: as many as the vocabulary has on the hub, padded with zeros in the dialect."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        tensor, rows = parts[0], sizes.get("padded_vocab", sizes["vocab"])
        _expect_rows(tensor, sizes["vocab"], "the vocabulary")
        _expect(rows >= sizes["vocab"], f"a vocabulary of {sizes['vocab']} does not go into {rows} rows")
        if rows == tensor.shape[0]:
            return tensor
        padding = (rows - tensor.shape[0], *tensor.shape[1:])
        return concat([tensor, Filled(tensor.dtype, padding, bytes(tensor.dtype.itemsize))], 0)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        vocab = sizes["vocab"]
        _expect(_num_rows(tensor) >= vocab, f"{_num_rows(tensor)} rows are fewer than the vocabulary's {vocab}")
        return (tensor[:vocab],)


@dataclass(frozen=True, slots=True)
class ZeroCentred:
    """A norm's weight w on the hub, w - 1 in the dialect: the one fuse that computes.

    Each way is rounded once, to nearest even. In bfloat16 the way back is exact for weights in [0.5, 2].
    """

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        return shift(parts[0], -1.0)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        return (shift(tensor, 1.0),)


@dataclass(frozen=True, slots=True)
class Beside:
    """Hub tensors of one shape next to each other: in the last dimension."""

    count: int

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        _expect_same(parts)
        return concat(list(parts), len(parts[0].shape) - 1)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        columns = tensor.shape[-1] if tensor.shape else 0
        _expect(columns > 0 and columns % self.count == 0, f"{columns} columns are not those of {self.count} parts")
        before, each = (slice(None),) * (len(tensor.shape) - 1), columns // self.count
        return tuple(tensor[(*before, slice(n * each, (n + 1) * each))] for n in range(self.count))


@dataclass(frozen=True, slots=True)
class Rotary:
    """A projection to heads: pairs of neighbouring rows in the dialect, first and second halves on the hub."""

    heads: str
    """The name of the size that counts the heads."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        heads, half = self._halves(parts[0], sizes)
        return self._turned(parts[0], (heads, 2, half))

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        heads, half = self._halves(tensor, sizes)
        return (self._turned(tensor, (heads, half, 2)),)

    def _halves(self, tensor: Tensor, sizes: Sizes) -> tuple[int, int]:
        heads, rows = sizes[self.heads], _num_rows(tensor)
        if not rows or rows % (2 * heads):
            shape = list(tensor.shape)
            raise Mismatch(f"shape {shape} does not divide into {2 * heads} blocks of rows, as the config implies")
        return heads, rows // (2 * heads)

    @staticmethod
    def _turned(tensor: Tensor, outer: tuple[int, int, int]) -> Tensor:
        rows = tensor.unflatten(0, outer)
        return rows.permute(0, 2, 1, *range(3, len(rows.shape))).flatten(0, 2)


@dataclass(frozen=True, slots=True)
class Chained:
    """A fuse whose parts go each through a fuse of their own, of one tensor, before they are the hub's."""

    fuse: Fuse
    parts: tuple[Fuse, ...]

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        return self.fuse.join([f.join([p], sizes) for f, p in zip(self.parts, parts, strict=True)], sizes)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        parts = self.fuse.split(tensor, sizes)
        return tuple(f.split(p, sizes)[0] for f, p in zip(self.parts, parts, strict=True))


@dataclass(frozen=True, slots=True)
class Dropped:
    """What the dialect needs and the hub has no place for."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        raise Mismatch("the hub has no tensor for it")

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Stacked:
    """Experts in one tensor of the dialect: what `fuse` makes of the parts of each, along a new first dimension.

    The hub's parts come by kind: the first part of every expert, then the second of every expert, and so on.
    """

    fuse: Fuse
    width: int
    """How many parts an expert has."""
    num_dims: int = 3
    """Of the dialect's tensor."""

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        count = len(parts) // self.width
        whole = [self.fuse.join(parts[expert::count], sizes) for expert in range(count)]
        _expect_same(whole)
        return stack(whole)

    def split(self, tensor: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        said = f"shape {list(tensor.shape)} is not that of fused experts"
        _expect(len(tensor.shape) == self.num_dims and 0 not in tensor.shape, said)
        try:
            experts = [self.fuse.split(tensor[expert], sizes) for expert in range(tensor.shape[0])]
        except Mismatch as error:
            raise Mismatch(f"{said}: {error}") from error
        return tuple(part for kind in zip(*experts, strict=True) for part in kind)


SAME, GLU, QKV, PADDED = Same(), Glu(), Qkv(), Padded()


def _grouping(sizes: Sizes) -> tuple[int, int, int]:
    """(groups, query heads in a group, size of a head)."""
    heads, groups = sizes["heads"], sizes["groups"]
    _expect(groups > 0 and heads % groups == 0, f"{heads} query heads in {groups} groups")
    return groups, heads // groups, sizes["head_dim"]


def _cut(tensor: Tensor, counts: Sequence[int], what: str) -> tuple[Tensor, ...]:
    _expect_rows(tensor, sum(counts), what)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return tuple(tensor[end - n : end] for n, end in zip(counts, ends, strict=True))


def _transposed(tensor: Tensor) -> Tensor:
    last = len(tensor.shape) - 1
    return tensor.permute(*range(last - 1), last, last - 1) if last > 0 else tensor


def _by_turns(tensor: Tensor, outer: tuple[int, int]) -> Tensor:
    cut = tensor.unflatten(0, outer)
    return cut.permute(1, 0, *range(2, len(cut.shape))).flatten(0, 1)


def _half_of(tensor: Tensor, what: str) -> int:
    rows = _num_rows(tensor)
    _expect(rows > 0 and rows % 2 == 0, f"{rows} {what} are not those of a gate and an up projection")
    return rows // 2


def _num_rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.shape else 0


def _expect_alike(parts: Sequence[Tensor]) -> None:
    """Raise Mismatch when parts do not lie one below the other: another dtype, dimension or width."""
    kinds = {(part.dtype.name, len(part.shape), part.shape[1:]) for part in parts}
    if len(kinds) != 1 or not parts[0].shape:
        raise Mismatch(f"parts {_kinds(parts)} do not make one tensor")


def _expect_same(parts: Sequence[Tensor]) -> None:
    """Raise Mismatch when parts differ in dtype or shape, or have none."""
    if len({(part.dtype.name, part.shape) for part in parts}) != 1 or not parts[0].shape:
        raise Mismatch(f"parts {_kinds(parts)} are not alike")


def _kinds(parts: Sequence[Tensor]) -> str:
    return listed(dict.fromkeys(f"{part.dtype} {list(part.shape)}" for part in parts))


def _expect_rows(tensor: Tensor, rows: int, what: str) -> None:
    found = _num_rows(tensor)
    _expect(found == rows, f"{what} has {found} rows, {rows} expected by the config")


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise Mismatch(message)


def computes(fuse: Fuse) -> bool:
    """Whether a fuse rounds: all others only move elements."""
    return isinstance(fuse, ZeroCentred)


def exact_in(dtype: DType) -> str:
    """Where `ZeroCentred` is exact in a dtype, in words."""
    return "where 0.5 <= w <= 2" if dtype.name in ("BF16", "F16") else "for weights that have no more bits than that"
