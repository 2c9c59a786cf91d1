"""DeepSpeed checkpoints: files that DeepSpeed wrote, and files in its layout that a test cuts with torch."""

from __future__ import annotations

import contextlib
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from reshard.cli.main import main
from reshard.core.checkpoint import Checkpoint
from reshard.core.tensor import leaves
from reshard.errors import Corrupt, Incomplete, NotFound, ReshardError, Unsupported
from reshard.formats import deepspeed, open_path
from reshard.formats.detect import find

DATA = Path(__file__).parent / "data" / "deepspeed"
TRAINED = ("zero1_bf16", "zero2_fp32", "zero3_bf16", "zero3_bf16_tied")
UNIVERSAL = "universal_from_zero1_bf16"


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_same(checkpoint: Checkpoint, name: str, expected: torch.Tensor) -> None:
    node = checkpoint.tensors[name]
    assert (node.dtype.torch, node.shape) == (str(expected.dtype).removeprefix("torch."), tuple(expected.shape)), name
    assert node.read(checkpoint.source).tobytes() == bits(expected), name


# ---------------------------------------------------------------------------------------------- as DeepSpeed cuts them


class fragment_address:
    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


Params = dict[str, torch.Tensor]


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def params(seed: int = 0) -> list[Params]:
    shapes = [[(7, 5), (), (3,), (0, 4), (2, 3, 4)], [(1,), (11,)]]
    return [
        {
            f"layers.{group}.{number}.weight": noise(shape, seed + 10 * group + number)
            for number, shape in enumerate(row)
        }
        for group, row in enumerate(shapes)
    ]


def padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.cat([flat, torch.full((-len(flat) % multiple,), 7.0)])


def flat_partitions(group: Params, ranks: int) -> list[torch.Tensor]:
    """ZeRO 1 and 2: one flat tensor, padded, in equal parts."""
    flat = padded(torch.cat([tensor.reshape(-1) for tensor in group.values()]), 2 * ranks)
    return list(flat.chunk(ranks))


def own_partitions(group: Params, ranks: int) -> list[torch.Tensor]:
    """ZeRO 3: each parameter padded and cut, a rank's parts end to end."""
    cut = [padded(tensor.reshape(-1), ranks).chunk(ranks) for tensor in group.values() if tensor.numel()]
    return [torch.cat([parts[rank] for parts in cut]).clone() for rank in range(ranks)]


def save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def write_zero(
    tag: Path, groups: list[Params], ranks: int, stage: int, changes: dict[str, Any] | None = None, **optimizer: Any
) -> dict[str, torch.Tensor]:
    """A checkpoint in DeepSpeed's layout; returns what an optimizer state should be, by FQN."""
    cut = own_partitions if stage == 3 else flat_partitions
    averages = [{name: tensor * 2 for name, tensor in group.items()} for group in groups]
    weights, states = [cut(g, ranks) for g in groups], [cut(g, ranks) for g in averages]
    module: dict[str, Any] = OrderedDict()
    for name, tensor in ((n, t) for group in groups for n, t in group.items()):
        module[name] = torch.empty(0, dtype=torch.bfloat16) if stage == 3 else tensor.bfloat16()
    module["count"] = torch.tensor([1, 1 << 40])
    module["mean"] = torch.tensor([0.1, float("nan")], dtype=torch.bfloat16)
    model = {
        "module": module,
        "buffer_names": ["count", "mean"],
        "param_shapes": [OrderedDict((n, t.shape) for n, t in g.items()) for g in groups],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "global_steps": 7,
    } | (changes or {})
    for rank in range(ranks if stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        save(model, tag / f"{name}_model_states.pt")
    for rank in range(ranks):
        state = {
            "state": {
                g: {"step": torch.tensor(3.0), "exp_avg": s[rank].clone(), "lr": 0.5} for g, s in enumerate(states)
            },
            "param_groups": [{"lr": 0.1, "params": [g]} for g in range(len(groups))],
        }
        flat = [part[rank].clone() for part in weights]
        held = (
            {"fp32_flat_groups": flat, "optimizer_state_dict": state}
            if stage == 3
            else {"single_partition_of_fp32_groups": flat, "base_optimizer_state": state}
        )
        states_file = {"optimizer_state_dict": {"zero_stage": stage, "partition_count": ranks, **held, **optimizer}}
        save(states_file, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return {name: tensor for group in averages for name, tensor in group.items()}


def optim(tag: Path, rank: int = 0) -> Path:
    return tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def changed(path: Path, change: Any) -> None:
    value = torch.load(path, weights_only=False)
    change(value.get("optimizer_state_dict", value))
    torch.save(value, path)


# ---------------------------------------------------------------------------------------------------- DeepSpeed's own


@pytest.mark.parametrize("name", TRAINED)
def test_weights_are_those_of_zero_to_fp32_and_integers_stay_integers(name: str) -> None:
    checkpoint = open_path(DATA / name)
    truth = safetensors.torch.load_file(DATA / name / "truth.safetensors")
    assert set(truth) <= set(checkpoint)
    for fqn, expected in truth.items():
        if fqn == "cnt":  # zero_to_fp32 turns every buffer into float32
            assert checkpoint[fqn].dtype.name == "I64"
            assert checkpoint[fqn].numpy().tolist() == expected.tolist()
        else:
            assert_same(checkpoint, fqn, expected)
    assert checkpoint.origin.step == 3
    assert checkpoint.origin.world_size == 4


def test_frozen_parameters_of_zero_1_come_from_the_module() -> None:
    checkpoint = open_path(DATA / "zero1_bf16")
    module = torch.load(DATA / "zero1_bf16/global_step3/mp_rank_00_model_states.pt", weights_only=False)["module"]
    for fqn in ("frozen.weight", "frozen.bias"):
        assert_same(checkpoint, fqn, module[fqn])


def test_weights_and_optimizer_states_are_those_of_deepspeeds_own_conversion() -> None:
    trained, universal = open_path(DATA / "zero1_bf16"), open_path(DATA / UNIVERSAL)
    assert set(trained) == set(universal)
    for fqn in trained:
        np.testing.assert_array_equal(trained[fqn].numpy(), universal[fqn].numpy(), fqn, strict=True)
    assert trained.path("optimizer.state.l1.bias.exp_avg") == ("optimizer", "state", "l1.bias", "exp_avg")


def test_tied_parameters_are_one_tensor_under_both_names() -> None:
    checkpoint = open_path(DATA / "zero3_bf16_tied")
    assert checkpoint.tensors["head.weight"] is checkpoint.tensors["embed.weight"]


def test_the_command_line_merges_the_model_and_with_all_the_optimizer(tmp_path: Path) -> None:
    source = str(DATA / "zero2_fp32")
    assert main(["merge", source, str(tmp_path / "model.safetensors")]) == 0
    assert main(["merge", source, str(tmp_path / "all.safetensors"), "--all"]) == 0
    model = safetensors.torch.load_file(tmp_path / "model.safetensors")
    truth = safetensors.torch.load_file(DATA / "zero2_fp32/truth.safetensors")
    assert set(model) == set(truth)
    assert all(torch.equal(model[fqn].float(), truth[fqn].float()) for fqn in truth)
    assert "optimizer.state.head.weight.exp_avg" in safetensors.torch.load_file(tmp_path / "all.safetensors")


# -------------------------------------------------------------------------------------------------- any cut, any group


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_every_parameter_is_put_together_from_any_number_of_ranks(tmp_path: Path, stage: int, ranks: int) -> None:
    groups = params()
    averages = write_zero(tmp_path / "best", groups, ranks, stage)
    checkpoint = deepspeed.open(tmp_path / "best")
    for group in groups:
        for fqn, expected in group.items():
            assert_same(checkpoint, fqn, expected)
            assert_same(checkpoint, f"optimizer.state.{fqn}.exp_avg", averages[fqn])
            assert_same(checkpoint, f"optimizer.state.{fqn}.step", torch.tensor(3.0))
            assert checkpoint.objects[f"optimizer.state.{fqn}.lr"] == 0.5
    assert_same(checkpoint, "count", torch.tensor([1, 1 << 40]))
    assert_same(checkpoint, "mean", torch.tensor([0.1, float("nan")], dtype=torch.bfloat16).float())
    assert checkpoint.objects["optimizer.param_groups.1.lr"] == 0.1
    assert checkpoint.objects["extra_state.global_steps"] == 7


def test_opening_makes_one_piece_for_each_rank_that_holds_some(tmp_path: Path) -> None:
    write_zero(tmp_path, [{"a": noise((4,), 1), "b": noise((12,), 2)}], 4, 1)
    checkpoint = deepspeed.open(tmp_path)
    assert [len(list(leaves(checkpoint.tensors[name]))) for name in ("a", "b")] == [1, 3]


def test_padding_may_be_left_out_and_elastic_states_are_a_list(tmp_path: Path) -> None:
    groups = params()
    averages = write_zero(tmp_path, groups, 3, 2)
    for rank in range(3):

        def lean(state: dict[str, Any], rank: int = rank) -> None:
            for number, part in enumerate(state["single_partition_of_fp32_groups"]):
                total = sum(tensor.numel() for tensor in groups[number].values())
                kept = min(max(total - rank * len(part), 0), len(part))
                state["single_partition_of_fp32_groups"][number] = part[:kept].clone()
            state["base_optimizer_state"] = list(state["base_optimizer_state"]["state"].values())

        changed(optim(tmp_path, rank), lean)
    checkpoint = deepspeed.open(tmp_path)
    for fqn, expected in groups[1].items():
        assert_same(checkpoint, fqn, expected)
        assert_same(checkpoint, f"optimizer.state.{fqn}.exp_avg", averages[fqn])


def test_sub_groups_of_zero_3_may_end_inside_a_parameter(tmp_path: Path) -> None:
    groups = params()
    write_zero(tmp_path, groups, 2, 3)
    for rank in range(2):

        def regroup(state: dict[str, Any]) -> None:
            flat = torch.cat(state["fp32_flat_groups"])
            state["fp32_flat_groups"] = [flat[:5].clone(), flat[5:9].clone(), flat[9:].clone()]
            state["optimizer_state_dict"]["state"] = {}

        changed(optim(tmp_path, rank), regroup)
    checkpoint = deepspeed.open(tmp_path)
    for group in groups:
        for fqn, expected in group.items():
            assert_same(checkpoint, fqn, expected)


def test_states_of_another_length_are_left_out_by_name(tmp_path: Path) -> None:
    write_zero(tmp_path, params(), 2, 1)
    for rank in range(2):
        changed(optim(tmp_path, rank), lambda s: s["base_optimizer_state"]["state"][0].update(absmax=torch.ones(2)))
    checkpoint = deepspeed.open(tmp_path)
    assert not any("absmax" in fqn for fqn in checkpoint)
    assert any("absmax" in notice for notice in checkpoint.notices)


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_are_taken_from_their_fragments(tmp_path: Path, stage: int) -> None:
    frozen = noise((5, 3), 9).half()
    write_zero(tmp_path, params(), 4, stage)
    parts = padded(frozen.reshape(-1), 4).half().chunk(4)
    for rank, path in enumerate(sorted(tmp_path.glob("*model_states.pt"))):

        def freeze(state: dict[str, Any], part: Any = parts[rank] if stage == 3 else frozen) -> None:
            state["frozen_param_shapes"] = OrderedDict({"frozen": frozen.shape})
            state["frozen_param_fragments"] = OrderedDict({"frozen": part.clone()})

        changed(path, freeze)
    assert_same(deepspeed.open(tmp_path), "frozen", frozen)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("told", [True, False])
def test_tied_names_are_found_by_name_and_by_storage(tmp_path: Path, stage: int, told: bool) -> None:
    groups = params()
    write_zero(tmp_path, groups, 2, stage)
    for path in tmp_path.glob("*model_states.pt"):

        def tie(state: dict[str, Any]) -> None:
            state["module"]["head"] = state["module"]["layers.0.0.weight"]
            state["shared_params"] = {"head": "layers.0.0.weight"} if told else {}

        changed(path, tie)
    checkpoint = deepspeed.open(tmp_path)
    assert checkpoint.tensors["head"] is checkpoint.tensors["layers.0.0.weight"]


def test_without_zero_the_module_is_the_model(tmp_path: Path) -> None:
    module = {"a": noise((3, 2), 1).half(), "buffer": torch.ones(2).half()}
    state = {"module": module, "buffer_names": ["buffer"], "optimizer": {"state": {0: {"exp_avg": noise((6,), 2)}}}}
    save(state, tmp_path / "mp_rank_00_model_states.pt")
    checkpoint = deepspeed.open(tmp_path)
    assert set(checkpoint) == {"a", "buffer", "optimizer.state.0.exp_avg"}
    for fqn, expected in module.items():
        assert_same(checkpoint, fqn, expected)


# ------------------------------------------------------------------------------------------------------- universal


def write_universal(path: Path, groups: list[Params], *, flat: bool) -> None:
    write_zero(path, groups, 2, 3 if flat else 1)
    for file in path.glob("*_optim_states.pt"):
        file.unlink()
    for name, tensor in ((n, t) for group in groups for n, t in group.items()):
        save(tensor.reshape(-1) if flat else {"param": tensor, "cat_dim": 0}, path / "zero" / name / "fp32.pt")
        save(3, path / "zero" / name / "step.pt")


@pytest.mark.parametrize("flat", [True, False])
def test_universal_checkpoints_have_their_shapes_whatever_they_were_converted_from(tmp_path: Path, flat: bool) -> None:
    groups = params()
    write_universal(tmp_path, groups, flat=flat)
    checkpoint = deepspeed.open(tmp_path)
    for group in groups:
        for fqn, expected in group.items():
            assert_same(checkpoint, fqn, expected)
            assert checkpoint.objects[f"optimizer.state.{fqn}.step"] == 3
    assert_same(checkpoint, "count", torch.tensor([1, 1 << 40]))


def test_a_universal_checkpoint_without_a_parameter_or_a_shape_is_refused(tmp_path: Path) -> None:
    write_universal(tmp_path, params(), flat=True)
    save(noise((34,), 1), tmp_path / "zero/layers.0.0.weight/fp32.pt")
    with pytest.raises(Corrupt, match="34 elements"):
        deepspeed.open(tmp_path)
    shutil.rmtree(tmp_path / "zero/layers.0.0.weight")
    with pytest.raises(Incomplete, match=r"layers\.0\.0\.weight"):
        deepspeed.open(tmp_path)
    for file in tmp_path.glob("*_model_states.pt"):
        file.unlink()
    with pytest.raises(Incomplete, match="stored flat"):
        deepspeed.open(tmp_path)


# ---------------------------------------------------------------------------------------------- pipelines and experts


def test_pipeline_layers_are_named_by_their_number(tmp_path: Path) -> None:
    for layer in (0, 2, 10):
        save(OrderedDict(weight=noise((2, 2), layer)), tmp_path / f"layer_{layer:02d}-model_states.pt")
    for stage, names in enumerate((["0.weight", "2.weight"], ["10.weight", "tied_modules.embed.weight"])):
        shapes = [OrderedDict((name, torch.Size((2, 2))) for name in names)]
        save({"module": None, "param_shapes": shapes}, tmp_path / f"mp_rank_{stage:02d}_model_states.pt")
    checkpoint = deepspeed.open(tmp_path)
    assert list(checkpoint) == ["0.weight", "2.weight", "10.weight"]
    assert_same(checkpoint, "10.weight", noise((2, 2), 10))
    (tmp_path / "layer_10-model_states.pt").unlink()
    with pytest.raises(Incomplete, match=r"10\.weight"):
        deepspeed.open(tmp_path)


def test_experts_have_the_names_in_their_files_and_must_all_be_there(tmp_path: Path) -> None:
    save({"module": {"gate": noise((2,), 0)}, "num_experts": [2]}, tmp_path / "mp_rank_00_model_states.pt")
    for expert in range(2):
        name = f"moe.deepspeed_moe.experts.deepspeed_experts.{expert}.weight"
        save({name: noise((3,), expert)}, tmp_path / f"layer_0_expert_{expert}_mp_rank_00_model_states.pt")
    save({}, tmp_path / "expp_rank_0_mp_rank_00_optim_states.pt")
    checkpoint = deepspeed.open(tmp_path)
    assert_same(checkpoint, "moe.deepspeed_moe.experts.deepspeed_experts.1.weight", noise((3,), 1))
    assert any("fp32" in notice for notice in checkpoint.notices)
    (tmp_path / "layer_0_expert_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(Incomplete, match="experts 1 of layer 0"):
        deepspeed.open(tmp_path)


def test_tensor_parallel_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    for rank in range(2):
        save({"module": {}}, tmp_path / f"a/mp_rank_{rank:02d}_model_states.pt")
        save({"module": {}}, tmp_path / f"b/layer_03-model_{rank:02d}-model_states.pt")
    save({"module": None}, tmp_path / "b/mp_rank_00_model_states.pt")
    with pytest.raises(Unsupported, match="00, 01"):
        deepspeed.open(tmp_path / "a")
    with pytest.raises(Unsupported, match="layer 3 is in"):
        deepspeed.open(tmp_path / "b")


# ----------------------------------------------------------------------------------------- what is missing or damaged


@pytest.mark.parametrize("stage", [1, 3])
def test_missing_and_extra_ranks_are_named(tmp_path: Path, stage: int) -> None:
    write_zero(tmp_path, params(), 11, stage)
    shutil.copy(optim(tmp_path), optim(tmp_path, 11))
    with pytest.raises(Incomplete, match="bf16_zero_pp_rank_11_mp_rank_00_optim_states"):
        deepspeed.open(tmp_path)
    optim(tmp_path, 11).unlink()
    optim(tmp_path, 10).unlink()
    optim(tmp_path, 2).unlink()
    with pytest.raises(Incomplete, match=r"2 of 11 ranks .*_rank_2_mp_rank_00_optim_states.*_rank_10_"):
        deepspeed.open(tmp_path)


def test_missing_model_states_and_missing_optimizer_files_are_named(tmp_path: Path) -> None:
    write_zero(tmp_path / "a", params(), 3, 3)
    (tmp_path / "a/zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(Incomplete, match="zero_pp_rank_1_mp_rank_00_model_states"):
        deepspeed.open(tmp_path / "a")
    for stage in (1, 3):
        write_zero(tmp_path / f"b{stage}", params(), 2, stage)
        for rank in range(2):
            optim(tmp_path / f"b{stage}", rank).unlink()
        with pytest.raises(Incomplete, match="fp32 weights are missing"):
            deepspeed.open(tmp_path / f"b{stage}")
    write_zero(tmp_path / "c", params(), 2, 1)
    (tmp_path / "c/mp_rank_00_model_states.pt").unlink()
    with pytest.raises(Incomplete, match="no model_states"):
        deepspeed.open(tmp_path / "c")


def test_files_of_two_saves_in_one_directory_are_refused(tmp_path: Path) -> None:
    write_zero(tmp_path, params(), 2, 1)
    changed(optim(tmp_path, 1), lambda state: state.update(partition_count=4))
    with pytest.raises(Corrupt, match="2, 4 ranks"):
        deepspeed.open(tmp_path)
    shutil.copy(optim(tmp_path), tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(Corrupt, match="same rank"):
        deepspeed.open(tmp_path)


@pytest.mark.parametrize("stage", [1, 3])
def test_more_or_fewer_elements_than_the_shapes_have_are_refused(tmp_path: Path, stage: int) -> None:
    groups = [{"a": noise((16,), 1)}]
    for shape, error in ((17, Incomplete if stage == 1 else Corrupt), (3, Corrupt)):
        tag = tmp_path / str(shape)
        write_zero(tag, groups, 2, stage, {"param_shapes": [OrderedDict(a=torch.Size((shape,)))]})
        with pytest.raises(error, match="elements"):
            deepspeed.open(tag)


def test_a_rank_that_says_otherwise_where_its_part_lies_is_refused(tmp_path: Path) -> None:
    groups = [{"a": noise((6,), 1), "b": noise((6,), 2)}]
    right = [{"a": fragment_address(6, 0)}], [{"b": fragment_address(6, 0)}]
    write_zero(tmp_path, groups, 2, 1)
    for rank, slices in enumerate(right):
        changed(optim(tmp_path, rank), lambda state, slices=slices: state.update(param_slice_mappings=slices))
    assert_same(deepspeed.open(tmp_path), "b", groups[0]["b"])
    changed(optim(tmp_path), lambda state: state.update(param_slice_mappings=right[1]))
    with pytest.raises(Corrupt, match=r"b is elements 6 to 12 of group 0"):
        deepspeed.open(tmp_path)


def test_bfloat16_without_zero_has_its_order_from_the_slices(tmp_path: Path) -> None:
    groups = [{"b": noise((2, 3), 1), "a": noise((6,), 2)}]
    write_zero(tmp_path, groups, 2, 1, {"param_shapes": None})
    for rank, name in enumerate("ba"):
        slices = [{name: fragment_address(6, 0)}]
        changed(optim(tmp_path, rank), lambda state, slices=slices: state.update(param_slice_mappings=slices))
    checkpoint = deepspeed.open(tmp_path)
    for fqn, expected in groups[0].items():
        assert_same(checkpoint, fqn, expected)


def test_a_parameter_that_nothing_describes_is_incomplete(tmp_path: Path) -> None:
    write_zero(tmp_path, params(), 2, 3)
    for path in tmp_path.glob("*model_states.pt"):
        changed(path, lambda state: state["module"].update(lost=torch.empty(0)))
    with pytest.raises(Incomplete, match="lost"):
        deepspeed.open(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("module", [1]),
        ("param_shapes", [{"a": "x"}]),
        ("param_shapes", [{"a": torch.Size((1 << 40, 1 << 40))}]),
        ("param_shapes", 3),
        ("frozen_param_shapes", {"z": torch.Size((3,))}),
        ("frozen_param_fragments", 1),
        ("shared_params", [1]),
        ("shared_params", {"z": ["a"]}),
        ("buffer_names", 3),
    ],
)
def test_values_of_the_wrong_kind_end_in_an_error_that_names_the_file(tmp_path: Path, key: str, value: Any) -> None:
    write_zero(tmp_path, params(), 2, 1, {key: value})
    with pytest.raises(ReshardError, match=r"model_states|param_shapes|elements"):
        deepspeed.open(tmp_path)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("key", ["param_shapes", "frozen_param_shapes"])
def test_shapes_beyond_any_number_of_elements_are_refused(tmp_path: Path, key: str, stage: int) -> None:
    huge = {"z": (1 << 61,) * 20}
    write_zero(tmp_path, params(), 2, stage, {key: [huge, {}] if key == "param_shapes" else huge,
                                              "frozen_param_fragments": {"z": torch.ones(3)}})  # fmt: skip
    with pytest.raises(ReshardError, match=r"elements|frozen parameter z"):
        deepspeed.open(tmp_path)


def test_counts_beyond_measure_take_no_time(tmp_path: Path) -> None:
    save({"module": {"gate": noise((2,), 0)}, "num_experts": [1 << 60]}, tmp_path / "mp_rank_00_model_states.pt")
    save({}, tmp_path / "layer_0_expert_999999999_mp_rank_00_model_states.pt")
    with pytest.raises(Incomplete, match="experts 0, 1, 2"):
        deepspeed.open(tmp_path)
    write_zero(tmp_path / "zero", params(), 1, 1)
    changed(optim(tmp_path / "zero"), lambda state: state.update(partition_count=1 << 60))
    with pytest.raises(Incomplete, match=f"{(1 << 60) - 1} of {1 << 60} ranks are missing"):
        deepspeed.open(tmp_path / "zero")


def test_groups_of_partitions_that_are_no_list_are_refused(tmp_path: Path) -> None:
    write_zero(tmp_path, params(), 1, 1)
    changed(optim(tmp_path), lambda state: state.update(ds_zero_partition_groups=3))
    with pytest.raises(Unsupported, match="groups on different numbers of ranks"):
        deepspeed.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"single_partition_of_fp32_groups": 1},
        {"single_partition_of_fp32_groups": [torch.ones(2, 2)]},
        {"single_partition_of_fp32_groups": ["x"]},
        {"param_slice_mappings": [{"a": 1}, {}]},
    ],
)
def test_optimizer_files_of_another_form_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_zero(tmp_path, params(), 1, 1)
    changed(optim(tmp_path), lambda state: state.update(change))
    with pytest.raises(Corrupt, match="optim_states"):
        deepspeed.open(tmp_path)


class Hostile:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_nothing_that_a_checkpoint_names_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_zero(tmp_path / "tag", params(), 1, 1, {"client": Hostile()})
    deepspeed.open(tmp_path / "tag")
    assert not (tmp_path / "executed").exists()


def test_truncated_files_are_named(tmp_path: Path) -> None:
    write_zero(tmp_path, params(), 2, 1)
    data = optim(tmp_path, 1).read_bytes()
    for nbytes in (0, 10, len(data) // 2, len(data) - 1):
        optim(tmp_path, 1).write_bytes(data[:nbytes])
        with pytest.raises(ReshardError, match="bf16_zero_pp_rank_1_mp_rank_00"):
            deepspeed.open(tmp_path)


# ---------------------------------------------------------------------------------------------------------- detection


@pytest.mark.parametrize(
    "pointed",
    [
        "",
        "latest",
        "global_step3",
        "global_step3/mp_rank_00_model_states.pt",
        "global_step3/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt",
    ],
)
def test_a_run_its_tag_and_any_file_of_it_are_one_checkpoint(pointed: str) -> None:
    found = find(DATA / "zero1_bf16" / pointed)
    assert [part.path for part in found.parts] == [DATA / "zero1_bf16/global_step3"]
    assert (found.parts[0].format, found.step) == ("deepspeed", 3)


@pytest.mark.parametrize(
    "pointed", ["", "latest_universal", *(f"global_step3_universal{p}" for p in ("", "/zero", "/zero/l1.bias/fp32.pt"))]
)
def test_a_universal_checkpoint_is_found_from_anywhere_in_it(pointed: str) -> None:
    found = find(DATA / UNIVERSAL / pointed)
    assert [part.path for part in found.parts] == [DATA / UNIVERSAL / "global_step3_universal"]
    assert (found.parts[0].format, found.step) == ("deepspeed", 3)


def test_latest_says_which_tag_and_a_step_another(tmp_path: Path) -> None:
    for step in (2, 10, 30):
        write_zero(tmp_path / f"global_step{step}", params(step), 1, 1)
    (tmp_path / "latest").write_text("global_step10\n")
    assert [find(tmp_path).step, find(tmp_path, step=2).step] == [10, 2]
    assert_same(open_path(tmp_path), "layers.0.0.weight", params(10)[0]["layers.0.0.weight"])
    (tmp_path / "latest").unlink()
    optim(tmp_path / "global_step30").unlink()
    assert find(tmp_path).step == 10


def test_tags_of_accelerate_and_of_the_trainer_are_found_below_their_checkpoint(tmp_path: Path) -> None:
    for checkpoint, tag in (("checkpoint_1", "pytorch_model"), ("checkpoint-500", "global_step500")):
        write_zero(tmp_path / checkpoint / tag, params(), 1, 1)
        (tmp_path / checkpoint / "latest").write_text(tag)
        (tmp_path / checkpoint / "config.json").write_text("{}")
        found = find(tmp_path / checkpoint)
        assert (found.root, found.parts[0].format) == (tmp_path / checkpoint, "deepspeed")
        assert tmp_path / checkpoint in found.companions
    assert find(tmp_path).step == 500


@pytest.mark.parametrize(
    "names",
    [
        ["latest", "zero/notes.txt"],
        ["zero/a/exp_avg.pt", "notes.txt"],
        ["latest/a.txt", "optim_states.txt"],
        ["mp_rank_00/model_optim_rng.txt"],
    ],
)
def test_other_directories_are_not_taken_for_deepspeeds(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("../elsewhere")
    with contextlib.suppress(NotFound):
        assert all(part.format != "deepspeed" for part in find(tmp_path).parts)
