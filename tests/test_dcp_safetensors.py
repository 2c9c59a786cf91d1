"""torch's sharded safetensors: files by torch's own writer, and what is missing or contradicts itself."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reshard.core.checkpoint import Checkpoint
from reshard.errors import Corrupt, Incomplete, NotFound, ReshardError
from reshard.formats import dcp_safetensors

WRITER = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from safetensors.torch import save_file

def rank_main(rank, out):
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=3)
    mesh = init_device_mesh("cpu", (3,))
    torch.manual_seed(0)
    whole = {
        "rows": torch.randn(7, 4), "columns": torch.randn(2, 5).bfloat16(), "short": torch.randn(1, 3),
        "copies": torch.randn(3, 3), "scalar": torch.tensor(2.5), "bias": torch.randn(9),
        "fp8": torch.randn(6, 2).to(torch.float8_e4m3fn),
    }
    cuts = {"columns": Shard(1), "copies": Replicate(), "scalar": Replicate()}
    state = {}
    for name, tensor in whole.items():
        bits = tensor.view(torch.uint8) if name == "fp8" else tensor
        state[name] = distribute_tensor(bits, mesh, [cuts.get(name, Shard(0))])
    state["fp8"] = torch.distributed.tensor.DTensor.from_local(
        state["fp8"].to_local().view(torch.float8_e4m3fn), mesh, [Shard(0)], shape=(6, 2), stride=(2, 1))
    state["plain"] = whole["plain"] = torch.arange(5)
    indices = {name: 1 + (i % 2) for i, name in enumerate(sorted(state))}
    for case, how in (("one", {}), ("two", {"fqn_to_index_mapping": indices})):
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(f"{out}/{case}", save_distributed=True, **how))
    if rank == 0:
        save_file(whole, f"{out}/truth.safetensors")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(rank_main, args=(sys.argv[1],), nprocs=3, start_method="fork")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories `one` and `two` (model files) by three gloo processes, and `truth.safetensors`."""
    directory = tmp_path_factory.mktemp("written")
    subprocess.run([sys.executable, "-W", "ignore", "-c", WRITER, str(directory)], check=True, capture_output=True)
    return directory


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_holds(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    assert {*checkpoint} == {*expected}
    for name, tensor in expected.items():
        mine = checkpoint.tensors[name]
        assert (mine.dtype.torch, mine.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape)), name
        assert mine.read(checkpoint.source).tobytes() == bits(tensor), name


def put(
    directory: Path,
    rank: int,
    parts: Mapping[str, tuple[torch.Tensor, list[int]]],
    *,
    model: tuple[int, int] = (1, 1),
    **metadata: str,
) -> None:
    """A shard file as torch writes it: parts and their offsets."""
    info = json.dumps({name: {"saved_offsets": offsets} for name, (_, offsets) in parts.items()})
    directory.mkdir(exist_ok=True)
    save_file(
        {name: tensor for name, (tensor, _) in parts.items()},
        directory / f"shard-{rank:05d}-model-{model[0]:05d}-of-{model[1]:05d}.safetensors",
        {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": info} | metadata,
    )


@pytest.mark.parametrize("case", ["one", "two"])
def test_what_torch_wrote_is_read_bit_for_bit(written: Path, case: str) -> None:
    checkpoint = dcp_safetensors.open(written / case)
    assert_holds(checkpoint, load_file(written / "truth.safetensors"))
    assert checkpoint.origin.world_size == 3
    assert {"Shard(0) x 3 (3 tensors)", "Shard(1) x 3 (1 tensors)"} <= {*checkpoint.origin.placements}
    assert dcp_safetensors.matches(frozenset(p.name for p in (written / case).iterdir()))


def test_shards_of_a_consolidated_checkpoint_are_found_beside_it(tmp_path: Path) -> None:
    put(tmp_path / "sharded", 1, {"w": (torch.ones(2), [0])})
    assert_holds(dcp_safetensors.open(tmp_path), {"w": torch.ones(2)})
    with pytest.raises(NotFound):
        dcp_safetensors.open(tmp_path / "nowhere")


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_a_missing_shard_is_missed(tmp_path: Path, gone: int) -> None:
    for rank in (1, 2, 3):
        if rank != gone:
            part = torch.full((2 if rank < 3 else 1, 2), float(rank))
            put(tmp_path, rank, {"w": (part, [2 * rank - 2, 0]), f"only{rank}": (torch.ones(1), [0])})
    if gone < 3:
        with pytest.raises(Incomplete, match=rf"2 shard files are there, none of shard-0000{gone}-\*"):
            dcp_safetensors.open(tmp_path)
    else:  # nothing in the others says that there was one more
        assert dcp_safetensors.open(tmp_path).tensors["w"].shape == (4, 2)


def test_a_missing_model_file_is_missed(tmp_path: Path) -> None:
    put(tmp_path, 1, {"a": (torch.ones(2), [0])}, model=(1, 3))
    put(tmp_path, 1, {"b": (torch.ones(2), [0])}, model=(3, 3))
    with pytest.raises(Incomplete, match=r"model-00002-of-00003"):
        dcp_safetensors.open(tmp_path)


def test_shards_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    put(tmp_path, 1, {"a": (torch.ones(2), [0])}, model=(1, 1))
    put(tmp_path, 1, {"b": (torch.ones(2), [0])}, model=(1, 2))
    with pytest.raises(Corrupt, match="models in 1, 2 files"):
        dcp_safetensors.open(tmp_path)


def test_parts_that_leave_a_hole_or_overlap_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "hole", 1, {"w": (torch.ones(2, 2), [0, 0])})
    put(tmp_path / "hole", 2, {"w": (torch.ones(2, 2), [4, 0])})
    with pytest.raises(Incomplete, match="w: 4 of 12 elements"):
        dcp_safetensors.open(tmp_path / "hole")
    put(tmp_path / "lap", 1, {"w": (torch.ones(2, 2), [0, 0])})
    put(tmp_path / "lap", 2, {"w": (torch.ones(2, 2), [1, 0])})
    with pytest.raises(Corrupt, match="w: chunks overlap"):
        dcp_safetensors.open(tmp_path / "lap")


def test_an_empty_part_shows_how_far_a_tensor_reaches(tmp_path: Path) -> None:
    put(tmp_path, 1, {"w": (torch.ones(2, 2), [0, 0])})
    put(tmp_path, 2, {"w": (torch.ones(0, 2), [5, 0])})
    with pytest.raises(Incomplete, match="w: 6 of 10 elements"):
        dcp_safetensors.open(tmp_path)
    put(tmp_path, 2, {"w": (torch.ones(0, 2), [2, 0])})
    assert dcp_safetensors.open(tmp_path).tensors["w"].shape == (2, 2)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"DCP_SHARDING_INFO": "{}"}, "places 0 tensors and holds 1: w"),
        ({"DCP_SHARDING_INFO": "["}, "DCP_SHARDING_INFO in the header"),
        ({"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [0, 0]}}'}, r"w: a part of shape \[2\] at \[0, 0\]"),
        ({"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [-1]}}'}, r"w: a part of shape \[2\] at \[-1\]"),
        ({"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [1e9]}}'}, "DCP_SHARDING_INFO in the header"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path: Path, metadata: Any, message: str) -> None:
    put(tmp_path, 1, {"w": (torch.ones(2), [0])}, **metadata)
    with pytest.raises(Corrupt, match=message):
        dcp_safetensors.open(tmp_path)


def test_shards_that_do_not_say_where_they_belong_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(Corrupt, match="does not say which parts"):
        dcp_safetensors.open(tmp_path)


def test_parts_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    put(tmp_path, 1, {"w": (torch.ones(2), [0])})
    put(tmp_path, 2, {"w": (torch.ones(2).half(), [2])})
    with pytest.raises(Corrupt, match="w is F16"):
        dcp_safetensors.open(tmp_path)


def test_automodels_config_is_found_and_its_list_of_names_is_held_against_the_shards(tmp_path: Path) -> None:
    put(tmp_path, 1, {"w": (torch.ones(2), [0])})
    beside = tmp_path / ".hf_metadata"
    beside.mkdir()
    (beside / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    (beside / "tokenizer.json").write_text("{}")
    mapping = beside / "fqn_to_file_index_mapping.json"
    mapping.write_text('{"w": 1, "lm_head.weight": 1}')  # tied: not saved
    checkpoint = dcp_safetensors.open(tmp_path)
    assert dict(checkpoint.config or {})["model_type"] == "llama"
    assert list(checkpoint.assets) == ["tokenizer.json"]
    mapping.write_text('{"w": 1, "v": 1}')
    with pytest.raises(Incomplete, match="1 tensors that are in no shard: v"):
        dcp_safetensors.open(tmp_path)


def test_a_damaged_shard_is_an_error_that_names_it_or_a_checkpoint_of_other_names_and_values(tmp_path: Path) -> None:
    put(tmp_path, 1, {"w": (torch.ones(2, 2), [0, 0])})
    put(tmp_path, 2, {"w": (torch.ones(2, 2), [2, 0])})
    path = tmp_path / "shard-00002-model-00001-of-00001.safetensors"
    data, chance = path.read_bytes(), random.Random(0)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            checkpoint = dcp_safetensors.open(tmp_path)
            for tensor in checkpoint.tensors.values():
                tensor.read(checkpoint.source)
        except ReshardError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
    for nbytes in range(0, len(data), 5):
        path.write_bytes(data[:nbytes])
        with pytest.raises(ReshardError, match=path.name):
            dcp_safetensors.open(tmp_path)
