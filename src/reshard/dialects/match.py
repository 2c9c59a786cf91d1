"""Rows found by pattern: for dialects of which a tensor's name tells all that its row asks.

Nothing is known here of how many layers there are, so a name that no row has passes by, and what is missing of a model
is not missed. How many experts our tensor packs is seen on its shape, or on the names of the hub's. Rows of tensors
that the hub packs need facts: one of them does not tell how many there are.

Names are templates that match whole names only; `{layer}` and `{expert}` are numbers, the rest is in `_PLACEHOLDERS`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import islice

from reshard.core.tensor import Tensor
from reshard.dialects.fuse import Sizes
from reshard.dialects.table import Row
from reshard.errors import Incomplete, Mismatch, listed

Numbers = dict[str, str]
"""What the placeholders of a template stand for."""

_NUMBER = r"(?:0|[1-9][0-9]{0,6})"
_PLACEHOLDERS = {
    "path": r"(?:[A-Za-z_]\w*\.)*",
    "layer": _NUMBER,
    "expert": _NUMBER,
    "rest": r".+",
    "part": r"embeddings|encoder|pre_layrnorm|post_layernorm|head",
}


@cache
def pattern(template: str) -> re.Pattern[str]:
    """Matches the names that a template stands for, with its placeholders as groups."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{p}>{_PLACEHOLDERS[p]})" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


def by_name(fqn: str, rows: Iterable[Row]) -> tuple[Row, Numbers] | None:
    """The first row whose tensor has this name in the dialect."""
    for row in rows:
        match = pattern(row.name).fullmatch(fqn)
        if match:
            return row, match.groupdict()
    return None


def by_hub_name(fqn: str, rows: Iterable[Row]) -> tuple[Row, int, Numbers] | None:
    """The first row that has this name on the hub, and which of its names that is."""
    for row in rows:
        for kind, name in enumerate(row.hubs):
            match = pattern(name).fullmatch(fqn)
            if match:
                return row, kind, match.groupdict()
    return None


def split(tensor: Tensor, row: Row, at: Numbers, sizes: Sizes) -> dict[str, Tensor]:
    """The hub's tensors that a tensor of the dialect holds. Raises Mismatch for a shape that is not the row's."""
    parts = row.split(tensor, sizes, row.name.format(**at))
    count = len(parts) // len(row.hubs) if row.packs else 1
    return dict(zip(row.hub_names(at, count), parts, strict=True))


def joined(
    tensors: Mapping[str, Tensor], rows: Iterable[Row], sizes: Sizes, only: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Tensors under the hub's names as the dialect's; those that no row knows stay as they are.

    `only` holds the dialect's names that are wanted, where that is not all. Raises Incomplete when a part is missing.
    """
    rows = [row for row in rows if not row.variant]
    result: dict[str, Tensor] = {}
    found: dict[str, _Parts] = {}
    for fqn, tensor in tensors.items():
        match = by_hub_name(fqn, rows)
        name = match[0].name.format(**match[2]) if match else fqn
        if match is None or (only is not None and name not in only):
            result[fqn] = tensor
            continue
        row, kind, at = match
        found.setdefault(name, _Parts(row, at)).add(kind, tensor, at, name)
    twice = result.keys() & found.keys()
    if twice:
        raise Mismatch(f"{listed(sorted(twice))}: there are tensors of these names, and others that make them")
    return result | {name: parts.joined(name, sizes) for name, parts in found.items()}


@dataclass(frozen=True, slots=True)
class _Parts:
    """The hub's tensors of one of the dialect's."""

    row: Row
    at: Numbers
    parts: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By kind (the place in the row's names) and number, 0 where our tensor packs nothing."""

    def add(self, kind: int, tensor: Tensor, at: Numbers, name: str) -> None:
        place = kind, int(at[self.row.packs]) if self.row.packs else 0
        if place in self.parts:
            raise Mismatch(f"{name}: there are two tensors for {self._hub_name(*place)}")
        self.parts[place] = tensor

    def joined(self, name: str, sizes: Sizes) -> Tensor:
        """The dialect's tensor. Raises Incomplete when a part is missing."""
        kinds, count = len(self.row.hubs), 1 + max(number for _, number in self.parts)
        missing = kinds * count - len(self.parts)
        if missing:
            places = ((kind, number) for number in range(count) for kind in range(kinds))
            lacking = (self._hub_name(*place) for place in places if place not in self.parts)
            said = f"{missing} of {kinds * count} matrices of its experts are missing, " if self.row.packs else ""
            raise Incomplete(f"{name}: {said}no tensor for {listed(islice(lacking, 5))}")
        in_order = [self.parts[kind, number] for kind in range(kinds) for number in range(count)]
        return self.row.join(in_order, sizes, name)

    def _hub_name(self, kind: int, number: int) -> str:
        return self.row.hubs[kind].format(**self.at | ({self.row.packs: str(number)} if self.row.packs else {}))


def natural(fqn: str) -> list[tuple[int, int, str, int]]:
    """A sort key, numbers by value: the order in which transformers writes weights that it converts."""
    return [_segment(part) for part in fqn.split(".")]


def _segment(part: str) -> tuple[int, int, str, int]:
    text = part.rstrip("0123456789")
    digits = part[len(text) :]
    if len(digits) > _MAX_DIGITS:
        return 1, 0, part, -1
    return (1, 0, text, int(digits or -1)) if text else (0, int(digits or 0), "", -1)


_MAX_DIGITS = 18
"""Longer ones are no numbers of layers or experts, whatever wrote them."""
