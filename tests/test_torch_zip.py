"""The torch.save archive: held against torch and zipfile, in both directions, and against damage."""

from __future__ import annotations

import base64
import io
import shutil
import struct
import subprocess
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.errors import Corrupt, Incomplete, ReshardError, Unsupported
from reshard.storage import crc, torch_zip
from reshard.storage.torch_zip import Archive, Constant, Piece, Seal, Slot, lay_out, open_archive

GIB = 1 << 30

TORCH_2_2_2 = zlib.decompress(
    base64.b64decode(
        "eNoL8GZmYWDg4GDAAAIMQgyJRckZmWWp+imJJYl6Bdk5bk58DFEooIEpuSQfqEovvrQkM6eYK74oNak0MyclviQ1rzi/KL7MiKuQ"
        "QUMjgh1oYjFQZWJ6aiEjRAuXW05+YkkwRJCrkCmCEajGoJA5ghlIJxeUFrJ4M5UUsgZ6M3gztRayeTO2FrJ3Jifn5+SkJpdk5ucV"
        "c/kXpaQWpaa4ZCaXcBVyaAYVcpYUcgUVcusFeLNzMIg4bJkGNAmEA3D6UpBBG+7LpMqS1HyQkW5O6mjexAlyMktKclJB9rXaPpZk"
        "A5rIhtc+PgY7lFDVN3BzsiLWMiwg5sDWfZafk/aBXHCl/is/yEoOvC7gZ7CGu6AstagYGJJuTubkOsGYC2TzxXnpoUxAs5nw2izH"
        "YAS3WQ/s+eLUoszEnMyqRFB8xmemuDnpkegQA1NzMwtTCwtTc2MLU0tLMyNzCyMDIDA0sTQFilsaGZgamZuaWYBc6Ra4gVMD6A4N"
        "sCsZQY5FuBMptQhguBw9H6DrRo57QRSdz5B0w9MXunbkiOND0R7GyICWXND1Igc9P4reG0h6oRGNrhk5RORQNAcxMRCIqwBvNjYd"
        "WMwy68J1sqLRTowQ+gcThAbqAxUGDFYsED4jWIyVDaKHFaweohYAaBn7sg=="
    )
)
"""A `.distcp` entry by PyTorch 2.2.2: two float32 of one rank's shard of a bias."""

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
]


def saved(value: object, target: Path | None = None) -> bytes:
    """What torch.save writes, to a stream or to a file."""
    if target is not None:
        torch.save(value, target)
        return target.read_bytes()
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def written(records: Mapping[str, bytes], *, compute_crc: bool = True, alignment: int = 64) -> bytes:
    """An archive of any records, by torch's own writer."""
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream, compute_crc, alignment)
    for name, data in records.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return stream.getvalue()


def rezipped(archive: bytes, method: int) -> bytes:
    """The archive unpacked and packed again by `zipfile`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(stream, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return stream.getvalue()


def opened(archive: bytes) -> Archive:
    """The archive, opened by a reader that is never asked for bytes which are not there."""

    def read(offset: int, nbytes: int) -> bytes:
        assert 0 <= offset <= offset + nbytes <= len(archive)
        return archive[offset : offset + nbytes]

    return open_archive(read, len(archive), "some.pt")


def assembled(pieces: Sequence[Piece], storages: Sequence[bytes]) -> bytes:
    crcs = [zlib.crc32(data) for data in storages]
    out = bytearray()
    for piece in pieces:
        match piece:
            case Constant(data):
                out += data
            case Slot(index, nbytes):
                assert nbytes == len(storages[index])
                out += storages[index]
            case Seal(nbytes, indices, fill):
                seal = fill([crcs[index] for index in indices])
                assert len(seal) == nbytes
                out += seal
    return bytes(out)


def crc_of_zeros(nbytes: int) -> int:
    if nbytes < 4096:
        return zlib.crc32(bytes(nbytes))
    half = crc_of_zeros(nbytes // 2)
    return crc.combine(crc.combine(half, half, nbytes // 2), zlib.crc32(bytes(nbytes % 2)), nbytes % 2)


# ---------------------------------------------------------------------------------------------------------- reading


def test_every_record_is_where_zipfile_finds_it() -> None:
    archive = saved([torch.arange(6.0), torch.empty(0), torch.tensor(3), {"a": "b"}])
    found = opened(archive)
    with zipfile.ZipFile(io.BytesIO(archive)) as oracle:
        expected = {info.filename: oracle.read(info) for info in oracle.infolist()}
        crcs = {info.filename: info.CRC for info in oracle.infolist()}
    assert {f"{found.prefix}/{name}": found.read_small(name) for name in found.records} == expected
    assert {f"{found.prefix}/{name}": record.crc32 for name, record in found.records.items()} == crcs
    for record in found.records.values():
        assert archive[record.offset : record.offset + record.nbytes] == expected[f"archive/{record.name}"]
        for offset in record.crc_offsets:
            assert archive[offset : offset + 4] == struct.pack("<I", record.crc32 or 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4)], ids=str)
def test_tensors_of_every_dtype_have_one_storage_of_their_size(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    (storage,) = opened(saved(tensor)).storages.values()
    assert storage.nbytes == tensor.nbytes
    assert storage.crc32 == zlib.crc32(bytes(tensor.nbytes))


def test_files_are_prefixed_by_their_stem(tmp_path: Path) -> None:
    found = opened(saved(torch.ones(2), tmp_path / "model.v1.pt"))
    assert found.prefix == "model.v1"
    assert found.is_torch_written


def test_a_literal_archive_of_an_older_release_is_read() -> None:
    found = opened(TORCH_2_2_2)
    assert list(found.records) == ["data.pkl", "byteorder", "data/0", "version", ".data/serialization_id"]
    assert found.read_small("data/0").hex() == "5cc0b5be39f362be"
    assert found.payload[:2] == b"\x80\x02"
    assert found.byteorder == "little"


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_byte_order_is_the_one_stated(byteorder: str) -> None:
    found = opened(written({"data.pkl": b"N.", "byteorder": byteorder.encode(), "data/0": b"\1\2"}))
    assert found.byteorder == byteorder


@pytest.mark.parametrize("alignment", [1, 64, 4096, 16384])
def test_any_alignment_is_read(alignment: int) -> None:
    found = opened(written({"data.pkl": b"N.", "data/0": b"1234", "data/1": b"", "data/2": b"5"}, alignment=alignment))
    assert [record.offset % alignment for record in found.records.values()] == [0] * len(found.records)
    assert found.read_small("data/2") == b"5"


def test_archives_without_crcs_say_so() -> None:
    found = opened(written({"data.pkl": b"N.", "data/0": b"1234", "data/1": b""}, compute_crc=False))
    assert {name: record.crc32 for name, record in found.storages.items()} == {"0": None, "1": 0}
    assert found.read_small("data/0") == b"1234"


def test_a_crc_that_happens_to_be_zero_is_a_crc() -> None:
    data = b"\xff\xff\xff\xff"
    assert zlib.crc32(data) == 0xFFFFFFFF
    colliding = bytes.fromhex("9d0ad96d")
    assert zlib.crc32(colliding) == 0
    assert opened(written({"data.pkl": b"N.", "data/0": colliding})).storages["0"].crc32 == 0


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_that_were_packed_again_are_read(method: int) -> None:
    original = saved([torch.zeros(1000), torch.empty(0)])
    found = opened(rezipped(original, method))
    assert not found.is_torch_written
    assert {record.method for record in found.records.values()} == {method}
    assert {name: found.read_small(name) for name in found.records} == {
        name: opened(original).read_small(name) for name in opened(original).records
    }


def test_archives_packed_again_to_a_stream_are_read() -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += data
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x/data.pkl", b"N.")
        packed.writestr("x/data/0", bytes(100))
    assert opened(bytes(pipe.data)).read_small("data/0") == bytes(100)


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs Info-ZIP")
@pytest.mark.parametrize("arguments", ["-r again.zip archive", "-0 -D -r again.zip archive", "-r - archive"])
def test_archives_packed_again_by_info_zip_are_read(arguments: str, tmp_path: Path) -> None:
    original = saved([torch.zeros(1000), torch.empty(0)])
    with zipfile.ZipFile(io.BytesIO(original)) as unpacked:
        unpacked.extractall(tmp_path)
    done = subprocess.run(["zip", "-q", *arguments.split()], cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    found = opened(done.stdout or (tmp_path / "again.zip").read_bytes())
    expected = opened(original)
    assert {name: found.read_small(name) for name in found.records} == {
        name: expected.read_small(name) for name in expected.records
    }


def test_torchscript_archives_open() -> None:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    found = opened(stream.getvalue())
    code = next(name for name in found.records if name.startswith("code/") and name.endswith(".py"))
    assert found.records[code].method == torch_zip.DEFLATED
    assert b"class Linear" in found.read_small(code)


# ----------------------------------------------------------------------------------------------------------- damage


def damages(archive: bytes, outside: range) -> list[bytes]:
    """The archive with one bit flipped, and with one byte inverted, for each byte outside the data."""
    damaged = []
    for position in range(len(archive)):
        if position not in outside:
            for mask in (1 << position % 8, 0xFF):
                damaged.append(archive[:position] + bytes([archive[position] ^ mask]) + archive[position + 1 :])
    return damaged


@pytest.mark.parametrize("value", [torch.arange(5.0), torch.empty(0)], ids=["filled", "empty"])
def test_no_flipped_bit_outside_the_data_goes_unseen(value: torch.Tensor) -> None:
    archive = saved(value)
    data = opened(archive).storages["0"]
    for damaged in damages(archive, range(data.offset, data.offset + data.nbytes)):
        with pytest.raises(Corrupt, match=r"some\.pt"):
            opened(damaged)


def test_no_flipped_bit_in_a_packed_again_archive_changes_what_is_read() -> None:
    archive = rezipped(saved(torch.arange(5.0)), zipfile.ZIP_DEFLATED)
    expected = {name: record.nbytes for name, record in opened(archive).records.items()}
    data = opened(archive).storages["0"]
    for damaged in damages(archive, range(data.offset, data.offset + data.stored_nbytes)):
        try:
            found = opened(damaged)
        except (Corrupt, Unsupported):
            continue
        assert {name: record.nbytes for name, record in found.records.items()} == expected


def test_flipped_bits_in_data_are_found_when_it_is_read() -> None:
    archive = bytearray(saved(torch.arange(5.0)))
    archive[opened(bytes(archive)).storages["0"].offset + 7] ^= 4
    found = opened(bytes(archive))
    with pytest.raises(Corrupt, match=r"data/0 has the CRC-32 .{8}, it was written with"):
        found.read_small("data/0")


def test_truncation_at_any_length_is_found() -> None:
    archive = saved(torch.arange(5.0))
    for nbytes in range(len(archive)):
        with pytest.raises(Corrupt, match=r"some\.pt"):
            opened(archive[:nbytes])


def test_a_reader_that_runs_dry_is_an_incomplete_file() -> None:
    archive = saved(torch.arange(5.0))
    with pytest.raises(Incomplete, match="1577 bytes expected at byte 0, found 1000"):
        open_archive(lambda offset, nbytes: archive[:1000][offset : offset + nbytes], len(archive), "some.pt")


@pytest.mark.parametrize("extra", [b"\0", b"appended", bytes(100)])
def test_bytes_before_or_after_the_archive_are_refused(extra: bytes) -> None:
    archive = saved(torch.ones(2))
    for damaged in (archive + extra, extra + archive):
        with pytest.raises(Corrupt):
            opened(damaged)


def test_gaps_between_records_are_refused() -> None:
    archive = rezipped(saved(torch.ones(2)), zipfile.ZIP_STORED)
    end = struct.Struct("<4s4H2IH")
    *fields, directory_offset, comment = end.unpack(archive[-22:])
    shifted = archive[:directory_offset] + bytes(8) + archive[directory_offset:-22]
    with pytest.raises(Corrupt, match="disagrees with the directory"):
        opened(shifted + end.pack(*fields, directory_offset + 8, comment))


def test_zips_of_other_programs_are_not_torch_archives() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as other:
        other.writestr("arr_0.npy", b"numbers")
    with pytest.raises(Unsupported, match=r"not written by torch\.save"):
        opened(stream.getvalue())


def test_other_compressions_are_named() -> None:
    with pytest.raises(Unsupported, match="packed by zip method 12"):
        opened(rezipped(saved(torch.ones(2)), zipfile.ZIP_BZIP2))


def test_a_bomb_is_not_inflated_beyond_what_it_claims() -> None:
    bomb = rezipped(written({"data.pkl": b"N." + bytes(1 << 20), "data/0": b""}), zipfile.ZIP_DEFLATED)
    claimed = struct.pack("<I", (1 << 20) + 2)
    assert bomb.count(claimed) == 2
    with pytest.raises(Corrupt, match=r"data\.pkl does not inflate to the 100 bytes"):
        opened(bomb.replace(claimed, struct.pack("<I", 100)))


def test_claimed_sizes_are_not_believed() -> None:
    huge = 1 << 62
    ends = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, huge, huge, huge, 0)
    ends += struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1)
    ends += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0, 0)
    with pytest.raises(Corrupt):
        opened(ends)
    with pytest.raises(Corrupt):
        opened(torch_zip._end_records(huge, 0, 0))


@given(st.binary(max_size=200))
def test_garbage_raises_our_errors_only(garbage: bytes) -> None:
    with pytest.raises(ReshardError):
        opened(garbage)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_mangled_archives_raise_our_errors_only(data: st.DataObject) -> None:
    """Overwrites parts of an archive, of either writer, with garbage or with other parts of it."""
    archive = bytearray(data.draw(st.sampled_from([TORCH_2_2_2, rezipped(TORCH_2_2_2, zipfile.ZIP_DEFLATED)])))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(archive) - 1))
        source = data.draw(st.integers(0, len(archive) - 1))
        patch = data.draw(st.one_of(st.binary(min_size=1, max_size=30), st.just(bytes(archive[source : source + 60]))))
        archive[at : at + len(patch)] = patch
    try:
        found = opened(bytes(archive))
        for name in found.records:
            found.read_small(name)
    except ReshardError:
        pass


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    "value",
    [
        {},
        torch.arange(7.0),
        [torch.empty(0)],
        [torch.empty(0), torch.ones(3), torch.empty(0), torch.ones(64, 3), torch.empty(0)],
        {f"layer.{index}": torch.full((index % 50,), index) for index in range(130)},
    ],
    ids=["no tensors", "one", "empty", "some empty", "many"],
)
def test_a_layout_is_what_torch_writes_byte_for_byte(value: object, tmp_path: Path) -> None:
    for expected in (saved(value), saved(value, tmp_path / "model.pt")):
        found = opened(expected)
        storages = [found.read_small(record.name) for record in found.storages.values()]
        pieces = lay_out(found.prefix, found.payload, [len(data) for data in storages])
        assert assembled(pieces, storages) == expected


def test_other_alignments_are_laid_out_as_torch_does() -> None:
    expected = written(
        {
            "data.pkl": b"N.",
            ".format_version": b"1",
            ".storage_alignment": b"4096",
            "byteorder": b"little",
            "data/0": b"1234",
        },
        alignment=4096,
    )
    assert assembled(lay_out("archive", b"N.", [4], alignment=4096), [b"1234"]) == expected


def test_what_is_laid_out_loads(tmp_path: Path) -> None:
    value = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.empty(0, 4), "c": torch.tensor(7)}
    found = opened(saved(value))
    storages = [found.read_small(record.name) for record in found.storages.values()]
    path = tmp_path / "whole.pt"
    path.write_bytes(assembled(lay_out("whole", found.payload, [len(data) for data in storages]), storages))
    with zipfile.ZipFile(path) as oracle:
        assert oracle.testzip() is None
    for loaded in (torch.load(path, weights_only=True), torch.load(path, weights_only=True, mmap=True)):
        assert list(loaded) == list(value)
        assert all(torch.equal(loaded[name], value[name]) for name in value)


@pytest.mark.parametrize("name", ["model.pt", "model.tar.pt", "weights", "a b.bin", "modèle.pt", "x..pt"])
def test_the_prefix_is_the_one_that_torch_chooses(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert opened(saved(1, path)).prefix == torch_zip.archive_prefix(str(path))


SIZES = {
    "large": [4 * GIB + 5],
    "small after large": [4 * GIB + 5, 12, 0, 7],
    "just below": [4 * GIB - 2],
    "at the limit": [4 * GIB - 1, 0, 3],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_archives_beyond_4_gib_are_laid_out_and_read(sizes: list[int], tmp_path: Path) -> None:
    pieces = lay_out("big", b"N.", sizes)
    path = tmp_path / "big.pt"
    with path.open("wb") as file:
        for piece in pieces:
            match piece:
                case Constant(data):
                    file.write(data)
                case Slot(_, nbytes):
                    file.seek(nbytes, io.SEEK_CUR)
                case Seal(_, indices, fill):
                    file.write(fill([crc_of_zeros(sizes[index]) for index in indices]))
    assert path.stat().st_size == sum(piece.nbytes for piece in pieces)
    with path.open("rb") as file:

        def read(offset: int, nbytes: int) -> bytes:
            assert nbytes < 1 << 20
            file.seek(offset)
            return file.read(nbytes)

        found = open_archive(read, path.stat().st_size, "big.pt")
    assert [record.nbytes for record in found.storages.values()] == sizes
    assert [record.crc32 for record in found.storages.values()] == [crc_of_zeros(nbytes) for nbytes in sizes]
    assert all(record.offset % 64 == 0 for record in found.records.values())
    with zipfile.ZipFile(path) as oracle:
        assert [info.file_size for info in oracle.infolist() if "/data/" in info.filename] == sizes
    assert torch.load(path, weights_only=True, mmap=True) is None


class Sieve:
    """A stream that keeps what is written to it, except for the one huge storage."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.kept: dict[int, bytes] = {}

    def write(self, data: bytes) -> int:
        nbytes = memoryview(data).nbytes
        if nbytes < 1 << 20:
            self.kept[self.nbytes] = bytes(data)
        self.nbytes += nbytes
        return nbytes

    def flush(self) -> None:
        pass


@pytest.mark.slow
def test_archives_beyond_4_gib_are_what_torch_writes_byte_for_byte() -> None:
    sieve = Sieve()
    torch.save([torch.zeros(4 * GIB + 5, dtype=torch.uint8), torch.ones(3), torch.empty(0)], sieve)  # type: ignore[arg-type]
    storages = [4 * GIB + 5, 12, 0]
    ones = struct.pack("<3f", 1, 1, 1)
    crcs = [crc_of_zeros(storages[0]), zlib.crc32(ones), 0]
    offset = 0
    ours: dict[int, bytes] = {}
    for piece in lay_out("archive", sieve.kept[64], storages):
        match piece:
            case Constant(data):
                ours[offset] = data
            case Slot(index, _):
                if index == 1:
                    ours[offset] = ones
            case Seal(_, indices, fill):
                ours[offset] = fill([crcs[index] for index in indices])
        offset += piece.nbytes
    assert offset == sieve.nbytes
    for start, data in sieve.kept.items():
        at = max(position for position in ours if position <= start)
        assert ours[at][start - at : start - at + len(data)] == data
