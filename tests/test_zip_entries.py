"""Entries of `.distcp` files: the quick comparison with templates sees what the strict parse sees."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.errors import Corrupt, Incomplete, ReshardError, Unsupported
from reshard.storage import zip_entries
from reshard.storage.torch_zip import open_archive
from reshard.storage.zip_entries import Entry, EntryReader


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def written(*, compute_crc: bool = True, alignment: int = 64, **storages: bytes) -> bytes:
    """An entry with the given storages, by torch's own writer; `_1=b""` stands for `data/1`."""
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream, compute_crc, alignment)
    writer.write_record("data.pkl", b"N.", 2)
    for key, data in storages.items():
        writer.write_record(f"data/{key[1:]}", data, len(data))
    writer.write_end_of_file()
    return stream.getvalue()


class File:
    """Entries back to back, in memory; counts its reads and is never asked for bytes it does not have."""

    def __init__(self, entries: list[bytes]) -> None:
        self.data = b"".join(entries)
        self.num_reads = 0
        starts = [sum(map(len, entries[:index])) for index in range(len(entries))]
        self.extents = [(start, len(entry)) for start, entry in zip(starts, entries, strict=True)]

    def read(self, offset: int, nbytes: int) -> bytes:
        assert 0 <= offset <= offset + nbytes <= len(self.data)
        self.num_reads += 1
        return self.data[offset : offset + nbytes]

    def locate(self, reader: EntryReader | None = None) -> list[Entry]:
        return list((reader or EntryReader()).locate(self.read, len(self.data), self.extents, "__0_0.distcp"))

    def strictly(self) -> Iterator[tuple[int, bytes, str, list[tuple[str, int, int]], list[int | None]]]:
        """The same, entry by entry through open_archive."""
        for start, nbytes in self.extents:
            entry = self.data[start : start + nbytes]
            archive = open_archive(lambda offset, count, e=entry: e[offset : offset + count], nbytes, "entry")
            storages = archive.storages
            yield (
                start,
                archive.payload,
                archive.byteorder,
                [(key, record.offset, record.nbytes) for key, record in storages.items()],
                [record.crc32 for record in storages.values()],
            )

    def quickly(self) -> Iterator[tuple[int, bytes, str, list[tuple[str, int, int]], list[int | None]]]:
        for entry in self.locate():
            framing = entry.framing
            yield (
                entry.start,
                framing.payload,
                framing.byteorder,
                [tuple(storage) for storage in framing.storages],  # type: ignore[misc]
                list(entry.crc32s),
            )


VALUES = [
    torch.rand(50),
    torch.rand(5, 10),
    torch.rand(10, 5),
    torch.empty(0),
    torch.empty(3, 0),
    torch.tensor(1.5),
    torch.arange(6000, dtype=torch.int64),
    torch.ones(7, dtype=torch.bfloat16),
    (torch.ones(2), [torch.zeros(3)]),
    {"no": "tensors"},
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(VALUES), max_size=30), st.integers(0, 99))
def test_any_mixture_of_entries_is_located_as_the_strict_parse_does(values: list[object], seed: int) -> None:
    torch.manual_seed(seed)
    entries = [
        saved(torch.rand_like(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v) for v in values
    ]
    file = File(entries)
    assert list(file.quickly()) == list(file.strictly())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("threads", [1, 3])
def test_entries_of_a_real_checkpoint_carry_their_tensors(threads: int, tmp_path: Path) -> None:
    state = {f"w{index}": torch.rand(index % 4, 3) for index in range(12)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, thread_count=threads))
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    reader = EntryReader()
    for index, info in metadata.storage_data.items():
        data = (tmp_path / info.relative_path).read_bytes()
        (entry,) = reader.locate(lambda o, n, d=data: d[o : o + n], len(data), [(info.offset, info.length)], "x")
        (storage,) = entry.framing.storages
        found = data[entry.start + storage.offset : entry.start + storage.offset + storage.nbytes]
        assert found == state[index.fqn].numpy().tobytes()
        assert entry.crc32s == (zlib.crc32(found),)


def test_entries_of_one_shape_share_their_framing() -> None:
    entries = File([saved(torch.rand(3, 4)) for _ in range(5)] + [saved(torch.rand(4, 3))]).locate()
    assert len({id(entry.framing) for entry in entries}) == 2
    assert len({entry.crc32s for entry in entries}) == 6


@pytest.mark.parametrize("numel, most_reads", [(50, 10), (10_000, 230)], ids=["small", "large"])
def test_entries_cost_at_most_one_read_each(numel: int, most_reads: int) -> None:
    file = File([saved(torch.rand(numel)) for _ in range(200)])
    file.locate()
    assert file.num_reads <= most_reads


def test_extents_may_skip_and_go_back() -> None:
    file = File([saved(torch.rand(5)) for _ in range(9)])
    for order in ([8, 0, 4, 4, 2], [1, 3, 5, 7]):
        extents = [file.extents[index] for index in order]
        entries = list(EntryReader().locate(file.read, len(file.data), extents, "x"))
        assert [entry.start for entry in entries] == [start for start, _ in extents]
        crcs = [entry.crc32s for entry in file.locate()]
        assert [entry.crc32s for entry in entries] == [crcs[index] for index in order]


def test_entries_with_and_without_crcs_may_stand_side_by_side() -> None:
    with_crc, without = written(_0=b"1234"), written(_0=b"1234", compute_crc=False)
    file = File([with_crc, without, with_crc, without])
    crc = zlib.crc32(b"1234")
    assert [entry.crc32s for entry in file.locate()] == [(crc,), (None,), (crc,), (None,)]


def test_wide_alignments_have_templates_too() -> None:
    file = File([written(_0=bytes([index] * 9), alignment=4096) for index in range(4)])
    entries = file.locate()
    assert len({id(entry.framing) for entry in entries}) == 1
    assert list(file.quickly()) == list(file.strictly())


@pytest.mark.parametrize("value", [torch.rand(5), torch.empty(0)], ids=["filled", "empty"])
def test_no_flipped_bit_outside_the_data_goes_unseen_beside_a_template(value: torch.Tensor) -> None:
    good = saved(value)
    ((storage,),) = [entry.framing.storages for entry in File([good]).locate()]
    reader = EntryReader()
    File([good]).locate(reader)
    for position in range(len(good)):
        if storage.offset <= position < storage.offset + storage.nbytes:
            continue
        for mask in (1 << position % 8, 0xFF):
            damaged = good[:position] + bytes([good[position] ^ mask]) + good[position + 1 :]
            with pytest.raises(Corrupt, match=r"__0_0\.distcp at byte 0"):
                File([damaged]).locate(reader)


def test_truncated_and_shifted_entries_are_refused() -> None:
    entry = saved(torch.rand(5))
    reader = EntryReader()
    File([entry]).locate(reader)
    data = entry * 3
    for start, nbytes in [(0, len(entry) - 1), (1, len(entry)), (len(entry), len(entry) + 1), (0, 2 * len(entry))]:
        with pytest.raises(Corrupt):
            list(reader.locate(lambda o, n: data[o : o + n], len(data), [(start, nbytes)], "x"))


@pytest.mark.parametrize("extent", [(-1, 10), (0, 0), (0, -5), (0, 1 << 60), (1 << 60, 10)])
def test_extents_outside_the_file_are_incomplete(extent: tuple[int, int]) -> None:
    data = saved(torch.rand(5))
    with pytest.raises(Incomplete, match="are wanted, it has"):
        list(EntryReader().locate(lambda o, n: data[o : o + n], len(data), [extent], "x"))


def test_a_file_that_shrinks_while_it_is_read_is_incomplete() -> None:
    entry = saved(torch.rand(5))
    data = entry * 2
    extents = [(0, len(entry)), (len(entry), len(entry))]
    cut = data[:-10]
    with pytest.raises(Incomplete):
        list(EntryReader().locate(lambda o, n: cut[o : o + n], len(data), extents, "x"))


def test_compressed_storages_are_refused() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("archive/data.pkl", b"N.")
        new.writestr("archive/data/0", bytes(100))
    with pytest.raises(Unsupported, match="data/0 is compressed"):
        File([packed.getvalue()]).locate()


def test_the_number_of_templates_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_entries, "_MAX_TEMPLATES", 3)
    reader = EntryReader()
    file = File([saved(torch.rand(index)) for index in (1, 20, 40, 60, 80, 1, 20)])
    assert [entry.crc32s for entry in file.locate(reader)] == [tuple(crcs) for *_, crcs in file.strictly()]
    assert len(reader._templates) <= 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mangled_files_raise_our_errors_only(data: st.DataObject) -> None:
    file = File([saved(torch.full((5,), float(index))) for index in range(3)])
    mangled = bytearray(file.data)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mangled) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=40))[: len(mangled) - at]
        mangled[at : at + len(patch)] = patch
    file.data = bytes(mangled)
    try:
        quick = list(file.quickly())
    except ReshardError:
        with pytest.raises(ReshardError):
            list(file.strictly())
    else:
        assert quick == list(file.strictly())
