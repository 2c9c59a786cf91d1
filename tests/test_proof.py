"""A damaged checkpoint ends in an error that names the file and the FQN, in exit code 1, and in no output."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)

import reshard
from checkpoints import child, equals, left_in, model, write_dcp
from reshard.cli.main import main
from reshard.errors import InputError
from reshard.ops.merge import Options, prepare
from reshard.storage.run import digest

MODEL = model()
FQN = "layers.1.up.weight"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dcp(tmp_path_factory.mktemp("proof") / "good", MODEL, ranks=3, prefix=("model",), objects={"epoch": 3})


@pytest.fixture
def damaged(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "shards"))


def refused(source: Path, capsys: pytest.CaptureFixture[str], *names: str, output: str = "out.safetensors") -> str:
    """What merge says, which exits with 1, names these, and leaves nothing behind."""
    before = left_in(source.parent)
    capsys.readouterr()
    assert main(["merge", str(source), str(source.parent / output), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert [name for name in names if name not in said] == [], said
    assert left_in(source.parent) == before
    return said


def metadata(directory: Path) -> Metadata:
    return pickle.loads((directory / ".metadata").read_bytes())  # written by this test


def entry(directory: Path, name: str = f"model.{FQN}", number: int = 1) -> tuple[Path, int, int]:
    """(file, offset, length) of one chunk of a tensor."""
    said = metadata(directory)
    offset = said.state_dict_metadata[name].chunks[number].offsets
    info = said.storage_data[MetadataIndex(name, offset)]
    return directory / info.relative_path, info.offset, info.length


def change(directory: Path, edit: Callable[[Metadata], Any]) -> None:
    """Rewrite `.metadata` as a writer with this defect would have."""
    said = metadata(directory)
    edit(said)
    (directory / ".metadata").write_bytes(pickle.dumps(said, protocol=4))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_what_is_not_damaged_is_merged_bit_for_bit(good: Path, tmp_path: Path) -> None:
    merged = reshard.merge(good, tmp_path / "out")
    assert equals(tmp_path / "out", MODEL)
    assert merged.num_checked > 0
    assert reshard.verify(tmp_path / "out", good).ok


# ------------------------------------------------------------------------------------------------- whole shards


@pytest.mark.parametrize("rank", range(3))
def test_a_missing_shard_is_named(damaged: Path, capsys: pytest.CaptureFixture[str], rank: int) -> None:
    (damaged / f"__{rank}_0.distcp").unlink()
    refused(damaged, capsys, f"__{rank}_0.distcp", str(damaged), "model.embed.weight")


@pytest.mark.parametrize("rank", range(3))
def test_an_empty_shard_is_named(damaged: Path, capsys: pytest.CaptureFixture[str], rank: int) -> None:
    (damaged / f"__{rank}_0.distcp").write_bytes(b"")
    refused(damaged, capsys, f"__{rank}_0.distcp", "0 of at least", "model.embed.weight")


@pytest.mark.parametrize("left", [0.01, 0.5, 0.999])
def test_a_truncated_shard_is_named(damaged: Path, capsys: pytest.CaptureFixture[str], left: float) -> None:
    path = damaged / "__1_0.distcp"
    os.truncate(path, int(path.stat().st_size * left))
    refused(damaged, capsys, "__1_0.distcp")


@pytest.mark.parametrize("names", [("__0_0", "__1_0"), ("__1_0", "__2_0"), ("__2_0", "__0_0")])
def test_a_shard_in_the_place_of_another_is_seen(
    damaged: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, str]
) -> None:
    shutil.copy(damaged / f"{names[0]}.distcp", damaged / f"{names[1]}.distcp")
    refused(damaged, capsys, f"{names[1]}.distcp")


def test_a_shard_in_the_place_of_one_laid_out_alike_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    even = {fqn: torch.randn(8, 4) for fqn in ("a.weight", "b.weight")}
    write_dcp(tmp_path / "shards", even, ranks=4)
    assert reshard.merge(tmp_path / "shards", tmp_path / "good.safetensors").num_tensors == 2
    shutil.copy(tmp_path / "shards/__1_0.distcp", tmp_path / "shards/__3_0.distcp")
    refused(tmp_path / "shards", capsys, "__1_0.distcp", "__3_0.distcp", "a.weight")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_shards_of_constants_are_not_duplicates(tmp_path: Path, value: float) -> None:
    constant = {fqn: torch.full((8, 4), value) for fqn in ("a.norm.weight", "b.exp_avg")}
    write_dcp(tmp_path / "shards", constant, ranks=4)
    reshard.merge(tmp_path / "shards", tmp_path / "out.safetensors")
    assert equals(tmp_path / "out.safetensors", constant)


def test_two_shards_swapped_are_seen_where_their_layout_differs(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (damaged / "__0_0.distcp").rename(damaged / "aside")
    (damaged / "__2_0.distcp").rename(damaged / "__0_0.distcp")
    (damaged / "aside").rename(damaged / "__2_0.distcp")
    refused(damaged, capsys, ".distcp")


def test_no_metadata_means_an_unfinished_save(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (damaged / ".metadata").unlink()
    refused(damaged, capsys, str(damaged), ".metadata")


@pytest.mark.parametrize("left", [0, 1, 2, 100, -1])
def test_truncated_metadata_is_named(damaged: Path, capsys: pytest.CaptureFixture[str], left: int) -> None:
    data = (damaged / ".metadata").read_bytes()
    (damaged / ".metadata").write_bytes(data[:left])
    refused(damaged, capsys, ".metadata")


# ------------------------------------------------------------------------------------------------- flipped bits


def regions(path: Path, start: int, nbytes: int) -> dict[str, range]:
    """Where the parts of an entry lie in its file, found by their signatures."""
    data = path.read_bytes()[start : start + nbytes]
    storage = data.index(b"/data/0") + len(b"/data/0")
    storage += struct.unpack_from("<H", data, data.index(b"/data/0") - len(b"archive") - 2)[0]
    directory = data.index(b"PK\1\2")
    pickled = data.index(b"\x80\2")
    where = {
        "local header": range(30),
        "name": range(30, 30 + len(b"archive/data.pkl")),
        "pickle": range(pickled, data.index(b"PK\7\10")),
        "descriptor of the pickle": range(data.index(b"PK\7\10"), data.index(b"PK\7\10") + 16),
        "data": range(storage, data.index(b"PK\7\10", storage)),
        "descriptor of the data": range(data.index(b"PK\7\10", storage), data.index(b"PK\7\10", storage) + 16),
        "central directory": range(directory, data.index(b"PK\6\6")),
        "end records": range(data.index(b"PK\6\6"), nbytes),
    }
    return {name: range(start + r.start, start + r.stop) for name, r in where.items()}


REGIONS = [
    "local header", "name", "pickle", "descriptor of the pickle", "data", "descriptor of the data",
    "central directory", "end records",
]  # fmt: skip


@pytest.mark.parametrize("region", REGIONS)
def test_a_bit_flipped_in_any_region_of_a_shard_is_seen(
    damaged: Path, capsys: pytest.CaptureFixture[str], region: str
) -> None:
    path, start, nbytes = entry(damaged)
    where = regions(path, start, nbytes)[region]
    original = path.read_bytes()
    for at in sorted({where.start, where.start + 1, (where.start + where.stop) // 2, where.stop - 1}):
        for bit in (0, 6):
            flip(path, at, bit)
            refused(damaged, capsys, str(path), FQN)
            path.write_bytes(original)


@pytest.mark.slow
def test_a_bit_flipped_in_any_byte_of_an_entry_is_seen(damaged: Path) -> None:
    """Every byte of the first entry of its kind (parsed strictly) and of a later one (held against the first)."""
    for number in (0, 1):
        path, start, nbytes = entry(damaged, number=number)
        original = path.read_bytes()
        unseen = []
        for at in range(start, start + nbytes):
            data = bytearray(original)
            data[at] ^= 1 << at % 8
            path.write_bytes(data)
            try:
                digest(prepare(damaged, damaged.parent / "out.safetensors", Options(include=(FQN,))).plan, threads=1)
            except InputError as error:
                assert (path.name in str(error), FQN in str(error)) == (True, True), error  # noqa: PT017
            else:
                unseen.append(at - start)
        path.write_bytes(original)
        assert unseen == []


def test_a_flipped_bit_that_is_found_after_others_were_written_leaves_nothing(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, start, nbytes = entry(damaged, "model.steps", 0)
    flip(path, regions(path, start, nbytes)["data"].start)
    refused(damaged, capsys, str(path), "steps", "CRC-32", output="out")


def test_without_checksums_a_merge_says_how_many_it_confirmed(tmp_path: Path) -> None:
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    set_crc32_options(False)
    try:
        write_dcp(tmp_path / "shards", MODEL)
    finally:
        set_crc32_options(before)
    assert reshard.merge(tmp_path / "shards", tmp_path / "out.safetensors").num_checked == 0


# ---------------------------------------------------------------------------------------------------- metadata


def a_hole(said: Metadata) -> None:
    said.state_dict_metadata[f"model.{FQN}"].chunks.pop(1)


def no_storage(said: Metadata) -> None:
    chunk = said.state_dict_metadata[f"model.{FQN}"].chunks[1]
    del said.storage_data[MetadataIndex(f"model.{FQN}", chunk.offsets)]


def moved(said: Metadata, to: tuple[int, ...]) -> None:
    tensor = said.state_dict_metadata[f"model.{FQN}"]
    chunk = tensor.chunks[1]
    info = said.storage_data.pop(MetadataIndex(f"model.{FQN}", chunk.offsets))
    tensor.chunks[1] = ChunkStorageMetadata(torch.Size(to), chunk.sizes)
    said.storage_data[MetadataIndex(f"model.{FQN}", torch.Size(to))] = info


def an_overlap(said: Metadata) -> None:
    moved(said, (10, 0))


def outside(said: Metadata) -> None:
    moved(said, (1000, 0))


def twice(said: Metadata) -> None:
    tensor = said.state_dict_metadata[f"model.{FQN}"]
    tensor.chunks.append(tensor.chunks[1])


def larger(said: Metadata) -> None:
    said.state_dict_metadata[f"model.{FQN}"].size = torch.Size((64, 16))


def smaller(said: Metadata) -> None:
    said.state_dict_metadata[f"model.{FQN}"].size = torch.Size((16, 16))


def transposed(said: Metadata) -> None:
    tensor = said.state_dict_metadata["model.steps"]
    tensor.size, tensor.chunks[:] = torch.Size((1, 2)), [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((1, 2)))]
    info = said.storage_data.pop(MetadataIndex("model.steps", torch.Size((0,))))
    said.storage_data[MetadataIndex("model.steps", torch.Size((0, 0)))] = info


def another_dtype(said: Metadata) -> None:
    tensor = said.state_dict_metadata[f"model.{FQN}"]
    tensor.properties = TensorProperties.create_from_tensor(torch.empty(0, dtype=torch.int32))


def wider_dtype(said: Metadata) -> None:
    tensor = said.state_dict_metadata[f"model.{FQN}"]
    tensor.properties = TensorProperties.create_from_tensor(torch.empty(0, dtype=torch.float64))


def info_of(said: Metadata) -> Any:
    return said.storage_data[MetadataIndex(f"model.{FQN}", said.state_dict_metadata[f"model.{FQN}"].chunks[-1].offsets)]


def past_the_end(said: Metadata) -> None:
    info_of(said).offset += 1 << 40


def negative(said: Metadata) -> None:
    info_of(said).offset = -1


def shifted(said: Metadata) -> None:
    info_of(said).offset += 64


def shorter(said: Metadata) -> None:
    info_of(said).length -= 64


def longer(said: Metadata) -> None:
    info_of(said).length += 64


def of_another_tensor(said: Metadata) -> None:
    other = said.storage_data[MetadataIndex("model.layers.0.norm.weight", torch.Size((0,)))]
    info = info_of(said)
    info.relative_path, info.offset, info.length = other.relative_path, other.offset, other.length


def another_rank(said: Metadata) -> None:
    tensor = said.state_dict_metadata[f"model.{FQN}"]
    chunk = tensor.chunks[1]
    tensor.chunks[1] = ChunkStorageMetadata(chunk.offsets, torch.Size((*chunk.sizes, 1)))


@pytest.mark.parametrize(
    "lie",
    [
        a_hole, no_storage, an_overlap, outside, twice, larger, smaller, another_dtype, wider_dtype, negative, shifted,
        shorter, longer, of_another_tensor, another_rank,
    ],
    ids=lambda lie: lie.__name__,
)  # fmt: skip
def test_metadata_that_lies_about_a_tensor_is_seen(
    damaged: Path, capsys: pytest.CaptureFixture[str], lie: Callable[[Metadata], None]
) -> None:
    change(damaged, lie)
    refused(damaged, capsys, str(damaged), FQN)


def test_offsets_past_the_end_name_the_file(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(damaged, past_the_end)
    refused(damaged, capsys, str(damaged), "__2_0.distcp", FQN)


def test_another_shape_of_as_many_elements_is_seen(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(damaged, transposed)
    refused(damaged, capsys, str(damaged), "steps")


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 60,), (1 << 62,), (1 << 31, 1 << 31)])
def test_a_huge_claimed_tensor_is_refused(
    damaged: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...]
) -> None:
    def huge(said: Metadata) -> None:
        tensor = said.state_dict_metadata[f"model.{FQN}"]
        origin = torch.Size((0,) * len(shape))
        said.storage_data[MetadataIndex(f"model.{FQN}", origin)] = info_of(said)
        tensor.size, tensor.chunks = torch.Size(shape), [ChunkStorageMetadata(origin, torch.Size(shape))]

    change(damaged, huge)
    refused(damaged, capsys, str(damaged), FQN)


# ------------------------------------------------------------------------------------------- while it is being read


def test_a_source_that_changes_while_it_is_read_is_an_error(damaged: Path, tmp_path: Path) -> None:
    touched = []

    def touch(nbytes: int, fqn: str) -> None:
        if not touched:
            touched.append(fqn)
            path = damaged / "__2_0.distcp"
            os.utime(path, ns=(0, 10**18))

    before = left_in(tmp_path)
    with pytest.raises(reshard.errors.Mismatch, match="changed while it was read"):
        reshard.merge(damaged, tmp_path / "out", progress=touch, threads=1)
    assert left_in(tmp_path) == before


def test_a_source_that_shrinks_while_it_is_read_is_an_error(damaged: Path, tmp_path: Path) -> None:
    def cut(nbytes: int, fqn: str) -> None:
        os.truncate(damaged / "__2_0.distcp", 100)

    before = left_in(tmp_path)
    with pytest.raises(InputError, match=r"__2_0\.distcp"):
        reshard.merge(damaged, tmp_path / "out", progress=cut, threads=1)
    assert left_in(tmp_path) == before


def test_a_source_that_disappears_while_it_is_read_is_an_error(damaged: Path, tmp_path: Path) -> None:
    def remove(nbytes: int, fqn: str) -> None:
        (damaged / "__0_0.distcp").unlink(missing_ok=True)

    with pytest.raises(InputError):
        reshard.merge(damaged, tmp_path / "out", progress=remove, threads=1)
    assert left_in(tmp_path) == ["shards", *(f"shards/{p.name}" for p in sorted(damaged.iterdir()))]


def test_the_exit_code_of_a_process_is_1(damaged: Path) -> None:
    (damaged / "__1_0.distcp").unlink()
    done = child("merge", damaged, damaged.parent / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert "__1_0.distcp" in done.stderr


# ------------------------------------------------------------------------------------------------ which is the model


@pytest.mark.parametrize("name", ["state", "app", "weights", "module"])
def test_an_object_that_holds_a_tensor_does_not_hide_the_model(tmp_path: Path, name: str) -> None:
    """A nested leaf of the trainer's, beside weights at the top level, once was taken for the model."""
    write_dcp(tmp_path / "shards", MODEL, objects={name: {"history": [torch.ones(3)]}})
    reshard.merge(tmp_path / "shards", tmp_path / "out.safetensors")
    assert equals(tmp_path / "out.safetensors", MODEL | {f"{name}.history.0": torch.ones(3)})


def test_what_is_left_out_beside_the_model_is_named(tmp_path: Path) -> None:
    tensors = {"model.w": torch.randn(4), "critic.w": torch.randn(4), "optim.w": torch.randn(4)}
    paths = {name: tuple(name.split(".")) for name in tensors}
    write_dcp(tmp_path / "shards", tensors, paths=paths)
    merged = reshard.merge(tmp_path / "shards", tmp_path / "out.safetensors")
    assert "left out: critic, optim" in merged.notices
