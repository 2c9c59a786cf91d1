"""The 40 digits by which torch tells one saved archive from another.

    digits  0..19   hash of the record names, in the order in which a `std::unordered_set` lists them
    digits 20..39   hash of the CRC-32s of the non-empty records, in file order

Nothing reads them back but usage logs; they are reproduced so that an archive written here is the one torch would have
written, byte for byte.

Source: PyTorch 2.1 to 2.13, `caffe2/serialize/inline_container.cc` (`writeSerializationId`), `c10/util/hash.h`; the
order and the string hash are those of GCC's libstdc++ on 64-bit machines (`hashtable_policy.h`, `hash_bytes.cc`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

_MASK = 0xFFFF_FFFF_FFFF_FFFF

_BUCKET_COUNTS = (
    *(1, 13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753),
    *(42043, 85229, 172933, 351061, 712697, 1447153, 2938679, 5967347, 12117689),
)
"""The sizes through which a libstdc++ hash table grows when it is filled one by one."""


def hash_names(names: Iterable[str]) -> int:
    """The first half: record names without the archive's prefix, in the order written."""
    combined = 0
    for name_hash in _listing_order([_hash_bytes(name.encode()) for name in names]):
        combined = _hash_combine(combined, name_hash)
    return combined


def hash_crcs(crcs: Iterable[int]) -> int:
    """The second half: the CRC-32 of each record that is not empty, in the order written."""
    combined = 0
    for crc in crcs:
        combined = _hash_combine(combined, crc)
    return combined


def serialization_id(names_hash: int, crcs_hash: int) -> bytes:
    """The record's 40 bytes."""
    return b"%020d%020d" % (names_hash, crcs_hash)


def _hash_combine(seed: int, value: int) -> int:
    return (seed ^ (value + 0x9E37_79B9 + (seed << 6) + (seed >> 2))) & _MASK


def _hash_bytes(data: bytes) -> int:
    """`std::hash<std::string>`: MurmurHash64A with libstdc++'s seed."""
    multiplier = 0xC6A4_A793_5BD1_E995
    aligned = len(data) & ~7
    result = 0xC70F_6907 ^ (len(data) * multiplier & _MASK)
    for start in range(0, aligned, 8):
        word = int.from_bytes(data[start : start + 8], "little") * multiplier & _MASK
        result = (result ^ (word ^ word >> 47) * multiplier) * multiplier & _MASK
    if aligned < len(data):
        result = (result ^ int.from_bytes(data[aligned:], "little")) * multiplier & _MASK
    result = (result ^ result >> 47) * multiplier & _MASK
    return result ^ result >> 47


def _listing_order(hashes: Sequence[int]) -> list[int]:
    """The hashes in the order in which a `std::unordered_set` filled with them one by one is listed.

    The set is one linked list. A node goes in front of its bucket's nodes, or of the whole list where the bucket is
    empty; growing the table moves every node over, in list order, by the same rule.
    """
    order: list[int] = []
    inserted = 0
    while inserted < len(hashes):
        buckets = _BUCKET_COUNTS[min(bisect_right(_BUCKET_COUNTS, inserted), len(_BUCKET_COUNTS) - 1)]
        room = max(buckets, inserted + 1)
        order = _fill([*order, *hashes[inserted:room]], buckets)
        inserted = room
    return order


def _fill(hashes: Sequence[int], buckets: int) -> list[int]:
    """One table's list after inserting the hashes in turn."""
    head = len(hashes)
    following = [-1] * (head + 1)  # by position in `hashes`; the last slot is the list's head
    before: dict[int, int] = {}  # bucket -> the node in front of its first node
    for node, value in enumerate(hashes):
        bucket = value % buckets
        previous = before.get(bucket, head)
        following[node] = following[previous]
        following[previous] = node
        if bucket not in before:
            before[bucket] = head
            if following[node] >= 0:
                before[hashes[following[node]] % buckets] = node
    order, node = [], following[head]
    while node >= 0:
        order.append(hashes[node])
        node = following[node]
    return order
