"""`import reshard`: a checkpoint as a mapping of lazy tensors, and the verbs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
import workspace
from checkpoints import equals, same, write_dcp

EXAMPLES = workspace.EXAMPLES


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(64, 1024, generator=generator),
        "half": torch.randn(6, 8, generator=generator).bfloat16(),
        "eight": torch.randn(6, 8, generator=generator).to(torch.float8_e4m3fn),
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
    }


@pytest.fixture
def dcp(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    return write_dcp(tmp_path / "dcp", tensors, ranks=4)


@pytest.fixture
def nbytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every read of a file from here on, its length."""
    lengths: list[int] = []
    pread, preadv = os.pread, os.preadv

    def counted(fd: int, nbytes: int, offset: int) -> bytes:
        lengths.append(nbytes)
        return pread(fd, nbytes, offset)

    def counted_into(fd: int, buffers: list[memoryview], offset: int) -> int:
        lengths.append(sum(buffer.nbytes for buffer in buffers))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(os, "preadv", counted_into)
    return lengths


def test_a_checkpoint_is_a_mapping(dcp: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    checkpoint = reshard.open(dcp)
    assert isinstance(checkpoint, Mapping)
    assert len(checkpoint) == len(tensors)
    assert set(checkpoint) == set(tensors)
    assert "wide" in checkpoint
    assert checkpoint.get("absent") is None
    with pytest.raises(KeyError):
        checkpoint["absent"]


def test_a_tensor_says_what_it_is_before_it_is_read(dcp: Path) -> None:
    tensor = reshard.open(dcp)["half"]
    assert (tensor.shape, tensor.dtype.name, tensor.dtype.torch, tensor.nbytes) == ((6, 8), "BF16", "bfloat16", 96)
    assert repr(tensor) == "LazyTensor(BF16, [6, 8])"


def test_every_tensor_reads_as_torch_wrote_it(dcp: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    checkpoint = reshard.open(dcp)
    for fqn, tensor in tensors.items():
        array = checkpoint[fqn].numpy()
        assert array.shape == tuple(tensor.shape)
        assert array.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_numpy_lacks_some_types_and_ml_dtypes_has_them(dcp: Path) -> None:
    checkpoint = reshard.open(dcp)
    assert checkpoint["half"].numpy().dtype == ml_dtypes.bfloat16
    assert checkpoint["eight"].numpy().dtype == ml_dtypes.float8_e4m3fn
    assert checkpoint["wide"].numpy().dtype == np.float32


def test_a_tensor_is_an_array_to_numpy(dcp: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    checkpoint = reshard.open(dcp)
    assert np.asarray(checkpoint["wide"]).sum() == pytest.approx(tensors["wide"].sum().item(), rel=1e-3)
    assert np.asarray(checkpoint["half"], dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize(
    "index",
    [
        np.s_[3], np.s_[-1], np.s_[10:20], np.s_[:, 5], np.s_[20:40, 100:101], np.s_[5:5], np.s_[63, 1023], np.s_[-3:],
        np.s_[60:99],
    ],
    ids=str,
)  # fmt: skip
def test_a_part_is_what_numpy_would_give(index: object, dcp: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    part = reshard.open(dcp)["wide"][index]  # type: ignore[index]
    expected = tensors["wide"].numpy()[index]  # type: ignore[index]
    assert part.shape == expected.shape
    assert np.array_equal(part.numpy(), expected)


def test_an_index_that_is_not_supported_is_an_error_not_a_guess(dcp: Path) -> None:
    tensor = reshard.open(dcp)["wide"]
    for index in (64, (0, 0, 0), np.s_[::2]):
        with pytest.raises((IndexError, ValueError, reshard.ReshardError)):
            tensor[index]  # type: ignore[index]


def test_opening_reads_headers_only(tmp_path: Path, nbytes_read: list[int]) -> None:
    path = write_dcp(tmp_path / "large", {"w": torch.zeros(4096, 1024)}, ranks=4)
    assert reshard.open(path)["w"].shape == (4096, 1024)
    assert sum(nbytes_read) < 20_000


def test_a_slice_reads_only_what_it_needs(tmp_path: Path, nbytes_read: list[int]) -> None:
    path = write_dcp(tmp_path / "large", {"w": torch.arange(4096.0 * 1024).reshape(4096, 1024)}, ranks=4)
    tensor = reshard.open(path)["w"]
    tensor[0].numpy()  # looks the entries up
    nbytes_read.clear()
    assert tensor[1000:1030].numpy()[0, 0] == 1000 * 1024
    assert 30 * 4096 <= sum(nbytes_read) <= 30 * 4096 + 8192


def test_every_format_opens_alike(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    held = {"wide": tensors["wide"], "half": tensors["half"]}
    write_dcp(tmp_path / "dcp", held)
    workspace.write_rank_files(tmp_path / "ranks", held)
    workspace.write_hf_shards(tmp_path / "shards", held)
    torch.save(held, tmp_path / "file.pt")
    save_file(held, tmp_path / "file.safetensors")
    opened = [reshard.open(tmp_path / name) for name in ("dcp", "ranks", "shards", "file.pt", "file.safetensors")]
    for checkpoint in opened:
        assert {fqn: t.numpy().tobytes() for fqn, t in checkpoint.items()} == {
            fqn: t.numpy().tobytes() for fqn, t in opened[0].items()
        }


def test_a_path_may_be_text(dcp: Path) -> None:
    assert set(reshard.open(str(dcp))) == set(reshard.open(dcp))


def test_what_is_wrong_is_an_exception_with_a_hint(dcp: Path) -> None:
    (dcp / ".metadata").unlink()
    with pytest.raises(reshard.errors.Incomplete) as error:
        reshard.open(dcp)
    assert isinstance(error.value, reshard.ReshardError)
    assert error.value.hint


def test_merge_says_what_it_did(tmp_path: Path) -> None:
    merged = reshard.merge(EXAMPLES / "run", tmp_path / "out", base=str(EXAMPLES / "base"))
    assert (merged.output, merged.format, merged.step) == (tmp_path / "out", "dcp", 10)
    assert (merged.num_tensors, merged.num_checked) == (21, 84)
    assert merged.notices
    assert equals(tmp_path / "out", load_file(EXAMPLES.parent / "tests/data/example_truth.safetensors"))


def test_merge_reports_progress_by_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []
    merged = reshard.merge(
        EXAMPLES / "run", tmp_path / "out.safetensors", progress=lambda nbytes, fqn: seen.append((nbytes, fqn))
    )
    assert sum(nbytes for nbytes, _ in seen) <= merged.nbytes
    assert {fqn for _, fqn in seen} >= {"lm_head.weight"}


def test_inspect_and_verify_answer_with_values(tmp_path: Path) -> None:
    found = reshard.inspect(EXAMPLES / "run")
    assert (found.writer, found.world_size, found.complete) == ("accelerate (FSDP)", 4, True)
    reshard.merge(EXAMPLES / "run", tmp_path / "out")
    assert reshard.verify(tmp_path / "out", against=EXAMPLES / "run").ok
    with (tmp_path / "out/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert len(reshard.verify(tmp_path / "out").problems) == 1


def test_models_that_options_name_may_be_paths_and_sizes_numbers(tmp_path: Path) -> None:
    base = EXAMPLES / "base"
    reshard.merge(EXAMPLES / "run", tmp_path / "model", base=base, max_shard_size=100_000)
    reshard.convert(
        EXAMPLES / "run", tmp_path / "nemo", to="nemo2", hf_model=base, tokenizer_path=base, max_shard_size=10**9
    )
    reshard.convert(tmp_path / "nemo", tmp_path / "back", to="hf", max_shard_size=100_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert reshard.verify(tmp_path / "model", against=EXAMPLES / "run").ok
    assert reshard.verify(tmp_path / "nemo", against=EXAMPLES / "run").ok


def test_average_takes_checkpoints_of_any_formats(tmp_path: Path) -> None:
    one, two = workspace.state_of(seed=1), workspace.state_of(seed=2)
    workspace.write_rank_files(tmp_path / "one", one)
    write_dcp(tmp_path / "two", two, prefix=("model",))
    reshard.average([tmp_path / "one", tmp_path / "two"], tmp_path / "mean.safetensors", weights=[1, 3])
    found = load_file(tmp_path / "mean.safetensors")
    for fqn in one:
        expected = ((one[fqn].double() + 3 * two[fqn].double()) / 4).float()
        assert torch.allclose(found[fqn], expected, rtol=1e-6, atol=0) or same(found[fqn], expected)


def test_an_option_that_does_not_exist_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        reshard.merge(EXAMPLES / "run", tmp_path / "out", dtyp="bfloat16")
    assert list(tmp_path.iterdir()) == []
