"""How much a pickle may ask for, beyond the bytes that it has.

The opcodes are in proportion to the file; what they ask for need not be. A name costs a type, and a call that copies
its arguments may be repeated for two bytes each time.
"""

from __future__ import annotations

import sys
import threading

MAX_NUM_GLOBALS = 10_000
"""Distinct classes and functions per pickle; each is a type of about 1 KiB. Real checkpoints name fewer than 200."""

MAX_NAME_LENGTH = 1_000
"""Characters in a module or a qualified name."""


class Refused(Exception):
    """A pickle asks for something that is not done. It does not say where; who reads the file does."""


class _Budget(threading.local):
    left = sys.maxsize


_budget = _Budget()


def allow(num_copied: int) -> int:
    """Let what follows copy so many elements. Gives how many were left until now, as loads may be nested."""
    before = _budget.left
    _budget.left = num_copied
    return before


def spend(num_copied: int) -> None:
    """Refuse a load that copies more than it was allowed.

    A pickle spends a byte on each element, so one that has more elements copied than it has bytes is a bomb.
    """
    _budget.left -= num_copied
    if _budget.left < 0:
        raise Refused("it copies the same values over and over")
