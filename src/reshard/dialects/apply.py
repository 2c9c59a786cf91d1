"""Take the tensors of a whole model through a family's table: the hub's to Megatron's and back.

Nothing is guessed and nothing is dropped: names that the table does not have, names that are missing, parts of the
wrong shape are one error that lists them all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from reshard.core.compute import alike
from reshard.core.tensor import Tensor, stack, unsqueeze
from reshard.dialects.facts import Facts
from reshard.dialects.fuse import Glu, InterleavedGlu, Padded
from reshard.dialects.table import Entry, Family, copies, entries, variants
from reshard.errors import Corrupt, Incomplete, Mismatch, listed

GATED = (Glu, InterleavedGlu)
"""Fuses of a gate and an up projection, which are as long as the down projection is wide."""


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor of Megatron with the entry that it came by."""

    entry: Entry
    tensor: Tensor


def to_megatron(hub: Mapping[str, Tensor], family: Family, facts: Facts) -> dict[str, Named]:
    """Megatron's tensors by name. Raises Mismatch for names that the table lacks, Incomplete for those missing."""
    table = entries(family, facts)
    known = {name for entry in table for name in entry.hub} | {c.name for c in copies(family, facts)}
    _check_names("the model", hub, known, {name for entry in table for name in entry.hub}, family)
    return {entry.name: Named(entry, _joined(entry, hub, facts)) for entry in table}


def to_hub(megatron: Mapping[str, Tensor], family: Family, facts: Facts, *, strict: bool = True) -> dict[str, Tensor]:
    """The hub's tensors by name, in the table's order.

    Megatron's names may be the table's or one of its variants. Raises Mismatch for names that the table lacks,
    Incomplete (unless not `strict`) for those missing.
    """
    table, others = {entry.name: entry for entry in entries(family, facts)}, variants(family, facts)
    found = {name: entry for name in megatron if (entry := table.get(name) or others.get(name))}
    unknown = [name for name in megatron if name not in found]
    if unknown:
        raise Mismatch(
            f"{len(unknown)} tensors are not those of a {family.name} model: {listed(unknown)}",
            hint="is this the right --hf-model? `reshard families` lists what is known",
        )
    have = {hub for entry in found.values() for hub in entry.hub}
    missing = [entry.name for entry in table.values() if not set(entry.hub) <= have]
    if missing and strict:
        raise Incomplete(
            f"{len(missing)} tensors of the {family.name} model are missing: {listed(missing)}",
            hint="is every shard there, and is this the right --hf-model? --not-strict writes what there is",
        )
    check_gates(megatron, (name for name, entry in found.items() if isinstance(entry.row.fuse, GATED)))
    return _split_all(megatron, found, facts)


def check_gates(megatron: Mapping[str, Tensor], gated: Iterable[str]) -> None:
    """Raise Corrupt where a release of Megatron-LM kept the rows of one tensor-parallel rank only.

    `gated` are the names of tensors that hold a gate and an up projection.
    """
    for name in gated:
        down = megatron.get(name.replace("linear_fc1", "linear_fc2"))
        if ".linear_fc1.weight" not in name or down is None:
            continue
        rows, columns = megatron[name].shape[0], down.shape[-1]
        if rows != 2 * columns:
            raise Corrupt(
                f"{name}: gate and up have {rows // 2} rows each, where {name.replace('linear_fc1', 'linear_fc2')} has "
                f"{columns} columns: they are not whole",
                hint="Megatron-LM of April and May 2026 kept one tensor-parallel rank's rows of them when it saved "
                "fsdp_dtensor with TP > 1: the rest is in no file. Save again with a later Megatron-LM, or with TP = 1",
            )


def _split_all(megatron: Mapping[str, Tensor], found: Mapping[str, Entry], facts: Facts) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    packs: dict[str, dict[int, Tensor]] = {}
    for name, entry in found.items():
        parts = _split(entry, megatron[name], facts, name)
        for hub, part in zip(entry.hub, parts, strict=True):
            if entry.index is not None:
                packs.setdefault(hub, {})[entry.index] = part
                if len(packs[hub]) == entry.count:
                    result[hub] = stack([packs[hub][i] for i in range(entry.count)])
            elif hub in result:
                raise Mismatch(f"{name}: {hub} is there already, under another of Megatron's names")
            else:
                result[hub] = part
    counts = {hub: entry.count for entry in found.values() for hub in entry.hub}
    short = [f"{hub} (has {len(parts)} of {counts[hub]})" for hub, parts in packs.items() if hub not in result]
    if short:
        raise Incomplete(
            f"experts are missing of {listed(short)}: one tensor holds all of a layer, of which no part is left out",
            hint="is every shard there? --not-strict leaves out whole tensors only",
        )
    return result


def _joined(entry: Entry, hub: Mapping[str, Tensor], facts: Facts) -> Tensor:
    parts = [hub[name] for name in entry.hub]
    if entry.index is not None:
        if any(len(part.shape) < 2 or part.shape[0] != entry.count for part in parts):
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise Mismatch(f"{entry.hub[0]}: shape {shapes}, {entry.count} in the first dimension expected")
        parts = [part[entry.index] for part in parts]
    return entry.row.join(alike(parts), facts.sizes, listed(entry.hub, 4))


def _split(entry: Entry, tensor: Tensor, facts: Facts, name: str) -> tuple[Tensor, ...]:
    parts = entry.row.split(tensor if tensor.shape else unsqueeze(tensor, 0), facts.sizes, name)
    if len(parts) != len(entry.hub):
        raise Mismatch(f"{name}: {len(parts)} tensors of the hub in it, {len(entry.hub)} expected by the config")
    return parts


def _check_names(what: str, found: Iterable[str], known: set[str], wanted: set[str], family: Family) -> None:
    have = set(found)
    unknown, missing = sorted(have - known), sorted(wanted - have)
    if unknown:
        also = f"; and {len(missing)} are missing: {listed(missing)}" if missing else ""
        raise Mismatch(
            f"{what} has {len(unknown)} tensors that a {family.name} model has not: {listed(unknown)}{also}",
            hint="`reshard families` lists what is known",
        )
    if missing:
        raise Incomplete(
            f"{len(missing)} tensors of the {family.name} model are missing: {listed(missing)}",
            hint="is every shard file there, and does config.json belong to these weights?",
        )


def canonical(megatron: Mapping[str, Tensor], family: Family, facts: Facts) -> dict[str, Named]:
    """Tensors under the table's own names, whatever variants they came by: Megatron to Megatron, nothing computed.

    Raises as `to_hub` does.
    """
    table = {entry.name: entry for entry in entries(family, facts)}
    check_gates(megatron, (name for name in megatron if name in table and isinstance(table[name].row.fuse, GATED)))
    if set(megatron) == set(table):
        return {name: Named(entry, _refitted(entry, megatron[name], facts)) for name, entry in table.items()}
    others = variants(family, facts)
    by_hub = {(*entry.hub, str(entry.index)): entry for entry in table.values()}
    direct: dict[str, Named] = {}
    for name, tensor in megatron.items():
        entry = table.get(name) or by_hub.get(_hub_key(others.get(name)))
        if entry is not None and entry.name not in direct:
            direct[entry.name] = Named(entry, _refitted(entry, tensor, facts))
    lacking = {name: entry for name, entry in table.items() if name not in direct}
    hub = to_hub(megatron, family, facts) if lacking or len(direct) < len(megatron) else {}
    return direct | {name: Named(entry, _joined(entry, hub, facts)) for name, entry in lacking.items()}


def _hub_key(entry: Entry | None) -> tuple[str, ...]:
    return () if entry is None else (*entry.hub, str(entry.index))


def _refitted(entry: Entry, tensor: Tensor, facts: Facts) -> Tensor:
    """The tensor with the padding that the facts ask for."""
    if not isinstance(entry.row.fuse, Padded):
        return tensor
    return entry.row.fuse.join(_split(entry, tensor, facts, entry.name), facts.sizes)


def present(names: Collection[str], family: Family, facts: Facts, *, on_hub: bool) -> tuple[Facts, list[str]]:
    """The facts without the optional parts (MTP, vision) that a checkpoint has nothing of, and those parts."""
    absent = []
    for part in sorted(facts.tags & set(OPTIONAL)):
        theirs = replace(family, rows=tuple(row for row in family.rows if part in row.on))
        known = [name for entry in entries(theirs, facts) for name in (entry.hub if on_hub else (entry.name,))]
        if known and not any(name in names for name in known):
            absent.append(part)
    return facts.without(*absent), absent


OPTIONAL = ("mtp", "vision")
"""Tags of parts that a checkpoint of a model may leave out altogether."""
