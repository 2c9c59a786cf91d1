"""fsdp_dtensor runs that are written: the names of real directories, and torch's loaders."""

from __future__ import annotations

import argparse
import io
import pickletools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from checkpoints import left_in, same
from reshard.core.tensor import Tensor
from reshard.errors import Incomplete, Mismatch, Unsupported
from reshard.formats import dcp, fsdp_dtensor
from reshard.formats.fsdp_dtensor import TARGETS, Target, target_named
from reshard.formats.megatron_directory import locate
from reshard.storage.manifest import verify
from written import keys_of, literals, write

ARGS = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "add_position_embedding": True}
REAL = {
    "bridge": "pin_qwen3_5_w2",
    "bridge-main": "head_qwen3_5_w2",
    "qwen3.5-recipe": "seedfix_qwen3_5_w2",
    "megatron-lm": "mlmhead_gdn_w2",
}
"""Directories that the releases of a target wrote."""
BRIDGES = ("bridge", "bridge-main", "qwen3.5-recipe")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


NATIVE = {
    "embedding.word_embeddings.weight": noise(6, 4),
    "decoder.layers.0.mlp.linear_fc1.weight_w": noise(8, 4, seed=1),
    "decoder.layers.0.mlp.linear_fc1.weight_v": noise(8, 4, seed=2),
    "decoder.final_layernorm.weight": noise(4, seed=3),
}


def on_disk(target: Target) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for prefix in target.prefixes for name, tensor in NATIVE.items()}


def write_run(path: Path, target: Target, **more: Any) -> Path:
    args = {"args": ARGS} if target.has_args else {}
    return write(fsdp_dtensor.plan(literals(on_disk(target)), target=target, **args, **more), path)


def native(names: Mapping[str, Tensor], target: Target) -> set[str]:
    """The names without a target's ways: its prefix and what it calls the inner layer."""
    (prefix,), (mtp,) = target.prefixes, target.mtp
    assert all(name.startswith(prefix) for name in names)
    return {name.removeprefix(prefix).replace(f".{mtp}.", ".*.") for name in names}


# ----------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("name", REAL)
def test_a_target_has_the_keys_of_a_real_directory(name: str) -> None:
    tensors, objects = keys_of(REAL[name])
    target = TARGETS[name]
    described = fsdp_dtensor.plan(tensors, target=target, args=ARGS if target.has_args else None)
    written = [s.name for file in described for s in file.segments if s.name]
    assert sorted(written) == sorted(tensors)
    assert set(objects) - {"num_floating_point_operations_so_far"} == objects_in(target)
    split = any(".in_proj.weight." in key for key in tensors)
    assert target.split_parts == (split,)
    assert not any(f".{inner}." in key for inner in {*TARGETS["any"].mtp} - {*target.mtp} for key in tensors)


def objects_in(target: Target) -> set[str]:
    return {"checkpoint_version", "iteration", *(("args",) if target.has_args else ())}


def test_the_bridges_name_one_model_alike_but_for_what_a_target_says() -> None:
    names = [native(keys_of(REAL[name])[0], TARGETS[name]) for name in BRIDGES]
    assert names[0] == names[1] == names[2]


def test_any_is_all_of_them() -> None:
    everything = TARGETS["any"]
    for target in TARGETS.values():
        assert set(target.prefixes) <= set(everything.prefixes)
        assert set(target.mtp) <= set(everything.mtp)
        assert set(target.split_parts) <= set(everything.split_parts)
        assert target.has_args <= everything.has_args
        assert target.has_train_state <= everything.has_train_state


def test_the_first_target_is_the_default() -> None:
    assert fsdp_dtensor.DEFAULT_TARGET is next(iter(TARGETS.values()))
    with pytest.raises(Unsupported, match="no target 'nemo'") as caught:
        target_named("nemo")
    assert caught.value.hint == "one of bridge, bridge-main, megatron-lm, qwen3.5-recipe, any"


# ------------------------------------------------------------------------------------------------------- directories


def test_a_run_for_bridge_is_as_bridge_leaves_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TARGETS["bridge"], run_config="model: {}\n")
    assert left_in(run) == [
        "iter_0000000",
        "iter_0000000/.metadata",
        "iter_0000000/__0_0.distcp",
        "iter_0000000/run_config.yaml",
        "iter_0000000/train_state.pt",
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
        "reshard.json",
    ]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert int(torch.load(run / "latest_train_state.pt")["step"]) == 0
    assert verify(run).problems == ()


def test_a_run_for_megatron_lm_has_its_args_and_no_train_state(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TARGETS["megatron-lm"])
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert not any("train_state" in name for name in left_in(run))
    assert load(run / "iter_0000001", ["args", "iteration", "checkpoint_version"]) == {
        "args": argparse.Namespace(**ARGS, tensor_model_parallel_size=1, pipeline_model_parallel_size=1),
        "iteration": 1,
        "checkpoint_version": 3.0,
    }


def load(path: Path, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.load(found, checkpoint_id=str(path), no_dist=True)
    return found


def test_args_name_one_class_and_no_other(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TARGETS["megatron-lm"])
    (found,) = [data for where, data in dcp.object_pickles(run / "iter_0000001") if b"Namespace" in data]
    names = [arg for opcode, arg, _ in pickletools.genops(io.BytesIO(found)) if opcode.name == "GLOBAL"]
    assert names == ["argparse Namespace"]


@pytest.mark.parametrize("name", TARGETS)
def test_the_metadata_nest_tensors_under_model(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    run = write_run(tmp_path / "run", target)
    directory = run / f"iter_{target.iteration:07d}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(directory, tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=False)
    wanted = {key.removeprefix("model."): tensor for key, tensor in on_disk(target).items()}
    assert found.keys() == {"model"} | objects_in(target)
    assert found["model"].keys() == wanted.keys()
    assert all(same(found["model"][key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("name", TARGETS)
def test_the_reader_finds_it_again(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TARGETS[name])
    found = locate(run)
    assert (found.format, found.iteration) == ("fsdp_dtensor", TARGETS[name].iteration)
    assert dcp.open(found.weights).tensors.keys() == on_disk(TARGETS[name]).keys()


# ------------------------------------------------------------------------------------------------------------ errors


def test_names_of_another_target_are_refused() -> None:
    bridge, recipe = TARGETS["bridge"], TARGETS["qwen3.5-recipe"]
    with pytest.raises(Mismatch, match=r"4 names do not begin with model\.module\. as bridge wants: model\.embedding"):
        fsdp_dtensor.plan(literals(on_disk(recipe)), target=bridge)
    with pytest.raises(Mismatch, match=r"4 names do not begin with model\. as qwen3\.5-recipe wants"):
        fsdp_dtensor.plan(literals(on_disk(bridge)), target=recipe)


def test_megatron_lm_needs_args() -> None:
    target = TARGETS["megatron-lm"]
    with pytest.raises(Incomplete, match="num_attention_heads, add_position_embedding missing"):
        fsdp_dtensor.plan(literals(on_disk(target)), target=target, args={"num_layers": 2, "hidden_size": 32})
