"""The entries of a `.distcp` file: hundreds of thousands of torch.save archives, back to back.

    file    entry 0 | entry 1 | ...            no header, no padding, no footer
    entry   head | data/0 | tail               one archive, all offsets relative to its start

Two tensors of one dtype and shape have the same head, byte for byte, and tails that differ in a few places only:

    head    data.pkl, .format_version, .storage_alignment, byteorder, the local header of data/0
    tail    CRC of data/0 | version | serialization id (40 digits), its CRC | directory: both CRCs again | end records

So the first entry of a kind is parsed strictly and kept as a template, and each later one is compared with it: every
byte outside the data must be equal, except that the two copies of the data's CRC must equal each other and the
serialization id must have the CRC that is stated twice. This checks all that the strict parse checks, for a few
microseconds. What fits no template is parsed strictly: damaged entries, and byte items with tensors inside.

Source: PyTorch 2.0 to 2.15, `torch/distributed/checkpoint/filesystem.py` (`_write_item`); archives: see `torch_zip`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from reshard.errors import Incomplete, Unsupported
from reshard.storage.crc import checksum
from reshard.storage.torch_zip import CHECKED_ON_OPEN, STORED, Archive, Read, open_archive

_SMALL_ENTRY_NBYTES = 16 << 10
"""Below this, several entries are read at once; above, only the seams between two of them."""
_READ_AHEAD_NBYTES = 256 << 10
_HEAD_NBYTES = 1024
"""What is read of the next entry along with a tail: most heads have 704 or 768 bytes."""

_MAX_TEMPLATES = 4096
_MAX_TEMPLATE_NBYTES = 64 << 10
_MAX_KEPT_NBYTES = 64 << 20
_MAX_SHAPES = 8
"""Of one entry length; a stock writer produces two at most."""


class Storage(NamedTuple):
    """One storage of an entry."""

    key: str
    """By which the pickle names it."""
    offset: int
    """From the start of the entry."""
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Framing:
    """What entries of one dtype and shape have in common; one object for all of them."""

    payload: bytes
    """The pickle, `data.pkl`. The same object each time, so a cache keyed by it costs next to nothing."""
    byteorder: Literal["little", "big"]
    storages: tuple[Storage, ...]
    """One for a tensor; byte items may hold none or several."""


class Entry(NamedTuple):
    """One archive of a file: the bytes of its storages are at `start + storage.offset`."""

    start: int
    """Its first byte, from the start of the file."""
    framing: Framing
    crc32s: tuple[int | None, ...]
    """Of each of `framing.storages`; None where the writer computed none."""


class EntryReader:
    """Locates entries, remembering the framings it has seen. One serves a whole checkpoint, in one thread."""

    def __init__(self) -> None:
        self._templates: dict[tuple[int, bytes], _Template] = {}  # by entry length and head
        self._shapes: dict[int, tuple[tuple[int, int], ...]] = {}  # entry length -> head lengths and tail positions
        self._kept_nbytes = 0

    def locate(self, read: Read, file_nbytes: int, extents: Iterable[tuple[int, int]], where: str) -> Iterator[Entry]:
        """The entries at `extents`, pairs of offset and length; quickest in the order of the file.

        `read` shows `(offset, nbytes)` of the file, `where` is its name in messages. Every header and every small
        record is checked; the bytes of the storages are not looked at. Raises Corrupt, and Incomplete where an extent
        reaches beyond the file.
        """
        templates, shapes = self._templates, self._shapes
        seen, base, limit = b"", 0, 0  # the bytes read last, and where they are
        for start, nbytes in extents:
            stop = start + nbytes
            if start < 0 or nbytes <= 0 or stop > file_nbytes:
                raise Incomplete(f"reading {where}: bytes {start} to {stop} are wanted, it has {file_nbytes}")
            ahead = _READ_AHEAD_NBYTES if nbytes < _SMALL_ENTRY_NBYTES else _HEAD_NBYTES
            found = None
            for head_nbytes, tail_start in shapes.get(nbytes, ()):
                if start < base or start + head_nbytes > limit:
                    seen, base = read(start, min(max(head_nbytes, ahead), file_nbytes - start)), start
                    limit = base + len(seen)
                template = templates.get((nbytes, seen[start - base : start - base + head_nbytes]))
                if template is None:
                    continue
                tail = start + tail_start
                if tail < base or stop > limit:
                    seen, base = read(tail, min(stop - tail + max(head_nbytes, ahead), file_nbytes - tail)), tail
                    limit = base + len(seen)
                found = template.match(start, seen[tail - base : stop - base])
                break
            yield found or self._parse(read, start, nbytes, where)

    def _parse(self, read: Read, start: int, nbytes: int, where: str) -> Entry:
        """One entry, strictly, the long way."""
        archive = open_archive(lambda offset, count: read(start + offset, count), nbytes, f"{where} at byte {start}")
        storages = archive.storages
        for key, record in storages.items():
            if record.method != STORED:
                raise Unsupported(f"reading {archive.where}: data/{key} is compressed, DCP never writes that")
        framing = Framing(
            archive.payload,
            archive.byteorder,
            tuple(Storage(key, record.offset, record.nbytes) for key, record in storages.items()),
        )
        self._remember(archive, framing, read, start, nbytes)
        return Entry(start, framing, tuple(record.crc32 for record in storages.values()))

    def _remember(self, archive: Archive, framing: Framing, read: Read, start: int, nbytes: int) -> None:
        """Keep a template of the entry, if it is of the kind that repeats."""
        if not archive.is_torch_written or len(framing.storages) != 1:
            return
        ((_, head_nbytes, data_nbytes),) = framing.storages
        tail_start = head_nbytes + data_nbytes
        kept_nbytes = nbytes - data_nbytes
        if len(archive.records) - 1 != sum(name in CHECKED_ON_OPEN for name in archive.records):
            return  # records whose CRC nobody has checked
        known = self._shapes.get(nbytes, ())
        shape = head_nbytes, tail_start
        if kept_nbytes > _MAX_TEMPLATE_NBYTES or (shape not in known and len(known) >= _MAX_SHAPES):
            return
        if len(self._templates) >= _MAX_TEMPLATES or self._kept_nbytes + kept_nbytes > _MAX_KEPT_NBYTES:
            self._templates.clear()
            self._shapes.clear()
            self._kept_nbytes, known = 0, ()
        template = _Template.of(archive, framing, tail_start, read(start + tail_start, nbytes - tail_start))
        if template is not None:
            self._templates[nbytes, read(start, head_nbytes)] = template
            self._shapes[nbytes] = known if shape in known else (*known, shape)
            self._kept_nbytes += kept_nbytes


@dataclass(frozen=True, slots=True)
class _Template:
    """The tail of an entry, in parts: constants, and holes for what differs from entry to entry."""

    framing: Framing
    parts: tuple[bytes, ...]
    crc_offset: int | None
    """Of the CRC of the data, in the tail; None if it has no CRC, or no bytes."""
    crc_parts: tuple[int, ...]
    id_offset: int | None
    """Of the serialization id, in the tail; None if there is none."""
    id_parts: tuple[int, ...]
    id_crc_parts: tuple[int, ...]
    no_crc: tuple[int | None]
    """What is said of the data where `crc_offset` is None."""

    @classmethod
    def of(cls, archive: Archive, framing: Framing, tail_start: int, tail: bytes) -> _Template | None:
        """The template that a checked archive makes; None if what differs does not all lie in its tail."""
        (data,) = archive.storages.values()
        identity = archive.records.get(".data/serialization_id")
        holes: list[tuple[int, int, str]] = []  # offset in the tail, length, what
        if data.crc32 is not None and data.nbytes:
            holes += ((offset - tail_start, 4, "crc") for offset in data.crc_offsets)
        if identity is not None:
            holes.append((identity.offset - tail_start, identity.nbytes, "id"))
            if identity.crc32 is not None:
                holes += ((offset - tail_start, 4, "id_crc") for offset in identity.crc_offsets)
        holes.sort()
        if holes and holes[0][0] < 0:
            return None
        parts: list[bytes] = []
        places: dict[str, list[int]] = {"crc": [], "id": [], "id_crc": []}
        position = 0
        for offset, nbytes, what in holes:
            parts += (tail[position:offset], b"")
            places[what].append(len(parts) - 1)
            position = offset + nbytes
        return cls(
            framing,
            (*parts, tail[position:]),
            next((offset for offset, _, what in holes if what == "crc"), None),
            tuple(places["crc"]),
            next((offset for offset, _, what in holes if what == "id"), None),
            tuple(places["id"]),
            tuple(places["id_crc"]),
            (data.crc32,),
        )

    def match(self, start: int, tail: bytes) -> Entry | None:
        """The entry with this tail, if it is one of ours in every byte."""
        parts = list(self.parts)
        crc32s = self.no_crc
        if self.crc_offset is not None:
            crc = tail[self.crc_offset : self.crc_offset + 4]
            crc32s = (int.from_bytes(crc, "little"),)
            for place in self.crc_parts:
                parts[place] = crc
        if self.id_offset is not None:
            identity = tail[self.id_offset : self.id_offset + 40]
            if not identity.isdigit():
                return None
            identity_crc = checksum(identity).to_bytes(4, "little")
            for place in self.id_parts:
                parts[place] = identity
            for place in self.id_crc_parts:
                parts[place] = identity_crc
        return Entry(start, self.framing, crc32s) if b"".join(parts) == tail else None
