"""Tables: which tensors a model has, under which names, on the hub and in a dialect.

A `Row` is a line of a table. There are two ways of finding the row of a tensor. By facts, here: bound to a model's
`Facts` a row becomes one `Entry` for each layer and expert, whole names on both sides, so what a table does not take is
known by name, and so is what is missing. By pattern, in `match.py`: where a name alone tells all that there is to know.

    row     decoder.layers.{layer}.mlp.linear_fc1.weight  =  GLU(model.layers.{layer}.mlp.{gate,up}_proj.weight)
    entry   decoder.layers.3.mlp.linear_fc1.weight        =  GLU(model.layers.3.mlp.gate_proj.weight, ...)

Megatron's names here are its modules' own: a number for each layer and expert, no prefix. What a release or a format
makes of them (stacked layers, split halves, ...) is in `megatron.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from reshard.core.tensor import Tensor
from reshard.dialects.facts import Facts
from reshard.dialects.fuse import SAME, Fuse, Rows, Sizes, Stacked
from reshard.dialects.setting import Item
from reshard.errors import InputError

Config = Mapping[str, Any]
"""A model's config.json."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a dialect and the hub's tensors that it is made of. It serves both directions.

    `{layer}`, `{expert}`, ... stand for numbers. A placeholder that only our name has means that the hub packs those
    tensors into one, along a new first dimension; one that only the hub's names have, that our tensor packs them.
    """

    name: str
    """The dialect's."""
    hub: str | tuple[str, ...]
    fuse: Fuse = SAME
    on: tuple[str, ...] = ()
    """Tags of the layer or the model that must all be there."""
    dtype: str = ""
    """Kept in this dtype in every dialect, such as `F32` for what a router adds to its scores."""
    parts: tuple[tuple[str, str], ...] = ()
    """The named parts (name, size of the rows) into which some formats split the dialect's tensor."""
    variant: bool = False
    """Another name that some release or module spec gives the tensor: read, never written."""

    @property
    def hubs(self) -> tuple[str, ...]:
        return (self.hub,) if isinstance(self.hub, str) else self.hub

    @property
    def packs(self) -> str | None:
        """The placeholder whose tensors ours packs."""
        return _only_in(self.hubs, (self.name,))

    @property
    def packed(self) -> str | None:
        """The placeholder whose tensors the hub packs."""
        return _only_in((self.name,), self.hubs)

    def hub_names(self, at: Mapping[str, Any], count: int = 1) -> tuple[str, ...]:
        """The hub's names, with these numbers; by kind, where our tensor packs those of `count` numbers."""
        packs = self.packs
        if packs is None:
            return tuple(hub.format(**at) for hub in self.hubs)
        return tuple(hub.format(**{**at, packs: n}) for hub in self.hubs for n in range(count))

    def join(self, parts: Sequence[Tensor], sizes: Sizes, said: str) -> Tensor:
        """Our tensor, of parts in `hub_names` order. Raises Mismatch, opening with `said`, if they do not fit."""
        try:
            return self._whole().join(parts, sizes)
        except InputError as error:
            raise type(error)(f"{said}: {error}", hint=error.hint) from error

    def split(self, tensor: Tensor, sizes: Sizes, said: str) -> tuple[Tensor, ...]:
        """The parts, the same way round."""
        try:
            return self._whole().split(tensor, sizes)
        except InputError as error:
            raise type(error)(f"{said}: {error}", hint=error.hint) from error

    def _whole(self) -> Fuse:
        """The fuse of the whole tensor."""
        if self.packs is None:
            return self.fuse
        return Stacked(self.fuse, len(self.hubs), 2 if self.hubs[0].endswith("bias") else 3)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row bound to numbers: whole names."""

    row: Row
    name: str
    hub: tuple[str, ...]
    """By kind, where our tensor packs those of several numbers."""
    index: int | None = None
    """Where the hub packs: which of the packed tensors this is."""
    count: int = 1
    """Where the hub packs: how many there are."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor of the hub that repeats another one, which the dialect stores once."""

    name: str
    of: str
    on: tuple[str, ...] = ()
    always: bool = False
    """Whether the hub has it whenever the tags hold; else only where the reference shows it."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: data."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    """What config.json calls the models."""
    rows: tuple[Row, ...]
    facts: Callable[[Config], Facts]
    copies: tuple[Copy, ...] = ()
    stacked: bool = True
    """Whether layers are alike, so that torch_dist stores them under one key with the layers first."""
    settings: tuple[Item, ...] = ()
    """What its models compute with, beside what all models have: see `setting.py`."""
    verified: str = ""
    """Against what the table was checked, in words."""


def entries(family: Family, facts: Facts) -> list[Entry]:
    """Every tensor that a model of these facts has; variants are left out."""
    return [entry for row in family.rows if not row.variant for entry in _bound(row, facts)]


def variants(family: Family, facts: Facts) -> dict[str, Entry]:
    """The other names that the dialect's tensors may have, by name."""
    return {entry.name: entry for row in family.rows if row.variant for entry in _bound(row, facts)}


def copies(family: Family, facts: Facts) -> list[Copy]:
    """The family's copies bound to a model: whole names."""
    bound = []
    for copy in family.copies:
        if not set(copy.on) <= facts.tags:
            continue
        for at in _numbers(_placeholders(copy.name), (), facts):
            bound.append(replace(copy, name=copy.name.format(**at), of=copy.of.format(**at)))
    return bound


def _bound(row: Row, facts: Facts) -> Iterator[Entry]:
    packed = row.packed
    count = 1 if packed is None else _count(packed, facts)
    inside = 1 if row.packs is None else _count(row.packs, facts)
    for at in _numbers(_placeholders(row.name), row.on, facts):
        index = None if packed is None else at[packed]
        yield Entry(row, row.name.format(**at), row.hub_names(at, inside), index, count)


def _numbers(names: Sequence[str], on: Sequence[str], facts: Facts) -> Iterator[dict[str, int]]:
    """What the placeholders may stand for, together."""
    wanted, outer = set(on), [name for name in names if name not in ("layer", "mtp_layer")]
    if "layer" in names:
        layers = [i for i, tags in enumerate(facts.layers) if wanted <= tags | facts.tags]
    else:
        layers = [-1] if wanted <= facts.tags else []
    if "mtp_layer" in names and "mtp" not in outer:
        outer.append("mtp")
    for layer in layers:
        for numbers in product(*(range(_count(name, facts)) for name in outer)):
            at = dict(zip(outer, numbers, strict=True))
            yield at | {"layer": layer, "mtp_layer": len(facts.layers) + at.get("mtp", 0)}


def _count(name: str, facts: Facts) -> int:
    return len(facts.layers) if name == "layer" else facts.counts.get(name, 0)


@cache
def _placeholders(*templates: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for template in templates for name in _PLACEHOLDER.findall(template)))


@cache
def _only_in(templates: tuple[str, ...], others: tuple[str, ...]) -> str | None:
    """The placeholder that templates have and others lack. `{mtp_layer}` is `{mtp}`, counted otherwise."""
    known = {_LIKE.get(name, name) for name in _placeholders(*others)}
    return next((name for name in _placeholders(*templates) if _LIKE.get(name, name) not in known), None)


_LIKE = {"mtp_layer": "mtp"}


# ---------------------------------------------------------------------------------------- rows made of other rows


def under(rows: Iterable[Row], prefix: str = "", hub: Mapping[str, str] | None = None) -> tuple[Row, ...]:
    """Rows with a prefix before the dialect's names, and the hub's prefixes (the first that fits) exchanged."""
    hub = hub or {}

    def renamed(name: str) -> str:
        old = next((prefix for prefix in hub if name.startswith(prefix)), None)
        return name if old is None else hub[old] + name.removeprefix(old)

    return tuple(replace(r, name=prefix + r.name, hub=tuple(map(renamed, r.hubs))) for r in rows)


def as_mtp(rows: Iterable[Row], kinds: Iterable[str], hub: str = "model.layers.{mtp_layer}.") -> tuple[Row, ...]:
    """The rows of a layer of these kinds as those of a multi-token-prediction layer, which lies at `hub` on the hub."""
    layer, theirs, kinds = "decoder.layers.{layer}.", "model.layers.{layer}.", set(kinds)
    return tuple(
        replace(
            row,
            name="mtp.layers.{mtp}.transformer_layer." + row.name.removeprefix(layer),
            hub=tuple(hub + name.removeprefix(theirs) for name in row.hubs),
            on=("mtp", *(tag for tag in row.on if tag not in kinds)),
        )
        for row in rows
        if row.name.startswith(layer) and not (set(row.on) & LAYER_KINDS) - kinds
    )


LAYER_KINDS = frozenset(("full", "linear", "dense", "moe", "mamba", "attention", "mlp"))
"""Tags that tell layers of a model apart."""


def split_parts(row: Row) -> Rows:
    """The fuse of a row's named parts."""
    return Rows(tuple(size for _, size in row.parts))
