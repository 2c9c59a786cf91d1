"""Model families: data only, a file each, found by listing this folder.

A module defines `FAMILIES`, a tuple of `reshard.dialects.table.Family`. What several share is in the modules
of `_SHARED`.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from reshard.dialects.table import Family

_SHARED = frozenset(("blocks", "gated_delta_net", "settings", "vision"))
"""Modules of what several families share."""


@cache
def families() -> tuple[Family, ...]:
    """All families, by name."""
    modules = [m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED]
    found = [family for name in modules for family in import_module(f"{__name__}.{name}").FAMILIES]
    return tuple(sorted(found, key=lambda family: family.name))
