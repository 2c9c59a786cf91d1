"""The zip archives that torch.save writes: one is a whole `.pt` file, or one entry of a `.distcp` file.

Records follow each other without gaps; offsets count from the start of the archive. Names carry the archive's prefix,
`archive/` for streams and the stem of the file name otherwise.

    record          data.pkl, .format_version, .storage_alignment, byteorder, data/0, data/1, ..., version,
                    .data/serialization_id; older releases write fewer of them
    ├─ local header     30 B    50 4b 03 04, version needed 0 (20 if deflated), flags 0x0800 (UTF-8) + 0x0008 (a
    │                           descriptor follows), method, time 0, date 0, CRC 0, sizes 0, name and extra lengths
    ├─ name                     prefix/record
    ├─ zip64 extra              01 00, u16 length, [u64 size, u64 0] if size >= 2^32-1, [u64 offset] if offset >= 2^32-1
    ├─ padding                  46 42 ("FB"), u16 n, n x 5a ("Z"): the data starts at a multiple of 64
    ├─ data
    └─ descriptor       16 B    50 4b 07 08, u32 CRC, u32 stored size, u32 size; 24 B with u64 sizes if there is a zip64
                                extra; nothing at all if the record is empty
    central directory
    └─ per record       46 B    50 4b 01 02, version made by 0, ..., the true CRC and sizes, offset of the local header;
                                then name and zip64 extra: [u64 size, u64 stored size], [u64 offset] as above
    zip64 end record    56 B    50 4b 06 06, always; made by 0x031e, needs 45
    zip64 locator       20 B    50 4b 06 07, always
    end record          22 B    50 4b 05 06, no comment

Everything but the CRCs follows from the names, the sizes and the alignment. So the reader checks such an archive by
writing its headers again and comparing bytes, and the writer lays out a file before one byte of it was read. All CRCs
are 0 where the user turned them off (`torch.serialization.set_crc32_options(False)`, PyTorch >= 2.5).

Archives that were unpacked and packed again by Python's `zipfile` or Info-ZIP, deflated or not, are read too; of their
headers, what is stated twice must agree.

Source: PyTorch 2.0 to 2.15, `caffe2/serialize/inline_container.cc`, and its copy of miniz; `torch/serialization.py`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeAlias

from reshard.errors import Corrupt, Incomplete, Unsupported
from reshard.storage.crc import checksum
from reshard.storage.serialization_id import hash_crcs, hash_names, serialization_id

Read: TypeAlias = Callable[[int, int], bytes]
"""Shows `(offset, nbytes)` of an archive."""

STORED, DEFLATED = 0, 8

SMALL_NBYTES = 256 << 20
"""The most that is ever held of one record or of the central directory."""

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_ALL_ENDS_NBYTES = _END64.size + _LOCATOR.size + _END.size

_MAX16, _MAX32 = 0xFFFF, 0xFFFF_FFFF
_HAS_DESCRIPTOR, _IS_UTF8, _IS_ENCRYPTED = 0x0008, 0x0800, 0x0001
_ZIP64_EXTRA = 1

CHECKED_ON_OPEN = (
    "data.pkl",
    "version",
    "byteorder",
    ".format_version",
    ".storage_alignment",
    ".data/serialization_id",
)
"""The records that `open_archive` reads and checks against their CRC."""

_WINDOW_NBYTES = 4096
_WHOLE_NBYTES = 256 << 10


# ---------------------------------------------------------------------------------------------------------- headers


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the central directory says of one record."""

    name: bytes
    """With the prefix."""
    method: int
    crc32: int
    nbytes: int
    stored_nbytes: int
    offset: int
    """Of the local header."""

    @property
    def flags(self) -> int:
        return _IS_UTF8 | (_HAS_DESCRIPTOR if self.nbytes else 0)

    @property
    def version_needed(self) -> int:
        return 20 if self.method == DEFLATED else 0

    @property
    def is_wide(self) -> bool:
        return self.nbytes >= _MAX32 or self.offset >= _MAX32

    def zip64_extra(self, stored_nbytes: int) -> bytes:
        sizes = (self.nbytes, stored_nbytes) if self.nbytes >= _MAX32 else ()
        offsets = (self.offset,) if self.offset >= _MAX32 else ()
        values = (*sizes, *offsets)
        return struct.pack(f"<2H{len(values)}Q", _ZIP64_EXTRA, 8 * len(values), *values) if values else b""


def _padding_nbytes(entry: _Entry, alignment: int) -> int:
    """How many Z bring the data of a record to a multiple of `alignment`."""
    return -(entry.offset + _LOCAL.size + len(entry.name) + len(entry.zip64_extra(0)) + 4) % alignment


def _local_header(entry: _Entry, padding_nbytes: int) -> bytes:
    """All that stands before the data. The stored size is not known yet when torch writes it, and is 0 throughout."""
    extra = entry.zip64_extra(0) + struct.pack("<2sH", b"FB", padding_nbytes) + b"Z" * padding_nbytes
    fixed = (b"PK\3\4", entry.version_needed, entry.flags, entry.method, 0, 0, 0, 0, 0, len(entry.name), len(extra))
    return _LOCAL.pack(*fixed) + entry.name + extra


def _descriptor(entry: _Entry) -> bytes:
    """All that stands after the data."""
    if not entry.nbytes:
        return b""
    layout = "<4sI2Q" if entry.is_wide else "<4s3I"
    return struct.pack(layout, b"PK\7\10", entry.crc32, entry.stored_nbytes, entry.nbytes)


def _central_header(entry: _Entry) -> bytes:
    extra = entry.zip64_extra(entry.stored_nbytes)
    sizes = min(entry.stored_nbytes, _MAX32), min(entry.nbytes, _MAX32)
    kind = (b"PK\1\2", 0, entry.version_needed, entry.flags, entry.method, 0, 0)
    lengths = len(entry.name), len(extra), 0
    return _CENTRAL.pack(*kind, entry.crc32, *sizes, *lengths, 0, 0, 0, min(entry.offset, _MAX32)) + entry.name + extra


def _end_records(num_records: int, directory_offset: int, directory_nbytes: int) -> bytes:
    end_offset = directory_offset + directory_nbytes
    few, where = min(num_records, _MAX16), (min(directory_nbytes, _MAX32), min(directory_offset, _MAX32))
    return (
        _END64.pack(b"PK\6\6", 44, 0x031E, 45, 0, 0, num_records, num_records, directory_nbytes, directory_offset)
        + _LOCATOR.pack(b"PK\6\7", 0, end_offset, 1)
        + _END.pack(b"PK\5\6", 0, 0, few, few, *where, 0)
    )


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Record:
    """One file of an archive."""

    name: str
    """Without the archive's prefix."""
    offset: int
    """Where its bytes start, from the start of the archive."""
    nbytes: int
    """Its size, uncompressed."""
    stored_nbytes: int
    """Its size in the archive."""
    method: int
    """STORED or DEFLATED."""
    crc32: int | None
    """Of the uncompressed bytes; None where the writer computed none."""
    crc_offsets: tuple[int, ...]
    """Where the archive keeps the CRC: in the descriptor, if there is one, or the local header; in the directory."""


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of an archive whose every header was checked; the large ones still have to prove their CRC."""

    where: str
    """How messages name it."""
    prefix: str
    """The folder that all names begin with, "archive" for streams."""
    records: Mapping[str, Record]
    """By name without prefix, in file order."""
    is_torch_written: bool
    """False for one that another program packed again."""
    _read: Read = field(repr=False)
    _checked: dict[str, bytes] = field(repr=False)

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """Of the numbers in the storages. Releases before 2.1 do not state it and ran on little-endian machines."""
        return "big" if self._checked.get("byteorder") == b"big" else "little"

    @property
    def payload(self) -> bytes:
        """The pickle of the saved object, `data.pkl`."""
        return self._checked["data.pkl"]

    @property
    def storages(self) -> dict[str, Record]:
        """The records `data/<key>` by the key that the pickle names them by."""
        return {name.removeprefix("data/"): record for name, record in self.records.items() if name[:5] == "data/"}

    def read_small(self, name: str) -> bytes:
        """The uncompressed bytes of one record, checked against its CRC.

        Raises Corrupt where they do not match, Unsupported where there are more than SMALL_NBYTES of them.
        """
        if name not in self._checked:
            return _read_record(self._read, self.records[name], self.where)
        return self._checked[name]


def open_archive(read: Read, nbytes: int, where: str) -> Archive:
    """The archive that fills `nbytes` bytes; `where` names it in messages.

    Reads and checks every header, and the small records that every archive has. Raises Corrupt for whatever
    contradicts itself, Incomplete where `read` runs dry, Unsupported for zip files that torch.save does not write.
    """
    window = _Window(read, nbytes, where)
    ends = _parse_ends(window)
    directory = window.show(ends.directory_offset, ends.directory_nbytes)
    prefix, records = _records(window, ends, directory)
    checked = {name: _read_record(window.show, records[name], where) for name in CHECKED_ON_OPEN if name in records}
    _check_contents(checked, where)
    return Archive(where, prefix, records, ends.is_torch_written, read, checked)


def _corrupt(where: str, problem: str) -> Corrupt:
    return Corrupt(
        f"reading the torch archive {where}: {problem}",
        hint="The file was damaged or cut short after it was written. Copy it again, or use another checkpoint.",
    )


def _unsupported(where: str, problem: str) -> Unsupported:
    return Unsupported(f"reading the torch archive {where}: {problem}")


class _Window:
    """Shows bytes of an archive, never beyond its end, and reads ahead a little: headers follow each other."""

    def __init__(self, read: Read, nbytes: int, where: str) -> None:
        self.nbytes, self.where = nbytes, where
        self._read = read
        self._start, self._bytes = 0, b""
        self._ahead_nbytes = _WHOLE_NBYTES if nbytes <= _WHOLE_NBYTES else _WINDOW_NBYTES

    def show(self, offset: int, count: int) -> bytes:
        if offset < 0 or offset + count > self.nbytes:
            raise _corrupt(self.where, f"bytes {offset} to {offset + count} are claimed, it has {self.nbytes}")
        if offset < self._start or offset + count > self._start + len(self._bytes):
            # small archives are read as a whole, once
            start = 0 if self.nbytes <= _WHOLE_NBYTES else offset
            wanted = min(max(count, self._ahead_nbytes), self.nbytes - start)
            self._start, self._bytes = start, self._read(start, wanted)
            if len(self._bytes) != wanted:
                raise Incomplete(
                    f"reading the torch archive {self.where}: "
                    f"{wanted} bytes expected at byte {start}, found {len(self._bytes)}"
                )
        at = offset - self._start
        return self._bytes[at : at + count]


@dataclass(frozen=True, slots=True)
class _Ends:
    """What the records at the end of an archive say of it."""

    num_records: int
    directory_offset: int
    directory_nbytes: int
    is_torch_written: bool


def _parse_ends(window: _Window) -> _Ends:
    """Where the directory is, by the end records, which must be the last bytes of the archive."""
    where, nbytes = window.where, window.nbytes
    if nbytes < _END.size:
        raise _corrupt(where, f"{nbytes} bytes are no archive, the end record alone has {_END.size}")
    end_offset = nbytes - _END.size
    signature, *disks, count, total, directory_nbytes, directory_offset, comment_nbytes = _END.unpack(
        window.show(end_offset, _END.size)
    )
    if signature != b"PK\5\6" or disks != [0, 0] or count != total or comment_nbytes:
        raise _corrupt(where, "its last 22 bytes are no end record: it was cut short, or something was appended")
    said = count, directory_nbytes, directory_offset
    wide = _parse_zip64_ends(window, said)
    if wide:
        end_offset = nbytes - _ALL_ENDS_NBYTES
    count, directory_nbytes, directory_offset = wide or said
    if directory_offset + directory_nbytes != end_offset or directory_nbytes < count * _CENTRAL.size:
        claim = f"{count} records in bytes {directory_offset} to {directory_offset + directory_nbytes}"
        raise _corrupt(where, f"its directory is said to list {claim}, and has to end at byte {end_offset}")
    if directory_nbytes > SMALL_NBYTES:
        raise _unsupported(where, f"its directory has {directory_nbytes} bytes, more than {SMALL_NBYTES} are not read")
    torch_ends = _end_records(count, directory_offset, directory_nbytes)
    is_torch_written = window.show(end_offset, nbytes - end_offset) == torch_ends
    return _Ends(count, directory_offset, directory_nbytes, is_torch_written)


def _parse_zip64_ends(window: _Window, said: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """The number of records, the directory's size and its offset; None if there are no zip64 end records.

    `said` are the same three by the plain end record, each true or too large for it.
    """
    end_offset = window.nbytes - _ALL_ENDS_NBYTES
    if end_offset < 0:
        return None
    locator = window.show(window.nbytes - _END.size - _LOCATOR.size, _LOCATOR.size)
    if not locator.startswith(b"PK\6\7"):
        return None
    end64 = _END64.unpack(window.show(end_offset, _END64.size))
    signature, size, _, _, disk, directory_disk, count, total, directory_nbytes, directory_offset = end64
    true = count, directory_nbytes, directory_offset
    fits = [narrow in (wide, limit) for narrow, wide, limit in zip(said, true, (_MAX16, _MAX32, _MAX32), strict=True)]
    regular = signature == b"PK\6\6" and size == 44 and not disk and not directory_disk and count == total
    if not regular or not all(fits) or locator != _LOCATOR.pack(b"PK\6\7", 0, end_offset, 1):
        raise _corrupt(window.where, "its end records contradict each other")
    return true


def _records(window: _Window, ends: _Ends, directory: bytes) -> tuple[str, dict[str, Record]]:
    """The prefix, and the records by name without it, once they tile the archive and their headers agree."""
    where = window.where
    listed = sorted(_parse_directory(directory, ends, where), key=lambda item: item[1].offset)
    prefix = listed[0][1].name.partition(b"/")[0] + b"/" if listed else b""
    has_crcs = any(entry.crc32 for _, entry, _ in listed)
    parse = _parse_torch_record if ends.is_torch_written else _parse_any_record
    records: dict[str, Record] = {}
    is_foreign = False
    starts = [entry.offset for _, entry, _ in listed] + [ends.directory_offset]
    if starts[0] != 0:
        raise _corrupt(where, f"its first record starts at byte {starts[0]}")
    for (position, entry, central), stop in zip(listed, starts[1:], strict=True):
        offset, crc_offsets = parse(window, entry, central, stop)
        if entry.name.endswith(b"/") and not entry.nbytes:
            continue  # Info-ZIP lists folders
        is_foreign |= not entry.name.startswith(prefix)
        name = entry.name.removeprefix(prefix).decode("utf-8", "surrogateescape")
        if name in records:
            raise _corrupt(where, f"two records are named {name}")
        crc_offsets = (*crc_offsets, ends.directory_offset + position + 16)
        crc32 = entry.crc32 if has_crcs or not entry.nbytes else None
        records[name] = Record(name, offset, entry.nbytes, entry.stored_nbytes, entry.method, crc32, crc_offsets)
    if is_foreign or "data.pkl" not in records:
        raise _unsupported(where, "the zip file was not written by torch.save: it has no <prefix>/data.pkl")
    for name, record in records.items():
        if record.method not in (STORED, DEFLATED):
            raise _unsupported(where, f"{name} is packed by zip method {record.method}")
    return prefix[:-1].decode("utf-8", "surrogateescape"), records


def _named(entry: _Entry) -> str:
    return entry.name.decode("utf-8", "backslashreplace")


_Listed: TypeAlias = tuple[int, _Entry, tuple[int, ...]]
"""A record's position in the directory, what is said there of it, and its fixed fields as they stand."""


def _parse_directory(directory: bytes, ends: _Ends, where: str) -> list[_Listed]:
    listed: list[_Listed] = []
    position = 0
    for index in range(ends.num_records):
        start = position
        entry, central, position = _parse_central(directory, start, f"{where}: directory record {index}")
        if ends.is_torch_written and directory[start:position] != _central_header(entry):
            raise _corrupt(where, f"its directory is damaged at {_named(entry)}")
        if not ends.is_torch_written and central[1] & 0xFF < 10:
            # made by: torch leaves 0, packers the version of the zip specification, from 1.0 = 10 up
            raise _corrupt(where, "its end records are not those that torch writes")
        if entry.crc32 and not entry.nbytes:
            raise _corrupt(where, f"{_named(entry)} is empty and has the CRC-32 {entry.crc32:08x}")
        if entry.method == STORED and entry.nbytes != entry.stored_nbytes:
            raise _corrupt(where, f"{_named(entry)} is stored as it is, its two sizes differ")
        listed.append((start, entry, central))
    if position != len(directory):
        raise _corrupt(where, f"its directory lists {ends.num_records} records and has bytes left over")
    return listed


def _parse_central(directory: bytes, start: int, where: str) -> tuple[_Entry, tuple[int, ...], int]:
    """One record of the directory, its fixed fields as they stand, and where the next one starts."""
    name_start = start + _CENTRAL.size
    if name_start > len(directory):
        raise _corrupt(where, "the directory ends before it")
    central = _CENTRAL.unpack_from(directory, start)
    signature, _, _, _, method, _, _, crc32, stored_nbytes, nbytes, *lengths, disk, _, _, offset = central
    name_nbytes, extra_nbytes, comment_nbytes = lengths
    name_stop = name_start + name_nbytes
    stop = name_stop + extra_nbytes
    if signature != b"PK\1\2" or disk or comment_nbytes or stop > len(directory):
        raise _corrupt(where, "it is damaged")
    extra = _parse_extra(directory[name_stop:stop], where)
    nbytes, stored_nbytes, offset = _widen((nbytes, stored_nbytes, offset), extra)
    return _Entry(directory[name_start:name_stop], method, crc32, nbytes, stored_nbytes, offset), central, stop


def _parse_torch_record(
    window: _Window, entry: _Entry, central: tuple[int, ...], stop: int
) -> tuple[int, tuple[int, ...]]:
    """Where the data starts, and the CRC in the descriptor; all else up to `stop` must be what torch writes."""
    fixed = window.show(entry.offset, _LOCAL.size)
    name_nbytes, extra_nbytes = struct.unpack_from("<2H", fixed, 26)
    padding_nbytes = extra_nbytes - len(entry.zip64_extra(0)) - 4
    header = window.show(entry.offset, _LOCAL.size + name_nbytes + extra_nbytes)
    if padding_nbytes < 0 or header != _local_header(entry, padding_nbytes):
        raise _corrupt(
            window.where, f"the header of {_named(entry)} at byte {entry.offset} disagrees with the directory"
        )
    data_offset = entry.offset + len(header)
    data_stop = data_offset + entry.stored_nbytes
    descriptor = _descriptor(entry)
    if data_stop + len(descriptor) != stop or window.show(data_stop, len(descriptor)) != descriptor:
        raise _corrupt(window.where, f"{_named(entry)} does not end at byte {stop} as the directory says")
    return data_offset, (data_stop + 4,) if descriptor else ()


def _parse_any_record(
    window: _Window, entry: _Entry, central: tuple[int, ...], stop: int
) -> tuple[int, tuple[int, ...]]:
    """Where the data starts, and the second copy of the CRC, of a record that any packer may have written."""
    where = window.where
    disagrees = _corrupt(where, f"the header of {_named(entry)} at byte {entry.offset} disagrees with the directory")
    local = _LOCAL.unpack(window.show(entry.offset, _LOCAL.size))
    signature, needed, *same, crc32, stored_nbytes, nbytes, name_nbytes, extra_nbytes = local
    flags = local[2]
    body = window.show(entry.offset + _LOCAL.size, name_nbytes + extra_nbytes)
    if signature != b"PK\3\4" or needed > central[2] or tuple(same) != central[3:7] or body[:name_nbytes] != entry.name:
        raise disagrees
    if flags & _IS_ENCRYPTED:
        raise _unsupported(where, f"{_named(entry)} is encrypted")
    extra = _parse_extra(body[name_nbytes:], f"{where}: {_named(entry)}")
    data_offset = entry.offset + _LOCAL.size + len(body)
    data_stop = data_offset + entry.stored_nbytes
    truth = entry.crc32, entry.stored_nbytes, entry.nbytes
    said = crc32, *reversed(_widen((nbytes, stored_nbytes), extra))
    if not flags & _HAS_DESCRIPTOR:
        if said != truth or data_stop != stop:
            raise disagrees
        return data_offset, (entry.offset + 14,)
    layout = {16: "<4s3I", 24: "<4sI2Q"}.get(stop - data_stop)
    if layout is None or any(value not in (0, true) for value, true in zip(said, truth, strict=True)):
        raise disagrees  # what was not known yet is 0; Info-ZIP knows the size, `zipfile` nothing
    if struct.unpack(layout, window.show(data_stop, stop - data_stop)) != (b"PK\7\10", *truth):
        raise disagrees
    return data_offset, (data_stop + 4,)


def _parse_extra(extra: bytes, where: str) -> dict[int, bytes]:
    """The extra fields of a header by their number."""
    fields: dict[int, bytes] = {}
    position = 0
    while position < len(extra):
        if position + 4 > len(extra):
            raise _corrupt(where, "its extra fields are damaged")
        number, nbytes = struct.unpack_from("<2H", extra, position)
        position += 4 + nbytes
        if position > len(extra) or number in fields:
            raise _corrupt(where, "its extra fields are damaged")
        fields[number] = extra[position - nbytes : position]
    return fields


def _widen(values: tuple[int, ...], extra: dict[int, bytes]) -> tuple[int, ...]:
    """The values, those that did not fit into 32 bits taken from the zip64 extra field."""
    wide = extra.get(_ZIP64_EXTRA, b"")
    widened, position = [], 0
    for value in values:
        if value == _MAX32 and position + 8 <= len(wide):
            value = int.from_bytes(wide[position : position + 8], "little")
            position += 8
        widened.append(value)
    return tuple(widened)


def _read_record(read: Read, record: Record, where: str) -> bytes:
    """One whole record, uncompressed and checked."""
    if max(record.nbytes, record.stored_nbytes) > SMALL_NBYTES:
        raise _unsupported(
            where, f"{record.name} has {record.nbytes} bytes, more than {SMALL_NBYTES} are not read whole"
        )
    data = read(record.offset, record.stored_nbytes)
    if record.method == DEFLATED:
        data = _inflate(data, record, where)
    if len(data) != record.nbytes:
        raise Incomplete(f"reading {record.name} of {where}: {record.nbytes} bytes expected, found {len(data)}")
    if record.crc32 is not None and checksum(data) != record.crc32:
        raise _corrupt(
            where, f"{record.name} has the CRC-32 {checksum(data):08x}, it was written with {record.crc32:08x}"
        )
    return data


def _inflate(data: bytes, record: Record, where: str) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, record.nbytes + 1)
    except zlib.error as error:
        raise _corrupt(where, f"{record.name} cannot be inflated: {error}") from error
    if len(inflated) != record.nbytes or not inflater.eof or inflater.unused_data:
        raise _corrupt(where, f"{record.name} does not inflate to the {record.nbytes} bytes that it should have")
    return inflated


def _check_contents(checked: Mapping[str, bytes], where: str) -> None:
    """The few records with a fixed vocabulary keep to it; the only check they have where CRCs are off."""
    for name in ("version", ".format_version", ".storage_alignment", ".data/serialization_id"):
        content = checked.get(name, b"0")
        if len(content) > 64 or not content.strip().isdigit():
            raise _corrupt(where, f"{name} should be a number, it is {content[:64]!r}")
    if checked.get("byteorder", b"little") not in (b"little", b"big"):
        raise _corrupt(where, f"byteorder should be little or big, it is {checked['byteorder'][:64]!r}")


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class Constant:
    """Bytes known from the start."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the bytes of one storage go."""

    index: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Seal:
    """Bytes of known length that depend on the CRC-32s of storages."""

    nbytes: int
    storages: tuple[int, ...]
    """The indices of the storages whose CRC-32s `fill` takes, in this order."""
    fill: Callable[[Sequence[int]], bytes]


Piece: TypeAlias = Constant | Slot | Seal


def archive_prefix(path: str) -> str:
    """The prefix that torch.save gives to an archive at this path: the file's stem, or "archive".

    torch opens paths that are not ASCII itself and writes to them as to any stream.
    """
    name = path.replace("\\", "/").rpartition("/")[2]
    stem = name.rpartition(".")[0] if "." in name else name
    return stem if path.isascii() and stem else "archive"


def lay_out(prefix: str, payload: bytes, storages_nbytes: Sequence[int], *, alignment: int = 64) -> list[Piece]:
    """The archive that torch.save (PyTorch 2.7 to 2.13) writes for a pickle and its storages data/0, data/1, ...

    The pieces tile the file from byte 0, in file order. Storages are little-endian; empty ones get no Slot.
    """
    head = {
        "data.pkl": payload,
        ".format_version": b"1",
        ".storage_alignment": str(alignment).encode(),
        "byteorder": b"little",
    }
    contents: list[bytes | None] = [*head.values(), *(None for _ in storages_nbytes), b"3\n"]
    names = [*head, *(f"data/{index}" for index in range(len(storages_nbytes))), "version"]
    sizes = [*map(len, head.values()), *storages_nbytes, 2]
    entries = _place(prefix, [*names, ".data/serialization_id"], [*sizes, 40], alignment)

    pieces: list[Piece] = []
    filled: list[int] = []  # positions of the storages that are not empty
    text = bytearray()  # since the last of them, without its descriptor
    for position, content in enumerate(contents):
        entry = entries[position]
        text += _local_header(entry, _padding_nbytes(entry, alignment))
        if content is not None:
            entries[position] = entry = replace(entry, crc32=checksum(content))
            text += content + _descriptor(entry)
        elif entry.nbytes:
            pieces.append(_between(entries, filled, len(head), bytes(text)))
            pieces.append(Slot(position - len(head), entry.nbytes))
            filled.append(position)
            text.clear()
    header = _local_header(entries[-1], _padding_nbytes(entries[-1], alignment))
    data_offset = entries[-1].offset + len(header)
    ending = partial(_ending, tuple(entries), tuple(filled), bytes(text + header), data_offset, hash_names(names))
    ending_text = ending([0] * len(filled))
    storages = tuple(position - len(head) for position in filled)
    pieces.append(Seal(len(ending_text), storages, ending) if filled else Constant(ending_text))
    return pieces


def _place(prefix: str, names: Sequence[str], sizes: Sequence[int], alignment: int) -> list[_Entry]:
    """The stored records of an archive with their offsets; CRCs are left 0."""
    entries: list[_Entry] = []
    offset = 0
    for name, nbytes in zip(names, sizes, strict=True):
        entry = _Entry(f"{prefix}/{name}".encode("utf-8", "surrogateescape"), STORED, 0, nbytes, nbytes, offset)
        entries.append(entry)
        offset += len(_local_header(entry, _padding_nbytes(entry, alignment))) + nbytes + len(_descriptor(entry))
    return entries


def _between(entries: Sequence[_Entry], filled: Sequence[int], first: int, text: bytes) -> Piece:
    """What stands in front of a storage's data: the descriptor of the storage before, if there is one, and `text`."""
    if not filled:
        return Constant(text)
    before = entries[filled[-1]]
    return Seal(len(_descriptor(before)) + len(text), (filled[-1] - first,), partial(_seal_one, before, text))


def _seal_one(entry: _Entry, text: bytes, crcs: Sequence[int]) -> bytes:
    (crc32,) = crcs
    return _descriptor(replace(entry, crc32=crc32)) + text


def _ending(
    entries: Sequence[_Entry],
    filled: Sequence[int],
    text: bytes,
    data_offset: int,
    names_hash: int,
    crcs: Sequence[int],
) -> bytes:
    """All that follows the last storage's data, given the CRC-32 of each storage that is not empty.

    `text` ends with the header of the last record, the serialization id, whose data starts at `data_offset`.
    """
    sealed = list(entries)
    for position, crc32 in zip(filled, crcs, strict=True):
        sealed[position] = replace(sealed[position], crc32=crc32)
    identity = serialization_id(names_hash, hash_crcs(entry.crc32 for entry in sealed[:-1] if entry.nbytes))
    sealed[-1] = replace(sealed[-1], crc32=checksum(identity))
    last = _descriptor(sealed[filled[-1]]) if filled else b""
    directory = b"".join(map(_central_header, sealed))
    directory_offset = data_offset + len(identity) + len(_descriptor(sealed[-1]))
    ends = _end_records(len(sealed), directory_offset, len(directory))
    return last + text + identity + _descriptor(sealed[-1]) + directory + ends
