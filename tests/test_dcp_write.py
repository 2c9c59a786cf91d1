"""DCP directories that are written: torch's own writer and loaders are the judges."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from checkpoints import same
from megatron_ranks import on_ranks
from reshard.core.dtypes import dtype
from reshard.core.tensor import Filled, Tensor
from reshard.errors import Incomplete, Unsupported
from reshard.formats import dcp
from reshard.formats.dcp_write import ByteItem, instance, plan
from reshard.storage.manifest import verify
from reshard.storage.plan import FilePlan
from reshard.storage.unpickle import Global
from written import literal, literals, write

KINDS = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.uint16, torch.complex64),
)


def noise(*shape: int, kind: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Any bits, NaNs among them; for bool such as it has."""
    draw = torch.Generator().manual_seed(seed)
    top = 2 if kind is torch.bool else 256
    nbytes = torch.empty(shape).numel() * kind.itemsize
    return torch.randint(0, top, (nbytes,), dtype=torch.uint8, generator=draw).view(kind).reshape(shape)


def state() -> dict[str, Any]:
    """Every kind of tensor, no dimension, no element, names with dots, and objects among them."""
    tensors = {str(kind): noise(5, 3, kind=kind, seed=i) for i, kind in enumerate(KINDS)}
    return {
        "model": {"model.layers.0.weight": noise(7, 4), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)},
        "kinds": tensors,
        "step": 12,
        "notes": {"name": "run", "betas": (0.9, 0.95), "sizes": [1, 2, 3], "nothing": None, "raw": b"\0\xff"},
    }


def flat() -> tuple[dict[str, Tensor | ByteItem], dict[str, tuple[str | int, ...]]]:
    """What of `state` is planned: entries by FQN, and their paths."""
    paths = {".".join((top, key)): (top, key) for top in ("model", "kinds", "notes") for key in state()[top]}
    paths["step"] = ("step",)
    entries: dict[str, Tensor | ByteItem] = {}
    for top, values in state().items():
        for key, value in values.items() if isinstance(values, dict) else [(None, values)]:
            name = top if key is None else f"{top}.{key}"
            entries[name] = literal(value) if isinstance(value, torch.Tensor) else ByteItem(value)
    return entries, paths


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    entries, paths = flat()
    return write(plan(entries, paths=paths), tmp_path_factory.mktemp("dcp") / "ours")


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dcp") / "theirs"
    with quiet():
        torch_dcp.save(state(), checkpoint_id=str(path), no_dist=True)
    return path


class quiet(warnings.catch_warnings):
    """torch warns of a single process, and of its own use of TypedStorage."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


def metadata(path: Path) -> Any:
    return pickle.loads((path / ".metadata").read_bytes())


def test_the_shard_file_is_the_one_that_torch_writes(written: Path, by_torch: Path) -> None:
    assert (written / "__0_0.distcp").read_bytes() == (by_torch / "__0_0.distcp").read_bytes()


def test_the_metadata_say_what_torchs_say(written: Path, by_torch: Path) -> None:
    ours, theirs = metadata(written), metadata(by_torch)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data
    assert ours.version == theirs.version
    assert ours.storage_meta == type(ours.storage_meta)()


def test_no_two_tensors_share_what_a_loader_changes(written: Path) -> None:
    described = [v for v in metadata(written).state_dict_metadata.values() if hasattr(v, "chunks")]
    assert len({id(v) for v in described}) == len({id(v.chunks) for v in described}) == len(described)


def test_torch_loads_every_tensor_and_object(written: Path) -> None:
    wanted = state()
    found = {
        "model": {k: torch.zeros_like(v) for k, v in wanted["model"].items()},
        "kinds": {k: torch.zeros_like(v) for k, v in wanted["kinds"].items()},
        "step": 0,
        "notes": dict.fromkeys(wanted["notes"]),
    }
    with quiet():
        torch_dcp.load(found, checkpoint_id=str(written), no_dist=True)
    assert all(same(found["model"][k], v) for k, v in wanted["model"].items())
    assert all(same(found["kinds"][k], v) for k, v in wanted["kinds"].items())
    assert (found["step"], found["notes"]) == (wanted["step"], wanted["notes"])


def test_torch_turns_it_into_the_nested_file_it_would_have_saved(written: Path, tmp_path: Path) -> None:
    with quiet():
        dcp_to_torch_save(written, tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert same(found["model"]["model.layers.0.weight"], state()["model"]["model.layers.0.weight"])
    assert found["notes"] == state()["notes"]


def test_the_reader_opens_it_again(written: Path) -> None:
    checkpoint = dcp.open(written)
    entries, paths = flat()
    assert [*checkpoint.tensors, *checkpoint.objects] == [
        *(name for name, entry in entries.items() if isinstance(entry, Tensor)),
        *(name for name, entry in entries.items() if isinstance(entry, ByteItem)),
    ]
    assert {name: checkpoint.path(name) for name in entries} == paths
    assert checkpoint.objects["notes.betas"] == (0.9, 0.95)
    assert checkpoint["kinds.torch.float32"].numpy().tobytes() == noise(5, 3).numpy().tobytes()


def test_its_manifest_verifies(written: Path) -> None:
    found = verify(written)
    assert (found.problems, found.num_tensors) == ((), sum(isinstance(e, Tensor) for e in flat()[0].values()))


def test_a_largest_size_makes_several_files(tmp_path: Path) -> None:
    tensors = {f"layers.{i}": noise(64, 4, seed=i) for i in range(5)}
    files = plan({"step": ByteItem(3), **literals(tensors)}, directory="iter", max_file_nbytes=6000)
    assert [(f.path, f.nbytes <= 6000) for f in files[:-1]] == [(f"iter/__0_{i}.distcp", True) for i in range(3)]
    found = {name: torch.zeros_like(t) for name, t in tensors.items()} | {"step": 0}
    with quiet():
        torch_dcp.load(found, checkpoint_id=str(write(files, tmp_path / "run") / "iter"), no_dist=True)
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
    assert found["step"] == 3


def test_a_tensor_larger_than_a_file_may_be_gets_its_own() -> None:
    files = plan(literals({"a": noise(2), "b": noise(9999), "c": noise(2)}), max_file_nbytes=4000)
    assert [f.path for f in files] == ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp", ".metadata"]


def test_places_beyond_4_gib_are_exact() -> None:
    large = {f"layers.{i}": Filled(dtype("bfloat16"), (1 << 20, 1 << 12), bytes(2)) for i in range(3)}
    data, described = plan(large)
    info = pickle.loads(payload(described)).storage_data.values()
    assert [i.offset for i in info] == [0, info_end(info, 0), info_end(info, 1)]
    assert info_end(info, 2) == data.nbytes > 3 << 33


def payload(file: FilePlan) -> bytes:
    (segment,) = file.segments
    assert isinstance(segment.payload, bytes)
    return segment.payload


def info_end(info: Any, number: int) -> int:
    entry = list(info)[number]
    end: int = entry.offset + entry.length
    return end


def test_without_paths_the_metadata_are_those_of_a_flat_state_dict() -> None:
    *_, described = plan(literals({"a.b": noise(2)}))
    assert pickle.loads(payload(described)).planner_data is None


def test_objects_of_other_libraries_are_written_by_their_name(tmp_path: Path) -> None:
    import argparse

    made = instance(Global("argparse", "Namespace"), {"num_layers": 2, "lr": 1e-4})
    write(plan({"args": ByteItem(made), "a": literal(noise(2))}), tmp_path / "out")
    found = {"args": None, "a": torch.zeros(2)}
    with quiet():
        torch_dcp.load(found, checkpoint_id=str(tmp_path / "out"), no_dist=True)
    assert found["args"] == argparse.Namespace(num_layers=2, lr=1e-4)


def test_objects_may_hold_tensors(tmp_path: Path) -> None:
    value = {"state": [noise(3), torch.zeros(0, dtype=torch.uint8)], "pair": (noise(2, 2, seed=1), "text")}
    held = {"state": [literal(t) for t in value["state"]], "pair": (literal(value["pair"][0]), "text")}
    write(plan({"a": literal(noise(4)), "held": ByteItem(held)}), tmp_path / "out")
    found = {"held": None, "a": torch.zeros(4)}
    with quiet():
        torch_dcp.load(found, checkpoint_id=str(tmp_path / "out"), no_dist=True)
    assert all(same(a, b) for a, b in zip(found["held"]["state"], value["state"], strict=True))
    assert same(found["held"]["pair"][0], value["pair"][0])
    assert same(found["a"], noise(4))


def test_nothing_to_write_is_an_error() -> None:
    with pytest.raises(Incomplete, match="nothing to write into iter_0000001"):
        plan({}, directory="iter_0000001")


def test_what_torch_cannot_save_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"layers\.0: qint8 is not written"):
        plan({"layers.0": Filled(dtype("qint8"), (2,), bytes(1))})
    with pytest.raises(Unsupported, match=r"shard files of 0 bytes"):
        plan(literals({"a": noise(2)}), max_file_nbytes=0)


# ---------------------------------------------------------------------------------------------------------- DTensors


def load_as_dtensors(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """On one rank: each tensor as a shard of rows, of columns, and as a copy; their parts by placement and name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, zeros

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    found: dict[str, Any] = {}
    for what, placement in (("rows", Shard(0)), ("columns", Shard(1)), ("copy", Replicate())):
        wanted = {name: zeros(*shape, device_mesh=mesh, placements=[placement]) for name, shape in shapes.items()}
        torch_dcp.load(wanted, checkpoint_id=str(directory))
        found[what] = {name: tensor.full_tensor() for name, tensor in wanted.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_load_their_shards_of_it(num_ranks: int, tmp_path: Path) -> None:
    tensors = {"even": noise(8, 4), "uneven": noise(7, 5, seed=1), "few": noise(2, 9, seed=2)}
    write(plan(literals(tensors)), tmp_path / "out")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for found in on_ranks(load_as_dtensors, tmp_path / "out", shapes, num_ranks=num_ranks, has_megatron=False):
        assert all(same(found[what][name], tensor) for what in found for name, tensor in tensors.items())
