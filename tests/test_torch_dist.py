"""torch_dist runs that are written: Megatron-Core's models load them, torch and real directories judge the rest."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import bits, left_in, same
from megatron_ranks import loaded, on_ranks, shapes_on_disk, whole
from reshard.core.dtypes import dtype
from reshard.core.tensor import Literal
from reshard.formats import dcp, torch_dist
from reshard.formats.megatron_directory import locate
from reshard.storage.manifest import verify
from written import KEYS, keys_of, literal, literals, write

TOKENIZER = {"tokenizer.json": Literal(dtype("uint8"), (2,), b"{}")}
CONFIG = "model:\n  num_layers: 2\n"

needs_megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core has no wheel")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def model() -> dict[str, torch.Tensor]:
    return {
        "embedding.word_embeddings.weight": noise(6, 4),
        "decoder.layers.mlp.linear_fc2.weight": noise(2, 4, 8, seed=1),
        "decoder.final_layernorm.weight": noise(4, seed=2),
    }


# ------------------------------------------------------------------------------------------------------- directories


def test_a_run_of_iteration_0_is_as_bridge_leaves_it(tmp_path: Path) -> None:
    files = torch_dist.plan(literals(model()), iteration=0, run_config=CONFIG, tokenizer=TOKENIZER)
    run = write(files, tmp_path / "run")
    assert left_in(run) == [
        "iter_0000000",
        "iter_0000000/.metadata",
        "iter_0000000/__0_0.distcp",
        "iter_0000000/common.pt",
        "iter_0000000/metadata.json",
        "iter_0000000/run_config.yaml",
        "iter_0000000/tokenizer",
        "iter_0000000/tokenizer/tokenizer.json",
        "iter_0000000/train_state.pt",
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
        "reshard.json",
    ]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert (run / "iter_0000000/run_config.yaml").read_text() == CONFIG
    assert (run / "iter_0000000/tokenizer/tokenizer.json").read_text() == "{}"
    assert verify(run).problems == ()


def test_the_train_state_is_the_file_that_torch_saves(tmp_path: Path) -> None:
    run = write(torch_dist.plan(literals(model()), iteration=0), tmp_path / "run")
    state = {
        **dict.fromkeys(("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"), 0),
        "floating_point_operations_so_far": 0.0,
        **dict.fromkeys(("do_train", "do_valid", "do_test"), False),
    }
    torch.save({name: torch.tensor(value) for name, value in state.items()}, tmp_path / "train_state.pt")
    assert (run / "iter_0000000/train_state.pt").read_bytes() == (tmp_path / "train_state.pt").read_bytes()
    assert (run / "latest_train_state.pt").read_bytes() == (tmp_path / "train_state.pt").read_bytes()


def test_what_is_not_sharded_is_plain_values(tmp_path: Path) -> None:
    run = write(torch_dist.plan(literals(model()), iteration=10, common={"extra": 1}), tmp_path / "run")
    assert torch.load(run / "iter_0000010/common.pt", weights_only=True) == {
        "checkpoint_version": 3.0,
        "iteration": 10,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
        "extra": 1,
    }
    assert json.loads((run / "iter_0000010/metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }


def test_a_release_has_no_iteration(tmp_path: Path) -> None:
    run = write(torch_dist.plan(literals(model()), iteration="release"), tmp_path / "run")
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert "iteration" not in torch.load(run / "release/common.pt", weights_only=True)
    assert not any("train_state" in name for name in left_in(run))


@pytest.mark.parametrize("iteration", [0, 10, "release"])
def test_the_reader_finds_it_again(iteration: Any, tmp_path: Path) -> None:
    run = write(torch_dist.plan(literals(model()), iteration=iteration), tmp_path / "run")
    found = locate(run)
    assert (found.format, found.iteration) == ("torch_dist", iteration)
    checkpoint = dcp.open(found.weights)
    assert all(checkpoint[name].numpy().tobytes() == bits(tensor) for name, tensor in model().items())


# ------------------------------------------------------------------------------------------------------ extra states


def extra_states(names: list[str]) -> set[str]:
    return {name for name in names if torch_dist.EXTRA_STATE in name}


@pytest.mark.parametrize("name", sorted(p.stem for p in KEYS.glob("*.json") if p.stem[:4] in ("brid", "mlm_")))
def test_every_extra_state_of_a_real_directory_is_found(name: str) -> None:
    tensors, objects = keys_of(name)
    found = torch_dist.extra_state_keys(tensors)
    more = set(found) - extra_states(objects)
    assert extra_states(objects) - set(found) == set()
    assert all(".core_attention." in key for key in more)
    assert len(found) == len(set(found))


def test_each_layer_and_expert_of_a_stack_has_its_own() -> None:
    layers, experts = (2, 3), (2, 4, 6, 3)
    tensors = {
        "decoder.layers.self_attention.linear_proj.weight": literal(torch.zeros(layers)),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": literal(torch.zeros(experts)),
        "decoder.layers.mlp.router.weight": literal(torch.zeros(layers)),
    }
    found = torch_dist.extra_state_keys(tensors)
    assert found[:2] == [f"decoder.layers.self_attention.linear_proj._extra_state/shard_{i}_2" for i in range(2)]
    assert found[-1] == "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.3_2.4"
    assert len(found) == 2 + 2 + math.prod(experts[:2])


def test_an_extra_state_is_the_list_of_an_empty_tensor(tmp_path: Path) -> None:
    run = write(torch_dist.plan(literals(model()), iteration=1), tmp_path / "run")
    data = (run / "iter_0000001/__0_0.distcp").read_bytes()
    stream = io.BytesIO()
    torch.save([torch.empty(0, dtype=torch.uint8)], stream)
    assert data.startswith(stream.getvalue() * 3)  # two layers and the last norm


def test_many_extra_states_are_one_piece_of_a_file() -> None:
    tensors = {"decoder.layers.mlp.experts.experts.linear_fc1.weight": literal(torch.zeros(4, 64, 2, 2))}
    data, *_ = torch_dist.plan(tensors, iteration=1)
    assert len(data.segments) == 4


# ---------------------------------------------------------------------------------------------- Megatron-Core's models

MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_router_topk": 2}
MIXED = {**MOE, "moe_layer_freq": [0, 1], "moe_shared_expert_intermediate_size": 16, "qk_layernorm": True}


@needs_megatron
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, stacked, mesh",
    [
        ({}, True, {}),
        ({}, True, {"tensor": 2}),
        ({}, True, {"pipeline": 2}),
        ({"tied": True, "add_qkv_bias": True}, True, {"tensor": 2}),
        (MOE, True, {"expert": 2}),
        (MIXED, False, {"tensor": 2}),
    ],
    ids=["llama", "llama-tp2", "llama-pp2", "qwen2-tied-tp2", "mixtral-ep2", "numbered-tp2"],
)
def test_megatron_core_loads_it(settings: dict[str, Any], stacked: bool, mesh: dict[str, int], tmp_path: Path) -> None:
    (shapes,) = on_ranks(shapes_on_disk, settings, stacked)
    tensors = {name: noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    run = write(torch_dist.plan(literals(tensors), iteration=1, max_file_nbytes=30_000), tmp_path / "run")
    found = whole(on_ranks(loaded, run / "iter_0000001", settings, stacked, **mesh))
    assert found.keys() == tensors.keys()
    # norms of a local model are float32, whatever its other parameters are
    assert [name for name, tensor in tensors.items() if not same(found[name].bfloat16(), tensor)] == []


@needs_megatron
@pytest.mark.slow
def test_megatron_core_refuses_it_without_extra_states(tmp_path: Path) -> None:
    (shapes,) = on_ranks(shapes_on_disk, {})
    tensors = {name: literal(noise(*shape)) for name, shape in shapes.items()}
    run = write(torch_dist.plan(tensors, iteration=1, extra_states=[]), tmp_path / "run")
    with pytest.raises(AssertionError, match=r"_extra_state/shard_0_2"):
        on_ranks(loaded, run / "iter_0000001", {})


def load_by_hand(directory: Path, shapes: dict[str, tuple[int, ...]], objects: list[str]) -> dict[str, Any]:
    """On one rank: what Megatron loads for tensors and extra states by their keys, without a model."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    wanted: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, torch.zeros(shape, dtype=torch.bfloat16))
        for name, shape in shapes.items()
    }
    for name in objects:
        key, place, sizes = re.fullmatch(r"(.+)/shard_([\d.]+)_([\d.]+)", name).groups()
        offset, whole = (tuple(map(int, numbers.split("."))) for numbers in (place, sizes))
        wanted[name] = ShardedObject(key, None, whole, offset)
    return dist_checkpointing.load(wanted, str(directory))


@needs_megatron
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bridge_mixtral", "bridge_qwen3_5_moe", "bridge_nemotron_h"])
def test_megatron_core_finds_all_that_a_model_of_transformer_engine_asks_for(name: str, tmp_path: Path) -> None:
    tensors, objects = keys_of(name)
    run = write(torch_dist.plan(tensors, iteration=1), tmp_path / "run")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    asked = sorted(extra_states(objects))
    (found,) = on_ranks(load_by_hand, run / "iter_0000001", shapes, asked)
    assert all(tuple(found[name].shape) == shape and not found[name].any() for name, shape in shapes.items())
    assert all(same(found[name], torch.empty(0, dtype=torch.uint8)) for name in asked)
