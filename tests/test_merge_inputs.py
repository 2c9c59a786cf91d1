"""Sources as users name them that are not quite a sharded model, and outputs that must not be replaced."""

from __future__ import annotations

import json
import shlex
import shutil
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import reshard
import tiny_models
import workspace
from checkpoints import equals, left_in, model, same, write_dcp
from reshard.cli.main import main
from reshard.errors import Incomplete, Mismatch, NotFound, OutputError, ReshardError, Unsupported


@pytest.mark.parametrize("name", ["w.pt", "w/model_world_size_1_rank_0.pt"])
def test_a_file_of_one_bare_tensor_is_merged(tmp_path: Path, name: str) -> None:
    (tmp_path / "w").mkdir()
    torch.save(torch.arange(6.0).reshape(2, 3), tmp_path / name)
    wanted = {"tensor": torch.arange(6.0).reshape(2, 3)}
    reshard.merge(tmp_path / name, tmp_path / "out.safetensors")
    assert equals(tmp_path / "out.safetensors", wanted)
    reshard.merge(tmp_path / name, tmp_path / "all.pt", what="all")
    assert same(torch.load(tmp_path / "all.pt")["tensor"], wanted["tensor"])


def test_what_cannot_be_read_is_in_nobodys_way_once_it_is_left_out(tmp_path: Path) -> None:
    saved = {"w": torch.ones(2), "model_sparse": torch.eye(3).to_sparse()}
    torch.save({"model": saved}, tmp_path / "saved.pt")
    with pytest.raises(Unsupported, match="model_sparse is a sparse tensor"):
        reshard.merge(tmp_path / "saved.pt", tmp_path / "out.safetensors")
    reshard.merge(tmp_path / "saved.pt", tmp_path / "out.safetensors", exclude=("*sparse",))
    assert equals(tmp_path / "out.safetensors", {"w": saved["w"]})


def test_a_copy_that_shares_the_models_storage_is_not_the_model(tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    torch.save({"model": state, "model_ema": state}, tmp_path / "saved.pt")
    reshard.merge(tmp_path / "saved.pt", tmp_path / "out.safetensors", keep_names=True)
    assert equals(tmp_path / "out.safetensors", {"model.w": state["w"]})


# ------------------------------------------------------------------------------------------------ which of several


def test_a_step_is_taken_from_a_run_that_holds_its_final_model_too(tmp_path: Path) -> None:
    for step in (400, 500):
        write_dcp(tmp_path / f"run/checkpoint-{step}/pytorch_model_fsdp_0", model(1, seed=step), prefix=("model",))
    save_file(model(1, seed=600), tmp_path / "run/model.safetensors")
    reshard.merge(tmp_path / "run", tmp_path / "step", step=400)
    assert equals(tmp_path / "step", model(1, seed=400))
    merged = reshard.merge(tmp_path / "run", tmp_path / "final")
    assert equals(tmp_path / "final", model(1, seed=600))
    assert [notice for notice in merged.notices if "as none of the steps 400, 500 is named" in notice]
    with pytest.raises(NotFound, match="no checkpoint of step 7"):
        reshard.merge(tmp_path / "run", tmp_path / "none", step=7)


def test_a_step_that_nothing_confirms_is_told(tmp_path: Path) -> None:
    write_dcp(tmp_path / "some", model(1))
    merged = reshard.merge(tmp_path / "some", tmp_path / "out", step=4)
    assert [notice for notice in merged.notices if "--step 4 chose nothing" in notice]


def test_names_that_the_config_does_not_know_are_told(tmp_path: Path) -> None:
    both = {f"{who}.{fqn}": t for who in ("student", "teacher") for fqn, t in workspace.state_of().items()}
    torch.save({"state_dict": both}, tmp_path / "both.ckpt")
    base = str(workspace.write_base(tmp_path / "base"))
    merged = reshard.merge(tmp_path / "both.ckpt", tmp_path / "out", base=base)
    assert [notice for notice in merged.notices if f"{len(both)} of {len(both)} tensors have names" in notice]
    merged = reshard.merge(tmp_path / "both.ckpt", tmp_path / "student", base=base, include=("student.*",))
    assert [notice for notice in merged.notices if "have names" in notice] == []
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student")


# ---------------------------------------------------------------------------------------- a model with an adapter in it


@pytest.fixture
def actor(tmp_path: Path) -> Path:
    """`actor/` of verl where LoRA was trained: the wrapped model's state dict, and the adapter's config beside it."""
    tensors = {}
    for fqn, tensor in workspace.state_of("llama", seed=4).items():
        name, leaf = f"base_model.model.{fqn}".rsplit(".", 1)
        adapted = name.endswith("q_proj")
        tensors[f"{name}.base_layer.{leaf}" if adapted else f"{name}.{leaf}"] = tensor
        if adapted:
            tensors[f"{name}.lora_A.default.weight"] = torch.full((4, tensor.shape[1]), 0.5)
            tensors[f"{name}.lora_B.default.weight"] = torch.full((tensor.shape[0], 4), 0.25)
    actor = workspace.write_rank_files(tmp_path / "global_step_5/actor", tensors)
    workspace.write_base(actor / "huggingface")
    (actor / "lora_adapter").mkdir()
    (actor / "lora_adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    return actor


def test_a_model_with_an_adapter_in_it_is_not_written_as_one(actor: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="an adapter that was trained on it") as caught:
        reshard.merge(actor, tmp_path / "out")
    assert "--exclude '*lora_*'" in str(caught.value.hint)


def test_the_model_under_an_adapter_loads(actor: Path, tmp_path: Path) -> None:
    reshard.merge(actor, tmp_path / "out", exclude=("*lora_*",))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = tiny_models.make("llama", 4).state_dict()
    assert [fqn for fqn in wanted if not same(loaded[fqn], wanted[fqn])] == []


def test_inspect_says_how_a_model_under_an_adapter_is_merged(
    actor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(reshard.inspect(actor).next_command)
    assert words == ["reshard", "merge", str(actor), "OUT", "--exclude", "*lora_*"]
    assert main([*words[1:], "-q"]) == 0


def test_the_adapter_on_a_model_gets_the_names_that_peft_saves(actor: Path, tmp_path: Path) -> None:
    reshard.merge(actor, tmp_path / "out", include=("*lora_*",))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert name in load_file(tmp_path / "out/adapter_model.safetensors")
    assert (tmp_path / "out/adapter_config.json").is_file()


def test_an_adapter_is_not_told_to_bring_a_models_config(tmp_path: Path) -> None:
    workspace.write_adapter(tmp_path / "lora/checkpoint-5")
    merged = reshard.merge(tmp_path / "lora", tmp_path / "out")
    assert [notice for notice in merged.notices if "config.json" in notice] == []


# ------------------------------------------------------------------------------------------------ what must stay there


def test_a_view_of_a_storage_is_not_the_rest_of_it(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    torch.save({"a": whole[:5], "b": whole[5:]}, tmp_path / "saved.pt")
    with pytest.raises(OutputError, match="would lose what is not in the output: b"):
        reshard.merge(tmp_path / "saved.pt", tmp_path / "out.safetensors", include=("a",), remove_shards=True)
    assert (tmp_path / "saved.pt").is_file()
    reshard.merge(tmp_path / "saved.pt", tmp_path / "out.safetensors", remove_shards=True)
    assert equals(tmp_path / "out.safetensors", {"a": whole[:5], "b": whole[5:]})
    assert not (tmp_path / "saved.pt").exists()


@pytest.mark.parametrize("held", ["checkpoint-4", "pytorch_model_fsdp_0", "."])
def test_a_training_run_is_never_replaced(tmp_path: Path, held: str) -> None:
    write_dcp(tmp_path / "source", model(1))
    write_dcp(tmp_path / "run" / held, model(1, seed=1))
    before = left_in(tmp_path / "run")
    with pytest.raises(OutputError, match="holds the shards of a training run"):
        reshard.merge(tmp_path / "source", tmp_path / "run", force=True)
    assert left_in(tmp_path / "run") == before


def test_an_output_in_shards_of_a_training_system_may_be_replaced(tmp_path: Path) -> None:
    shutil.copytree(workspace.write_base(tmp_path / "hf"), tmp_path / "model")
    save_file(workspace.state_of(), tmp_path / "model/model.safetensors", {"format": "pt"})
    for _ in range(2):
        reshard.convert(tmp_path / "model", tmp_path / "megatron", to="torch_dist", force=True)
    assert reshard.verify(tmp_path / "megatron").ok
    write_dcp(tmp_path / "megatron/iter_0000010", model(1))
    with pytest.raises(OutputError, match="iter_0000010"):
        reshard.convert(tmp_path / "model", tmp_path / "megatron", to="torch_dist", force=True)


def test_a_model_that_is_in_the_way_is_replaced(tmp_path: Path) -> None:
    write_dcp(tmp_path / "source", model(1))
    tiny_models.make("llama").save_pretrained(tmp_path / "out")
    reshard.merge(tmp_path / "source", tmp_path / "out", force=True)
    assert equals(tmp_path / "out", model(1))


# --------------------------------------------------------------------------------------------------- slips of the pen


@pytest.mark.parametrize("verb", [["merge", "SRC", "OUT"], ["verify", "OUT"]])
def test_a_number_of_threads_is_at_least_one(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--threads", "-3"]) == 1
    assert "at least 1, not -3" in capsys.readouterr().err


def test_verify_says_that_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file or directory"):
        reshard.verify(tmp_path / "nothing")


def test_no_error_is_a_defect_of_ours_where_a_file_holds_nothing(tmp_path: Path) -> None:
    for number, saved in enumerate(({}, [], None, 3, "text", {"model": {}}, {"optimizer": {}})):
        torch.save(saved, tmp_path / f"{number}.pt")
        for kind in ("model", "all", "optimizer"):
            with pytest.raises(ReshardError):
                reshard.merge(tmp_path / f"{number}.pt", tmp_path / "out.pt", what=kind)


@pytest.mark.parametrize("globs", ["*.up.weight", ["*.up.weight"]])
def test_one_glob_is_one_glob(tmp_path: Path, globs: str | list[str]) -> None:
    write_dcp(tmp_path / "source", model(2))
    reshard.merge(tmp_path / "source", tmp_path / "out.safetensors", include=globs)
    wanted = {fqn: tensor for fqn, tensor in model(2).items() if fqn.endswith(".up.weight")}
    assert equals(tmp_path / "out.safetensors", wanted)


def test_a_shard_size_may_be_a_number_of_bytes(tmp_path: Path) -> None:
    write_dcp(tmp_path / "source", model(2))
    reshard.merge(tmp_path / "source", tmp_path / "out", max_shard_size=4000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert reshard.verify(tmp_path / "out", tmp_path / "source").ok


def test_what_is_merged_is_one_of_three(tmp_path: Path) -> None:
    write_dcp(tmp_path / "source", model(1))
    with pytest.raises(Unsupported, match="what='weights'"):
        reshard.merge(tmp_path / "source", tmp_path / "out", what="weights")


def test_a_lazy_tensor_is_indexed_as_numpys_or_says_why_not(tmp_path: Path) -> None:
    write_dcp(tmp_path / "source", {"w": torch.arange(24.0).reshape(2, 3, 4)})
    lazy = reshard.open(tmp_path / "source")["w"]
    array = torch.arange(24.0).reshape(2, 3, 4).numpy()
    for index in (..., (..., 0), (1, ...), (0, ..., slice(1, 3)), (slice(None), ..., -1), (1, 2, 3, ...)):
        assert np.array_equal(lazy[index].numpy(), array[index])
    for strange in (None, True, [0, 1], np.array([True, False]), (..., ...), "w"):
        with pytest.raises(IndexError):
            lazy[strange]


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_a_pointer_that_git_left_is_told_from_a_damaged_file(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (tmp_path / name).write_text(pointer)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(Incomplete, match="Git LFS pointer") as caught:
        reshard.merge(tmp_path, tmp_path / "out.safetensors")
    assert caught.value.hint == "git lfs pull"


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensor", "model.nemo"])
def test_the_name_of_a_file_that_is_not_written_makes_no_directory(tmp_path: Path, name: str) -> None:
    write_dcp(tmp_path / "source", model(1))
    with pytest.raises(Unsupported, match="writes no"):
        reshard.merge(tmp_path / "source", tmp_path / name)
    reshard.merge(tmp_path / "source", tmp_path / "Llama-3.1-8B")
    assert equals(tmp_path / "Llama-3.1-8B", model(1))


def test_names_are_kept_with_what_wrappers_added_where_that_tells_them_apart(tmp_path: Path) -> None:
    saved = {"w": torch.ones(1), "_orig_mod.w": torch.zeros(1)}
    torch.save(saved, tmp_path / "saved.pt")
    with pytest.raises(Mismatch, match="would get one name"):
        reshard.merge(tmp_path / "saved.pt", tmp_path / "out.safetensors")
    reshard.merge(tmp_path / "saved.pt", tmp_path / "out.safetensors", keep_names=True)
    assert equals(tmp_path / "out.safetensors", saved)


def test_a_name_that_safetensors_keeps_for_itself_is_not_written_there(tmp_path: Path) -> None:
    torch.save({"__metadata__": torch.ones(1)}, tmp_path / "saved.pt")
    with pytest.raises(Unsupported, match="__metadata__"):
        reshard.merge(tmp_path / "saved.pt", tmp_path / "out.safetensors")
    reshard.merge(tmp_path / "saved.pt", tmp_path / "out.pt")
    assert same(torch.load(tmp_path / "out.pt")["__metadata__"], torch.ones(1))


def test_shards_go_when_the_output_holds_their_objects_too(tmp_path: Path) -> None:
    write_dcp(tmp_path / "source", model(1), prefix=("model",), objects={"epoch": 3})
    for output, what in (("out.safetensors", "all"), ("out.pt", "model")):
        with pytest.raises(OutputError, match="would lose what is not in the output: epoch"):
            reshard.merge(tmp_path / "source", tmp_path / output, what=what, remove_shards=True)
    reshard.merge(tmp_path / "source", tmp_path / "out.pt", what="all", remove_shards=True)
    assert torch.load(tmp_path / "out.pt")["epoch"] == 3
    assert not (tmp_path / "source").exists()


def test_what_each_rank_keeps_for_itself_is_not_removed(tmp_path: Path) -> None:
    for rank in range(2):
        held = {"w": torch.ones(2), "seed": rank}
        (tmp_path / "source").mkdir(exist_ok=True)
        torch.save(held, tmp_path / f"source/model_world_size_2_rank_{rank}.pt")
    with pytest.raises(OutputError, match="would lose what is not in the output: seed"):
        reshard.merge(tmp_path / "source", tmp_path / "out.pt", what="all", remove_shards=True)


def test_what_each_rank_keeps_beside_an_optimizer_of_one_save_is_not_removed(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / "source").mkdir(exist_ok=True)
        torch.save({"w": torch.ones(2), "seed": rank}, tmp_path / f"source/pytorch_model_fsdp_rank{rank}.bin")
    write_dcp(tmp_path / "source/optimizer_0", {"state.w.exp_avg": torch.ones(2)})
    with pytest.raises(OutputError, match="would lose what is not in the output: seed"):
        reshard.merge(tmp_path / "source", tmp_path / "out.pt", what="all", remove_shards=True)


def test_all_of_a_file_holds_the_tensors_inside_of_its_objects(tmp_path: Path) -> None:
    saved = {"model": {"w": torch.ones(2)}, "window": deque([torch.arange(3.0)]), "seen": Counter("aab")}
    torch.save(saved, tmp_path / "saved.pt")
    reshard.merge(tmp_path / "saved.pt", tmp_path / "all.pt", what="all")
    found = torch.load(tmp_path / "all.pt", weights_only=False)
    assert same(found["window"][0], torch.arange(3.0))
    assert found["seen"] == saved["seen"]
    assert same(found["model"]["w"], torch.ones(2))


def test_all_holds_the_averaged_weights_beside_the_others(tmp_path: Path) -> None:
    trained, averaged = workspace.state_of(seed=1), workspace.state_of(seed=2)
    workspace.write_lmms(tmp_path / "run/checkpoint-4", trained, ema=averaged)
    reshard.merge(tmp_path / "run", tmp_path / "all.pt", what="all")
    found = torch.load(tmp_path / "all.pt")
    assert all(same(found[fqn], tensor) for fqn, tensor in trained.items())
    assert all(same(found["ema"][fqn], tensor) for fqn, tensor in averaged.items())
    assert found["optimizer"].keys() == trained.keys()


def test_counted_parameters_of_an_optimizer_file_are_counted_in_all(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0], "betas": (0.9, 1)}]}
    for rank in range(2):
        torch.save({"w": torch.ones(2)}, tmp_path / f"ckpt/model_world_size_2_rank_{rank}.pt")
        torch.save(state, tmp_path / f"ckpt/optim_world_size_2_rank_{rank}.pt")
    reshard.merge(tmp_path / "ckpt", tmp_path / "all.pt", what="all")
    found = torch.load(tmp_path / "all.pt")["optimizer"]
    assert found["param_groups"] == state["param_groups"]
    assert same(found["state"][0]["exp_avg"], torch.ones(2))


def test_all_without_what_wrappers_added_is_nested_as_before(tmp_path: Path) -> None:
    names = ("_orig_mod.layers.0._checkpoint_wrapped_module.w", "module._fsdp_wrapped_module.head")
    saved = {"model": {fqn: torch.ones(2) for fqn in names}, "state": {"lr": {"last": 0.1}}, "runs": {3: torch.ones(1)}}
    torch.save(saved, tmp_path / "saved.pt")
    reshard.merge(tmp_path / "saved.pt", tmp_path / "all.pt", what="all")
    found = torch.load(tmp_path / "all.pt")
    assert list(found["model"]) == ["layers.0.w", "module.head"]
    assert found["state"] == saved["state"]
    assert list(found["runs"]) == [3]
    assert reshard.verify(tmp_path / "all.pt", tmp_path / "saved.pt").ok
    reshard.merge(tmp_path / "saved.pt", tmp_path / "kept.pt", what="all", keep_names=True)
    assert list(torch.load(tmp_path / "kept.pt")["model"]) == ["layers.0.w", "module.head"]


def test_numbers_that_a_narrow_dtype_has_no_room_for_are_told(tmp_path: Path) -> None:
    values = torch.tensor([1e6, -1e6, 65504.0, 65519.0, 1.0, float("inf"), float("nan")])
    torch.save({"big": values.repeat(3), "small": torch.ones(3)}, tmp_path / "model.pt")
    half = reshard.merge(tmp_path / "model.pt", tmp_path / "half.safetensors", dtype="float16")
    assert [n for n in half.notices if "beyond" in n] == [
        "big: 6 numbers are beyond the range of float16, and became infinite or NaN in it"
    ]
    assert torch.equal(load_file(tmp_path / "half.safetensors")["big"][:6], values[:6].half())
    eight = reshard.merge(tmp_path / "model.pt", tmp_path / "eight.safetensors", dtype="float8_e4m3fn")
    assert any(n.startswith("big: 12 numbers are beyond the range of float8_e4m3fn") for n in eight.notices)
    wide = reshard.merge(tmp_path / "model.pt", tmp_path / "wide.safetensors", dtype="bfloat16")
    assert not any("beyond" in n for n in wide.notices)


@pytest.mark.parametrize("name", [".", "consolidated.01.pth"])
def test_one_of_several_slices_is_no_model(tmp_path: Path, name: str) -> None:
    for number in range(2):
        torch.save(
            {"norm.weight": torch.ones(4), "wq.weight": torch.ones(2, 4)}, tmp_path / f"consolidated.0{number}.pth"
        )
    with pytest.raises(Unsupported, match="hold a slice of every tensor each"):
        reshard.merge(tmp_path / name, tmp_path / "out.safetensors")
    (tmp_path / "consolidated.01.pth").unlink()
    assert reshard.merge(tmp_path, tmp_path / "out.safetensors").num_tensors == 2
