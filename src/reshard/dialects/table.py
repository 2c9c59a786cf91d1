"""Tables of a model family: which tensors a model has, under which names, on the hub and in Megatron.

A `Row` is a line of a family file. Bound to a model's `Facts` it becomes one `Entry` for each layer and expert: whole
names on both sides, so what a table does not take is known by name, and so is what is missing.

    row     decoder.layers.{layer}.mlp.linear_fc1.weight  =  GLU(model.layers.{layer}.mlp.{gate,up}_proj.weight)
    entry   decoder.layers.3.mlp.linear_fc1.weight        =  GLU(model.layers.3.mlp.gate_proj.weight, ...)

Megatron's names here are its modules' own: a number for each layer and expert, no prefix. What a release or a format
makes of them (stacked layers, split halves, ...) is in `megatron.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from reshard.dialects.fuse import SAME, Fuse, Rows
from reshard.dialects.setting import Item

Config = Mapping[str, Any]
"""A model's config.json."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a config says about the tensors of a model."""

    sizes: Mapping[str, int]
    """Named sizes for the fuses: `heads`, `groups`, `head_dim`, `hidden`, `vocab`, ..."""
    layers: tuple[frozenset[str], ...]
    """The tags of each layer: `full` or `linear` attention, `dense` or `moe`, ..."""
    tags: frozenset[str] = frozenset()
    """The tags of the model: `tied` or `untied`, `qkv_bias`, `mtp`, ..."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many there are of what the other placeholders number: `expert`, `mtp`, `block`, ..."""

    def without(self, *tags: str) -> Facts:
        """The same model without some of its parts."""
        return replace(self, tags=self.tags - set(tags))

    def sized(self, **sizes: int) -> Facts:
        """The same model with other sizes."""
        return replace(self, sizes={**self.sizes, **sizes})


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of Megatron and the hub's tensors that it is made of.

    `{layer}`, `{expert}`, ... stand for numbers. A placeholder that only Megatron's name has means that the hub packs
    those tensors into one, along a new first dimension.
    """

    name: str
    hub: str | tuple[str, ...]
    fuse: Fuse = SAME
    on: tuple[str, ...] = ()
    """Tags of the layer or the model that must all be there."""
    dtype: str = ""
    """Kept in this dtype in every dialect, such as `F32` for what a router adds to its scores."""
    parts: tuple[tuple[str, str], ...] = ()
    """The named parts (name, size of the rows) into which some formats split Megatron's tensor."""
    variant: bool = False
    """Another name that some release or module spec gives the tensor: read, never written."""

    @property
    def hubs(self) -> tuple[str, ...]:
        return (self.hub,) if isinstance(self.hub, str) else self.hub


@dataclass(frozen=True, slots=True)
class Entry:
    """A row bound to numbers: whole names."""

    row: Row
    name: str
    hub: tuple[str, ...]
    index: int | None = None
    """Where the hub packs: which of the packed tensors this is."""
    count: int = 1
    """Where the hub packs: how many there are."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor of the hub that repeats another one, which Megatron stores once."""

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
    """The other names that Megatron's tensors may have, by name."""
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
    ours, hubs = _placeholders(row.name), _placeholders(*row.hubs)
    packed = [name for name in ours if name not in hubs and not (name == "mtp" and "mtp_layer" in hubs)]
    for at in _numbers(ours, row.on, facts):
        index = at[packed[0]] if packed else None
        count = _count(packed[0], facts) if packed else 1
        yield Entry(row, row.name.format(**at), tuple(h.format(**at) for h in row.hubs), index, count)


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


def _placeholders(*templates: str) -> list[str]:
    return list(dict.fromkeys(name for template in templates for name in _PLACEHOLDER.findall(template)))


# ---------------------------------------------------------------------------------------- rows made of other rows


def under(rows: Iterable[Row], prefix: str = "", hub: Mapping[str, str] | None = None) -> tuple[Row, ...]:
    """Rows with a prefix before Megatron's names, and the hub's prefixes (the first that fits) exchanged."""
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
