"""One file a rank: DTensors that torch wrote on every rank of a mesh, and real files of other releases."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import safetensors
import torch

from reshard.core.checkpoint import Checkpoint
from reshard.dialects.shapes import parameter_shapes
from reshard.errors import Corrupt, Incomplete, InputError, Mismatch, NotFound, ReshardError, Unsupported
from reshard.formats import rank_files, torch_save
from reshard.storage.files import Files, Ledger, Reader

DATA = Path(__file__).parent / "data" / "torch"

WRITER = """
import os, sys, torch, torch.distributed as dist
import torch._dynamo, torch._inductor  # which every process would import by itself otherwise, for a second each
from collections import OrderedDict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

out = sys.argv[1]

def noise(shape, kind=torch.float32):
    numel = 1
    for n in shape:
        numel *= n
    top = 2 if kind is torch.bool else 256
    return torch.randint(0, top, (numel * kind.itemsize,), dtype=torch.uint8, generator=draw).view(kind).reshape(shape)

def save(sizes, names, name, states):
    global draw
    world = 1
    for n in sizes:
        world *= n
    for rank in range(world):
        if os.fork():  # torch caches meshes by their hash, which is the same on all ranks
            assert os.wait()[1] == 0
            continue
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        draw = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        state, whole = states(mesh)
        torch.save(state, f"{out}/{name.format(world=world, rank=rank)}")
        if rank == 0:
            torch.save(whole, f"{out}/truth.pth")
        os._exit(0)

def put(mesh, tensor, *placements):
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

def zoo(mesh):
    state, whole = OrderedDict(), OrderedDict()
    families = {
        "rows_columns": (Shard(0), Shard(1)),
        "rows_rows": (Shard(0), Shard(0)),
        "columns_rows": (Shard(-1), Shard(0)),
        "hybrid": (Replicate(), Shard(0)),
        "copies": (Replicate(), Replicate()),
        "strided": (_StridedShard(0, split_factor=2), Shard(0)),
        "lone_strided": (_StridedShard(1, split_factor=3), Replicate()),
    }
    for family, placements in families.items():
        for shape in [(8, 6), (7, 5), (1, 3), (0, 4), (17, 2)]:
            name = f"{family}.{shape[0]}x{shape[1]}"
            whole[name] = noise(shape)
            state[name] = put(mesh, whole[name], *placements)
    for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64, torch.uint16):
        name = str(kind)
        whole[name] = noise((5, 3), kind)
        local = put(mesh, whole[name].view(torch.uint8).reshape(5, 3, -1), Shard(0), Shard(1)).to_local()
        local = local.contiguous().view(kind).reshape(local.shape[:2])
        how = {"shape": (5, 3), "stride": (3, 1), "run_check": False}
        state[name] = DTensor.from_local(local, mesh, (Shard(0), Shard(1)), **how)
    whole["scalar"] = torch.tensor(2.5)
    state["scalar"] = put(mesh, whole["scalar"], Replicate(), Replicate())
    whole["submesh"] = noise((9, 2))
    state["submesh"] = put(mesh["tp"], whole["submesh"], Shard(0))
    whole["flattened"] = noise((9, 2))
    state["flattened"] = put(mesh["dp", "tp"]._flatten("all"), whole["flattened"], Shard(0))
    whole["transposed"] = noise((6, 4)).T
    state["transposed"] = put(mesh, whole["transposed"], Shard(0), Replicate())
    whole["parameter"] = noise((4, 4))
    state["parameter"] = torch.nn.Parameter(put(mesh, whole["parameter"], Shard(0), Shard(1)))
    whole["tied"], state["tied"] = whole["parameter"], state["parameter"]
    whole["buffer"] = state["buffer"] = noise((3,), torch.int64)
    return state, whole

def fsdp_over_tp(mesh):
    model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Linear(9, 7))
    whole = OrderedDict((k, v.detach().clone()) for k, v in model.state_dict().items())
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()}, src_data_rank=None)
    fully_shard(model, mesh=mesh["dp"])
    return model.state_dict(), whole

LIES = {
    "coordinate": lambda w: w._spec.mesh.__dict__.update(_coordinate_on_dim=(7, 0)),
    "coordinates": lambda w: w._spec.mesh.__dict__.update(_coordinate_on_dim=(0,)),
    "huge_coordinate": lambda w: w._spec.mesh.__dict__.update(_coordinate_on_dim=(1 << 80, 0)),
    "text_for_coordinate": lambda w: w._spec.mesh.__dict__.update(_coordinate_on_dim="no"),
    "placements": lambda w: w._spec.__dict__.update(placements=w._spec.placements[:1]),
    "no_placements": lambda w: w._spec.__dict__.update(placements=None),
    "tensor_meta": lambda w: w._spec.__dict__.update(tensor_meta=w._spec.tensor_meta._replace(shape=(9, 9))),
    "shard_order": lambda w: w._spec.__dict__.update(shard_order=(3,)),
    "local": lambda w: setattr(w, "_local_tensor", torch.zeros(1, 1)),
    "no_local": lambda w: setattr(w, "_local_tensor", None),
    "no_spec": lambda w: setattr(w, "_spec", None),
}

def lies(mesh):
    rank = mesh.get_rank()
    for name, lie in LIES.items():
        w = put(init_device_mesh("cpu", (2, 2)), noise((8, 6)), Shard(0), Shard(0))
        lie(w)
        os.makedirs(f"{out}/{name}", exist_ok=True)
        torch.save({"w": w}, f"{out}/{name}/model_world_size_4_rank_{rank}.pt")
    return {}, {}

def partial(mesh):
    return {"sum": DTensor.from_local(torch.ones(3), mesh, (Partial(), Replicate()), run_check=False)}, {}

def pipeline(mesh):
    stage = mesh.get_local_rank("pp")
    whole = OrderedDict((f"layers.{i}.weight", noise((5, 3))) for i in range(3))
    mine = {k: put(mesh["dp"], v, Shard(0)) for i, (k, v) in enumerate(whole.items()) if min(i, 1) == stage}
    return mine, whole

NAME = "model_world_size_{world}_rank_{rank}.pt"
for case, *how in [
    ("zoo", (2, 3), ("dp", "tp"), NAME, zoo),
    ("zoo_4", (2, 2), ("dp", "tp"), "pytorch_model_fsdp_0_rank{rank}.bin", zoo),
    ("fsdp_over_tp", (4, 2), ("dp", "tp"), NAME, fsdp_over_tp),
    ("lies", (2, 2), ("dp", "tp"), NAME, lies),
    ("partial", (2, 1), ("dp", "tp"), NAME, partial),
    ("pipeline", (2, 2), ("pp", "dp"), NAME, pipeline),
]:
    out = f"{sys.argv[1]}/{case}"
    os.mkdir(out)
    save(*how)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of files that torch writes, each file by a process that is one rank of a mesh."""
    directory = tmp_path_factory.mktemp("written")
    subprocess.run([sys.executable, "-W", "ignore", "-c", WRITER, str(directory)], check=True)
    return directory


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_is_truth(checkpoint: Checkpoint, directory: Path) -> None:
    """Every tensor of `truth.pth`, bit for bit, and no other."""
    truth = torch.load(directory / "truth.pth", weights_only=True)
    assert {*checkpoint} == {*truth}
    for name, tensor in truth.items():
        mine = checkpoint.tensors[name]
        assert (mine.dtype.torch, mine.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape)), name
        assert mine.read(checkpoint.source).tobytes() == bits(tensor), name


def truth(path: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shapes and bytes of a safetensors file, by the library."""
    return {name: (tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(path.read_bytes())}


def contents(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {n: (t.shape, t.read(checkpoint.source).tobytes()) for n, t in checkpoint.tensors.items()}


def copied(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target, ignore=shutil.ignore_patterns("truth*")))


# ------------------------------------------------------------------------------------------------------------- DTensor


@pytest.mark.parametrize("case", ["zoo", "zoo_4", "fsdp_over_tp"])
def test_every_placement_on_every_rank_gives_the_tensor_back(written: Path, case: str) -> None:
    checkpoint = rank_files.open(written / case, verify=True)
    assert_is_truth(checkpoint, written / case)
    assert checkpoint.notices == ()


def test_parameters_of_pipeline_stages_come_from_the_ranks_that_have_them(written: Path) -> None:
    assert_is_truth(rank_files.open(written / "pipeline", verify=True), written / "pipeline")


def test_tied_weights_are_one_node(written: Path) -> None:
    checkpoint = rank_files.open(written / "zoo")
    assert checkpoint.tensors["tied"] is checkpoint.tensors["parameter"]


def test_the_origin_says_how_tensors_were_cut(written: Path) -> None:
    origin = rank_files.open(written / "fsdp_over_tp").origin
    assert origin.world_size == 8
    assert "StridedShard(0) x dp=4, Shard(0) x tp=2 (2 tensors)" in origin.placements
    assert [file.name for file in origin.files] == [f"model_world_size_8_rank_{rank}.pt" for rank in range(8)]


def test_any_file_of_a_set_stands_for_the_set(written: Path) -> None:
    one = rank_files.open(written / "zoo" / "model_world_size_6_rank_4.pt")
    assert contents(one) == contents(rank_files.open(written / "zoo"))


def test_one_file_alone_lists_its_tensors_and_refuses_shares(written: Path) -> None:
    path = written / "zoo" / "model_world_size_6_rank_0.pt"
    checkpoint = torch_save.open(path)
    assert checkpoint.tensors["rows_rows.8x6"].shape == (8, 6)
    assert checkpoint["copies.8x6"].numpy().shape == (8, 6)
    with pytest.raises(Unsupported, match="one rank's share of a DTensor") as caught:
        checkpoint["rows_rows.8x6"].numpy()
    assert "directory" in str(caught.value.hint)


def test_partial_sums_are_refused(written: Path) -> None:
    with pytest.raises(Unsupported, match="sum: its placement is Partial"):
        rank_files.open(written / "partial")


@pytest.mark.parametrize("release", ["2.2.2", "2.4.1", "2.15.0"])
def test_files_of_other_torch_releases_are_read(release: str) -> None:
    directory = DATA / f"rank_files_{release}"
    assert contents(rank_files.open(directory, verify=True)) == truth(directory / "truth.safetensors")


@pytest.mark.parametrize("name", ["fsdp1_sharded_2.2.2", "uneven_fsdp_tp_2.13.0"])
def test_sharded_tensors_and_uneven_tensor_parallel_shards_are_read(name: str) -> None:
    assert contents(rank_files.open(DATA / name, verify=True)) == truth(DATA / name / "truth.safetensors")


# ------------------------------------------------------------------------------------------------------------ replicas


def test_replicas_that_differ_are_found_by_verify(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": torch.arange(3) + rank, "n": torch.ones(2)}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    first = rank_files.open(tmp_path)
    assert first["w"].numpy().tolist() == [0, 1, 2]
    assert first.notices == ()
    assert rank_files.open(tmp_path, verify=True).notices == ("not the same on all ranks; rank 0's is given: w",)


def test_sharded_replicas_that_differ_are_an_error_under_verify(written: Path, tmp_path: Path) -> None:
    directory = copied(written / "zoo", tmp_path / "copy")
    path = directory / "model_world_size_6_rank_5.pt"
    data = bytearray(path.read_bytes())
    local = torch_save.read(path).value["hybrid.8x6"].attr("_local_tensor")
    extent = torch_save.read(path).extent(local.storage)
    data[extent.offset] ^= 1
    path.write_bytes(data)
    rank_files.open(directory)
    with pytest.raises(Corrupt, match="CRC-32"):
        rank_files.open(directory, verify=True)


def test_plain_tensors_of_different_shapes_are_noted_without_verify(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"rng": torch.zeros(3 + rank)}, tmp_path / f"extra_state_world_size_2_rank_{rank}.pt")
    checkpoint = rank_files.open(tmp_path, "extra_state")
    assert checkpoint.tensors["rng"].shape == (3,)
    assert "rank 0's is given: rng" in checkpoint.notices[0]


# ------------------------------------------------------------------------------------------------- flattened parameters


def test_runs_of_flattened_parameters_are_joined_and_shaped(tmp_path: Path) -> None:
    directory = DATA / "fsdp1_local_2.13.0"
    expected = truth(directory / "truth.safetensors")
    checkpoint = rank_files.open(directory, verify=True)
    flats = rank_files.flat(checkpoint)
    assert len(flats) == 18
    assert "layers.0.cnt" not in flats
    assert any("their shapes are not stored" in notice for notice in checkpoint.notices)
    shaped = rank_files.shaped(checkpoint, {name: shape for name, (shape, _) in expected.items()})
    assert contents(shaped) == expected
    assert rank_files.flat(shaped) == ()


def test_shapes_that_do_not_fit_are_all_listed() -> None:
    checkpoint = rank_files.open(DATA / "fsdp1_local_2.13.0")
    shapes = {name: checkpoint.tensors[name].shape for name in rank_files.flat(checkpoint)}
    wrong = shapes | {"embed.weight": (3, 3), "lm_head.weight": (1,)}
    with pytest.raises(Mismatch, match=r"embed.weight \(800 elements, \[3, 3\] wanted\), lm_head.weight \(800"):
        rank_files.shaped(checkpoint, wrong)
    with pytest.raises(Mismatch, match="no shape for 1 of 18 flat parameters: embed"):
        rank_files.shaped(checkpoint, {name: shape for name, shape in shapes.items() if name != "embed.weight"})


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore")
def test_shapes_from_a_config_are_those_that_transformers_builds(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 30, "tie_word_embeddings": False}
    experts = {"num_local_experts": 3, "num_experts": 3, "moe_intermediate_size": 10}
    takes = experts if "mixtral" in model_type or "moe" in model_type else {}
    for bias in (False, True):
        config = transformers.AutoConfig.for_model(model_type, **sizes, **more, **takes, attention_bias=bias)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        said = parameter_shapes(config.to_dict())
        assert {n: said.get(n) for n, _ in model.named_parameters()} == {
            n: tuple(p.shape) for n, p in model.named_parameters()
        }
        if not takes:
            assert {*said} == {n for n, _ in model.named_parameters()}


def test_shapes_of_other_models_are_refused() -> None:
    with pytest.raises(Unsupported, match="gpt2"):
        parameter_shapes({"model_type": "gpt2"})
    with pytest.raises(Mismatch, match="hidden_size"):
        parameter_shapes({"model_type": "llama", "vocab_size": 3})


# --------------------------------------------------------------------------------------------------------------- names


def names(stem: str, world: int, ranks: Iterable[int]) -> list[str]:
    return [f"{stem}_world_size_{world}_rank_{rank}.pt" for rank in ranks]


def test_sets_of_rank_files_are_told_apart() -> None:
    listing = [
        *names("model", 12, range(12)),
        *names("optim", 12, range(11)),
        "pytorch_model_fsdp_0_rank0.bin",
        "pytorch_model_fsdp_0_rank2.bin",
        "optimizer_0_rank0.bin",
        "eval.rank_0.pth",
        "config.json",
        "model_rank_0.pt",
    ]
    found = {g.stem: (g.kind, g.world_size, g.missing, g.is_complete) for g in rank_files.groups(listing)}
    assert found == {
        "model": ("model", 12, (), True),
        "optim": ("optimizer", 12, (11,), False),
        "pytorch_model_fsdp_0": ("model", None, (1,), False),
        "optimizer_0": ("optimizer", None, (), True),
        "eval": ("model", None, (), True),
    }
    (model,) = [g for g in rank_files.groups(listing) if g.stem == "model"]
    assert list(model.files) == list(range(12))  # by number, not as text


def test_missing_ranks_are_named() -> None:
    with pytest.raises(Incomplete, match=r"model_world_size_8 \(5 of 8 ranks\): ranks 1, 6, 7 missing"):
        rank_files.choose(Path("d"), names("model", 8, (0, 2, 3, 4, 5)))


def test_the_complete_set_is_taken_and_stale_files_are_mentioned() -> None:
    group, notices = rank_files.choose(Path("d"), names("model", 8, range(3)) + names("model", 4, range(4)))
    assert group.world_size == 4
    assert "left aside: model_world_size_8 (3 of 8 ranks)" in notices[0]


def test_two_complete_sets_are_ambiguous() -> None:
    listing = names("model", 2, range(2)) + names("model", 4, range(4))
    with pytest.raises(InputError, match="2 complete sets of model files"):
        rank_files.choose(Path("d"), listing)
    both = ["pytorch_model_fsdp_0_rank0.bin", "pytorch_model_fsdp_1_rank0.bin"]
    with pytest.raises(InputError) as caught:
        rank_files.choose(Path("d"), both)
    assert "beginning of its name" in str(caught.value.hint)
    assert rank_files.choose(Path("d"), both, "pytorch_model_fsdp_1")[0].files == {0: both[1]}


def test_a_kind_that_is_not_there_is_not_found() -> None:
    with pytest.raises(NotFound, match=r"no optim files of ranks; there are model_world_size_2 \(2 of 2 ranks\)"):
        rank_files.choose(Path("d"), names("model", 2, range(2)), "optim")
    with pytest.raises(NotFound, match="there are no rank files"):
        rank_files.choose(Path("d"), ["config.json"])


def test_optimizer_files_are_opened_by_either_name(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"state": {0: {"step": torch.tensor(3.0)}}}, tmp_path / f"optim_world_size_2_rank_{rank}.pt")
    for kind in ("optim", "optimizer"):
        assert list(rank_files.open(tmp_path, kind)) == ["state.0.step"]


def test_ranks_that_only_the_tensors_know_of_are_missed(written: Path, tmp_path: Path) -> None:
    directory = copied(written / "zoo_4", tmp_path / "copy")
    (directory / "pytorch_model_fsdp_0_rank3.bin").unlink()
    with pytest.raises(Incomplete, match=re.escape(str(directory))):
        rank_files.open(directory)
    replicated = tmp_path / "replicated"
    replicated.mkdir()
    for rank in range(2):
        torch.save({"a": torch.ones(2)}, replicated / f"pytorch_model_fsdp_0_rank{rank}.bin")
    assert rank_files.open(replicated).origin.world_size == 2


# ------------------------------------------------------------------------------------------------------------- damage


def test_a_file_of_another_save_is_an_error(written: Path, tmp_path: Path) -> None:
    directory = copied(written / "zoo", tmp_path / "copy")
    shutil.copy(directory / "model_world_size_6_rank_0.pt", directory / "model_world_size_6_rank_3.pt")
    with pytest.raises(Incomplete, match=r"rows_columns\.8x6: \d+ of 48 elements"):
        rank_files.open(directory)


def test_a_tensor_that_is_sharded_on_some_ranks_only_is_an_error(written: Path, tmp_path: Path) -> None:
    directory = copied(written / "pipeline", tmp_path / "copy")
    torch.save({"layers.1.weight": torch.zeros(5, 3)}, directory / "model_world_size_4_rank_0.pt")
    (directory / "model_world_size_4_rank_1.pt").write_bytes((directory / "model_world_size_4_rank_0.pt").read_bytes())
    with pytest.raises(Corrupt, match=r"layers\.1\.weight is sharded on some ranks and not on ranks 0, 1"):
        rank_files.open(directory)


def read_all(checkpoint: Checkpoint) -> dict[str, bytes]:
    files, ledger = Files(), Ledger()
    found = {n: t.read(Reader(files, ledger)).tobytes() for n, t in checkpoint.tensors.items()}
    ledger.settle(files)
    return found


@pytest.mark.parametrize("name", ["rank_files_2.4.1", "fsdp1_sharded_2.2.2", "fsdp1_local_2.13.0"])
def test_a_flipped_bit_is_an_error_that_names_a_file_or_changes_nothing(name: str, tmp_path: Path) -> None:
    directory = copied(DATA / name, tmp_path / "copy")
    path = max(directory.iterdir())
    data, expected, chance = path.read_bytes(), read_all(rank_files.open(directory)), random.Random(1)
    for _ in range(60):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read_all(rank_files.open(directory))
        except ReshardError as error:
            assert str(directory) in str(error)  # noqa: PT017
        else:
            assert found == expected


LIES = (
    *("coordinate", "coordinates", "huge_coordinate", "text_for_coordinate", "placements", "no_placements"),
    *("tensor_meta", "shard_order", "local", "no_local", "no_spec"),
)


@pytest.mark.parametrize("lie", LIES)
def test_a_dtensor_that_lies_is_refused_by_name(written: Path, lie: str) -> None:
    with pytest.raises(InputError, match=r"rank_\d\.pt: w: "):
        rank_files.open(written / "lies" / lie)
