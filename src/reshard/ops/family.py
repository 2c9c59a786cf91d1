"""Which family a model belongs to: by its config, else by the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reshard.dialects.table import Family, copies, entries, variants
from reshard.errors import InputError, Unsupported, listed
from reshard.families import families


def by_config(config: Mapping[str, Any]) -> Family | None:
    """The family that has this model type or architecture."""
    model_type, named = config.get("model_type"), config.get("architectures")
    architectures = set(named) if isinstance(named, list) else set()
    known = families()
    return next((f for f in known if architectures & set(f.architectures)), None) or next(
        (f for f in known if model_type in f.model_types), None
    )


def choose(config: Mapping[str, Any], names: Collection[str], *, on_hub: bool = True) -> tuple[Family, tuple[str, ...]]:
    """The family of a model with these names, the hub's or Megatron's, and a notice when its architecture is unknown.

    An unknown architecture passes when the table of a known family has exactly its names; of several that have, the
    plainest is taken and all are named. Raises Unsupported with the nearest family and the names that are left over.
    """
    family = by_config(config)
    if family is not None:
        return family, ()
    label = ", ".join(map(str, config.get("architectures") or ())) or str(config.get("model_type", "no model_type"))
    found = ((family, _difference(family, config, names, on_hub)) for family in families())
    scores = sorted(found, key=lambda score: (len(score[1]), *_plainness(score[0])))
    nearest, left = scores[0]
    if not left:
        others = [family.name for family, left in scores[1:] if not left]
        said = f"{label} is not a known architecture: its tensors are exactly those of {nearest.name}"
        return nearest, (said + (f"; they are those of {listed(others)} too" if others else ""),)
    if "?" in left:
        raise Unsupported(
            f"{label} is not a known architecture, and config.json does not say the sizes of any that is",
            hint="`reshard families` lists what is known",
        )
    raise Unsupported(
        f"{label} is not a known architecture; the nearest is {nearest.name}, from which {len(left)} names differ: "
        f"{listed(sorted(left))}",
        hint="`reshard families` lists what is known",
    )


def _plainness(family: Family) -> tuple[bool, int, str]:
    """A key that sorts families whose models compute nothing unusual to the front."""
    return "bit for bit" not in family.verified, len(family.settings), family.name


def _difference(family: Family, config: Mapping[str, Any], names: Collection[str], on_hub: bool) -> set[str]:
    try:
        facts = family.facts(config)
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return {*names, "?"}
    table = entries(family, facts)
    if on_hub:
        wanted = {name for entry in table for name in entry.hub}
        return (wanted ^ set(names)) - {copy.name for copy in copies(family, facts)}
    others = {name: (entry.hub, entry.index) for name, entry in variants(family, facts).items()}
    known = {(entry.hub, entry.index): entry.name for entry in table}
    return {entry.name for entry in table} ^ {known.get(others.get(name, ((), None)), name) for name in names}
