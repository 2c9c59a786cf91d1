"""Parameters out of the flat tensors that ZeRO cuts over its ranks.

    ZeRO 1, 2   rank 0 | rank 1 | ...                the ranks' parts, end to end, are all parameters, end to end
    ZeRO 3      each parameter is cut into ceil(numel / ranks) elements a rank; a rank has its parts end to end

Both layouts are runs of elements taken from what lies end to end; padding is what nobody takes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from reshard.core.box import Shape
from reshard.core.tensor import Literal, Tensor, concat, squeeze
from reshard.errors import Corrupt, Incomplete

Groups = Sequence[Sequence[Tensor]]
"""What each rank has of each group: `groups[rank][group]`."""


def end_to_end(ranks: Groups, shapes: Sequence[Mapping[str, Shape]], where: str) -> dict[str, Tensor]:
    """ZeRO 1 and 2: the parameters of each group out of the ranks' parts laid end to end."""
    found = {}
    align = 2 * len(ranks)  # DeepSpeed pads each group to a multiple, and may leave the padding out when it saves
    for number, group in enumerate(shapes):
        flat = Flat([rank[number] for rank in ranks])
        start = 0
        for name, shape in group.items():
            stop = start + math.prod(shape)
            if stop > flat.size:
                raise Incomplete(
                    f"{where}: {name} is elements {start} to {stop} of group {number}, of which the {len(ranks)} ranks"
                    f" hold {flat.size}"
                )
            found[name] = joined(flat.take(start, stop), ranks[0][number], shape)
            start = stop
        if -(-start // align) != -(-flat.size // align):
            raise Corrupt(
                f"{where}: group {number} has {flat.size} elements, its parameters have {start}: more is left over"
                f" than padding to a multiple of {align}"
            )
    return found


def interleaved(ranks: Groups, shapes: Sequence[Mapping[str, Shape]], where: str) -> dict[str, Tensor]:
    """ZeRO 3: each parameter out of its parts on every rank."""
    flats = [Flat(rank) for rank in ranks]
    params = {name: shape for group in shapes for name, shape in group.items()}
    expected = sum(-(-math.prod(shape) // len(ranks)) for shape in params.values())
    for rank, flat in enumerate(flats):
        if flat.size != expected:
            raise Corrupt(f"{where}: rank {rank} holds {flat.size} elements, its parts of the parameters {expected}")
    found, at = {}, 0
    for name, shape in params.items():
        numel = math.prod(shape)
        part = -(-numel // len(ranks))
        pieces = [
            piece
            for rank, flat in enumerate(flats)
            for piece in flat.take(at, at + max(0, min(part, numel - rank * part)))
        ]
        found[name] = joined(pieces, ranks[0][0], shape)
        at += part
    return found


class Flat:
    """1-D tensors end to end, from which runs of elements are taken."""

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


def joined(pieces: Sequence[Tensor], like: Tensor, shape: Shape) -> Tensor:
    """Pieces end to end, in a shape of as many elements."""
    if not pieces:
        return Literal(like.dtype, shape, b"")
    whole = concat(pieces, 0)
    return whole.reshape(shape) if shape else squeeze(whole, 0)
