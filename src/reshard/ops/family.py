"""Which family a model belongs to: by its config, else by the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reshard.dialects.table import Family, copies, entries
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


def choose(config: Mapping[str, Any], names: Collection[str]) -> tuple[Family, tuple[str, ...]]:
    """The family of a model with these hub names, and a notice when its architecture is not a known one.

    An unknown architecture passes when the table of a known family has exactly its names. Raises Unsupported with the
    nearest family and the names that are left over.
    """
    family = by_config(config)
    if family is not None:
        return family, ()
    label = ", ".join(map(str, config.get("architectures") or ())) or str(config.get("model_type"))
    scores = sorted(
        (_difference(f, config, names) for f in families()), key=lambda score: (len(score[1]), score[0].name)
    )
    nearest, left = scores[0]
    if not left:
        return nearest, (f"{label} is not a known architecture: its tensors are exactly those of {nearest.name}",)
    raise Unsupported(
        f"{label} is not a known architecture; the nearest is {nearest.name}, from which {len(left)} names differ: "
        f"{listed(sorted(left))}",
        hint="`reshard families` lists what is known",
    )


def _difference(family: Family, config: Mapping[str, Any], names: Collection[str]) -> tuple[Family, set[str]]:
    try:
        facts = family.facts(config)
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return family, {*names, "?"}
    wanted = {name for entry in entries(family, facts) for name in entry.hub}
    return family, (wanted ^ set(names)) - {copy.name for copy in copies(family, facts)}
