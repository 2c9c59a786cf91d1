"""Rows of tables: what a weight is called in a dialect and on the hub, and how its elements lie in each.

A row serves both directions: it splits a dialect's tensor into the hub's and joins them again, `split(join(x)) == x`.
Names are templates that match whole names only; `{layer}` and `{expert}` are numbers, the rest is in `_PLACEHOLDERS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

from reshard.core.tensor import Tensor, concat, stack
from reshard.errors import Incomplete, Mismatch

Config = Mapping[str, Any]
Parts = Mapping[tuple[int, int], Tensor]
"""The hub's tensors of one row, by expert (0 where there are none) and by place in the row's names."""

_PLACEHOLDERS = {
    "path": r"(?:[A-Za-z_]\w*\.)*",
    "layer": r"\d+",
    "expert": r"\d+",
    "rest": r".+",
    "part": r"embeddings|encoder|pre_layrnorm|post_layernorm|head",
}


class Row(Protocol):
    """One tensor of a dialect, and the hub's tensors for it."""

    @property
    def module(self) -> str:
        """The dialect's name."""

    @property
    def before(self) -> bool:
        """Of an older release: taken to the hub's name, never made from it."""

    @property
    def hubs(self) -> tuple[str, ...]:
        """The hub's names."""

    def split(self, tensor: Tensor, at: Mapping[str, str]) -> dict[str, Tensor]:
        """The hub's tensors that a dialect's tensor holds, by name."""

    def join(self, parts: Parts, name: str) -> Tensor:
        """The dialect's tensor `name`. Raises Incomplete when a part is missing."""


@dataclass(frozen=True, slots=True)
class Rename:
    """One tensor, two names."""

    module: str
    hub: str
    before: bool = False
    """Of an older release: taken to the hub's name, never made from it."""

    @property
    def hubs(self) -> tuple[str, ...]:
        return (self.hub,)

    def split(self, tensor: Tensor, at: Mapping[str, str]) -> dict[str, Tensor]:
        """The hub's tensors that a module's tensor holds, by name."""
        return {self.hub.format(**at): tensor}

    def join(self, parts: Parts, name: str) -> Tensor:
        return parts[0, 0]


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a layer: one tensor (E, n * rows, columns) for n matrices (rows, columns) an expert."""

    module: str
    hub: tuple[str, ...]
    """With `{expert}`; in the order in which the matrices lie below each other."""
    before: bool = False

    @property
    def hubs(self) -> tuple[str, ...]:
        return self.hub

    def split(self, tensor: Tensor, at: Mapping[str, str]) -> dict[str, Tensor]:
        """The matrices of all experts, by name."""
        if len(tensor.shape) != 3 or not tensor.shape[0] or tensor.shape[1] % len(self.hub):
            raise Mismatch(f"{self.module.format(**at)}: shape {list(tensor.shape)} is not that of fused experts")
        rows = tensor.shape[1] // len(self.hub)
        return {
            name.format(**at, expert=e): tensor[e, n * rows : (n + 1) * rows]
            for n, name in enumerate(self.hub)
            for e in range(tensor.shape[0])
        }

    def join(self, parts: Parts, name: str) -> Tensor:
        num_experts, slots = 1 + max(expert for expert, _ in parts), range(len(self.hub))
        missing = num_experts * len(slots) - len(parts)
        if missing:
            raise Incomplete(f"{name}: {missing} of {num_experts * len(slots)} matrices of its experts are missing")
        return stack([concat([parts[e, slot] for slot in slots], 0) for e in range(num_experts)])


_R = TypeVar("_R", bound=Row)


@cache
def pattern(template: str) -> re.Pattern[str]:
    """Matches the names that a template stands for, with its placeholders as groups."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{p}>{_PLACEHOLDERS[p]})" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


def matching(fqn: str, rows: Iterable[_R]) -> Iterator[tuple[_R, dict[str, str]]]:
    """The first row whose dialect's name this is, with what its placeholders stand for; or nothing."""
    for row in rows:
        match = pattern(row.module).fullmatch(fqn)
        if match:
            yield row, match.groupdict()
            return


def joined(tensors: Mapping[str, Tensor], rows: Iterable[Row]) -> dict[str, Tensor]:
    """Tensors under the hub's names as the dialect's; those that no row knows stay as they are."""
    rows = [row for row in rows if not row.before]
    result: dict[str, Tensor] = {}
    waiting: dict[str, tuple[Row, dict[tuple[int, int], Tensor]]] = {}
    for fqn, tensor in tensors.items():
        row, slot, at = _hub_row(fqn, rows)
        if row is None:
            result[fqn] = tensor
            continue
        expert = int(at.pop("expert", 0))
        waiting.setdefault(row.module.format(**at), (row, {}))[1][expert, slot] = tensor
    return result | {name: row.join(parts, name) for name, (row, parts) in waiting.items()}


def _hub_row(fqn: str, rows: Iterable[Row]) -> tuple[Row | None, int, dict[str, str]]:
    for row in rows:
        for slot, name in enumerate(row.hubs):
            match = pattern(name).fullmatch(fqn)
            if match:
                return row, slot, match.groupdict()
    return None, 0, {}


def natural(fqn: str) -> list[tuple[int, int, str, int]]:
    """A sort key, numbers by value: the order in which transformers writes weights that it converts."""
    return [_segment(part) for part in fqn.split(".")]


def _segment(part: str) -> tuple[int, int, str, int]:
    if part.isdecimal():
        return 0, int(part), "", -1
    text = part.rstrip("0123456789")
    return 1, 0, text, int(part[len(text) :] or -1)
