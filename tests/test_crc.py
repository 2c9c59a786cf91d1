"""CRC-32 by parts, held against zlib."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.storage import crc


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_two_parts_make_the_crc_of_the_whole(a: bytes, b: bytes) -> None:
    assert crc.combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@given(st.lists(st.binary(max_size=80), max_size=8))
def test_any_number_of_parts_makes_the_crc_of_the_whole(parts: Iterable[bytes]) -> None:
    parts = list(parts)
    joined = reduce(lambda whole, part: crc.combine(whole, zlib.crc32(part), len(part)), parts, 0)
    assert joined == zlib.crc32(b"".join(parts))


@pytest.mark.parametrize("nbytes", [1, 255, 256, 257, 65_535, 65_536, 1 << 20, (1 << 20) + 12_345])
def test_long_parts_are_joined_exactly(nbytes: int) -> None:
    b = bytes(nbytes - 1) + b"\x07"
    assert crc.combine(zlib.crc32(b"left"), zlib.crc32(b), nbytes) == zlib.crc32(b"left" + b)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**45), st.integers(0, 2**45))
def test_lengths_beyond_memory_add_up(start: int, n: int, m: int) -> None:
    assert crc.combine(crc.combine(start, 0, n), 0, m) == crc.combine(start, 0, n + m)


def test_an_empty_part_changes_nothing() -> None:
    assert crc.combine(0x1234_5678, 0, 0) == 0x1234_5678


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        crc.combine(0, 0, -1)
