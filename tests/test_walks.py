"""From the shards of real model families, through the command line, to `from_pretrained`: nothing missing, same logits.

The checkpoints are written by two processes with FSDP2 and torch's own DCP, as accelerate does it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
import workspace
from checkpoints import equals, same, write_dcp
from reshard.cli.main import main

FAMILIES = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "qwen2_5_vl")
SAVE = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import tiny_models

dist.init_process_group("gloo")
torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
for family in sys.argv[2:]:
    model = tiny_models.make(family)
    for module in list(model.modules()):
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                fully_shard(layer, mesh=mesh) if sum(1 for _ in layer.parameters()) > 1 else None
    fully_shard(model, mesh=mesh)
    model.set_requires_gradient_sync(False)
    shards = Path(sys.argv[1], family, "checkpoint-10", "pytorch_model_fsdp_0")
    dcp.save({"model": get_model_state_dict(model)}, storage_writer=dcp.FileSystemWriter(shards))
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads, torn down with the interpreter, now and then abort a process whose work is done
"""


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each family: a checkpoint of two ranks, and a base model without weights."""
    directory = tmp_path_factory.mktemp("runs")
    port = 20_000 + os.getpid() % 20_000
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SAVE, str(directory), *FAMILIES],
            env={**os.environ, **common, "PYTHONPATH": paths, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    for family in FAMILIES:
        workspace.write_base(directory / family / "base", family)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_loads_and_computes_what_was_trained(family: str, runs: Path, tmp_path: Path) -> None:
    assert main(["merge", str(runs / family), str(tmp_path / "out"), "--base", str(runs / family / "base"), "-q"]) == 0
    trained = tiny_models.make(family)
    loaded = tiny_models.load(trained, tmp_path / "out")
    assert torch.equal(tiny_models.logits(loaded), tiny_models.logits(trained))
    state = loaded.state_dict()
    assert [fqn for fqn, tensor in trained.state_dict().items() if not same(tensor, state[fqn])] == []
    assert main(["verify", str(tmp_path / "out"), "--against", str(runs / family)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_has_the_files_that_save_pretrained_writes(family: str, runs: Path, tmp_path: Path) -> None:
    assert main(["merge", str(runs / family), str(tmp_path / "out"), "--base", str(runs / family / "base"), "-q"]) == 0
    tiny_models.make(family).save_pretrained(tmp_path / "truth")
    found, truth = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "truth"))
    assert found.keys() == truth.keys()
    assert [fqn for fqn in truth if not same(found[fqn], truth[fqn])] == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_and_several_files_it_loads_too(family: str, runs: Path, tmp_path: Path) -> None:
    words = ["--base", str(runs / family / "base"), "--dtype", "bfloat16", "--max-shard-size", "8KB", "-q"]
    assert main(["merge", str(runs / family), str(tmp_path / "out"), *words]) == 0
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    rounded = tiny_models.make(family).to(torch.bfloat16)
    loaded = tiny_models.load(rounded, tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    state = loaded.state_dict()
    assert [fqn for fqn, tensor in rounded.state_dict().items() if not same(tensor, state[fqn])] == []


def test_layers_that_a_config_makes_dense_are_expected_dense(tmp_path: Path) -> None:
    model = tiny_models.make("qwen3_moe", mlp_only_layers=[1])
    tiny_models.save_modules(model, tmp_path / "model")
    assert main(["merge", str(tmp_path / "model"), str(tmp_path / "out"), "-q"]) == 0
    assert torch.equal(tiny_models.logits(tiny_models.load(model, tmp_path / "out")), tiny_models.logits(model))


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_along_any_dimension_make_the_same_model(dim: int, tmp_path: Path) -> None:
    tensors = workspace.state_of("qwen3")
    write_dcp(tmp_path / "pytorch_model_fsdp_0", tensors, ranks=3, dim=dim, prefix=("model",))
    assert main(["merge", str(tmp_path), str(tmp_path / "out.safetensors"), "--keep-names", "-q"]) == 0
    assert equals(tmp_path / "out.safetensors", {f"model.{fqn}": tensor for fqn, tensor in tensors.items()})
