"""Module names of transformers 5 to hub names and back, held against transformers itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

import tiny_models
from reshard.core.checkpoint import Checkpoint, Origin
from reshard.core.dtypes import dtype
from reshard.core.tensor import Literal, Tensor
from reshard.dialects import transformers as dialect
from reshard.errors import Incomplete, Mismatch
from reshard.formats import huggingface
from reshard.ops.tie import tie
from reshard.storage.files import LazySource
from reshard.storage.run import run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

COMPOSED = [name for name, values in tiny_models.CONFIGS.items() if "vision_config" in values]


def literal(array: np.ndarray[Any, Any]) -> Tensor:
    array = np.ascontiguousarray(array)
    return Literal(dtype(str(array.dtype)), array.shape, array.tobytes())


def checkpoint(tensors: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(tensors, Origin(Path("run"), "test"), LazySource())


def of_state_dict(state_dict: dict[str, torch.Tensor]) -> Checkpoint:
    return checkpoint({fqn: literal(tensor.numpy()) for fqn, tensor in state_dict.items()})


def values(tensors: Checkpoint) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {fqn: (lazy.shape, lazy.numpy().tobytes()) for fqn, lazy in tensors.items()}


def config_of(model: Any) -> dict[str, Any]:
    return dict(model.config.to_dict())


def with_tower_level(model: Any, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers leaves `vision_model.` out when it saves a model that was not loaded; the hub has it."""
    nested = "vision_config" in config_of(model) and config_of(model)["vision_config"].get("model_type")
    if nested not in ("clip_vision_model", "siglip_vision_model"):
        return state_dict
    return {fqn.replace("vision_tower.", "vision_tower.vision_model.", 1): t for fqn, t in state_dict.items()}


@pytest.mark.parametrize("model_type", [m for m in tiny_models.CONFIGS if m != "qwen3_vl_moe"])
def test_hub_names_are_those_that_transformers_saves(model_type: str) -> None:
    model = tiny_models.make(model_type)
    expected = with_tower_level(model, revert_weight_conversion(model, dict(model.state_dict())))
    actual = dialect.to_hub(of_state_dict(model.state_dict()), config_of(model))
    assert values(actual) == values(of_state_dict(expected))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "qwen2_5_vl", "llava"])
def test_tensors_come_in_the_order_in_which_transformers_writes_them(model_type: str) -> None:
    model = tiny_models.make(model_type)
    expected = with_tower_level(model, revert_weight_conversion(model, dict(model.state_dict())))
    assert list(dialect.to_hub(of_state_dict(model.state_dict()), config_of(model))) == list(expected)


@pytest.mark.parametrize("model_type", tiny_models.CONFIGS)
def test_joining_undoes_splitting(model_type: str) -> None:
    model = tiny_models.make(model_type)
    modules = of_state_dict(model.state_dict())
    back = dialect.to_modules(dialect.to_hub(modules, config_of(model)), config_of(model))
    assert values(back) == values(modules)


@pytest.mark.parametrize("model_type", tiny_models.CONFIGS)
def test_hub_names_stay_as_they_are(model_type: str) -> None:
    model = tiny_models.make(model_type)
    hub = replace(dialect.to_hub(of_state_dict(model.state_dict()), config_of(model)), notices=())
    assert dialect.to_hub(hub, config_of(model)) is hub


@pytest.mark.parametrize("model_type", tiny_models.CONFIGS)
def test_transformers_loads_the_result_and_computes_the_same(model_type: str, tmp_path: Path) -> None:
    model = tiny_models.make(model_type)
    opened = huggingface.open(tiny_models.save_modules(model, tmp_path / "run"))
    whole = tie(dialect.to_hub(opened, opened.config), opened.config)
    run(huggingface.plan(whole), tmp_path / "whole")
    loaded = tiny_models.load(model, tmp_path / "whole")
    assert torch.equal(tiny_models.logits(loaded), tiny_models.logits(model))
    for fqn, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[fqn], tensor), fqn


@pytest.mark.parametrize("model_type", COMPOSED)
def test_a_loaded_model_is_saved_under_the_names_it_was_loaded_from(model_type: str, tmp_path: Path) -> None:
    model = tiny_models.make(model_type)
    opened = huggingface.open(tiny_models.save_modules(model, tmp_path / "run"))
    whole = tie(dialect.to_hub(opened, opened.config), opened.config)
    run(huggingface.plan(whole), tmp_path / "whole")
    tiny_models.load(model, tmp_path / "whole").save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(whole)


def test_what_was_done_is_said() -> None:
    model = tiny_models.make("mixtral")
    result = dialect.to_hub(of_state_dict(model.state_dict()), config_of(model))
    (notice,) = result.notices
    assert notice.startswith("module names of transformers 5 to the hub's names of mixtral: 2 renamed (such as ")
    assert "model.layers.0.mlp.gate.weight -> model.layers.0.block_sparse_moe.gate.weight" in notice
    assert "4 fused tensors split into 18 of single experts" in notice


def test_module_names_of_transformers_4_keep_the_level_of_the_vision_tower() -> None:
    config = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}
    old = checkpoint({"model.vision_tower.vision_model.post_layernorm.bias": literal(np.ones(2, "f4"))})
    assert list(dialect.to_hub(old, config)) == ["vision_tower.vision_model.post_layernorm.bias"]


def test_experts_of_the_text_part_are_split_in_a_composed_model() -> None:
    model = tiny_models.make("internvl")
    names = set(dialect.to_hub(of_state_dict(model.state_dict()), config_of(model)))
    assert "language_model.model.layers.1.mlp.experts.2.up_proj.weight" in names


def test_turned_experts_are_recognised_whichever_way_they_are() -> None:
    config = {"model_type": "qwen3_vl_moe"}
    at = "model.language_model.layers.0.mlp.experts."
    gate_up, down = np.arange(60, dtype="f4").reshape(1, 6, 10), np.arange(30, dtype="f4").reshape(1, 10, 3)
    modules = checkpoint({at + "gate_up_proj": literal(gate_up), at + "down_proj": literal(down)})
    hub = dialect.to_hub(modules, config)
    assert np.array_equal(hub[at + "gate_up_proj"].numpy(), gate_up.transpose(0, 2, 1))
    assert np.array_equal(hub[at + "down_proj"].numpy(), down.transpose(0, 2, 1))
    assert values(dialect.to_hub(hub, config)) == values(hub)


def test_square_experts_are_left_as_transformers_reads_them() -> None:
    at = "model.language_model.layers.0.mlp.experts."
    modules = checkpoint(
        {at + "gate_up_proj": literal(np.ones((1, 4, 4), "f4")), at + "down_proj": literal(np.ones((1, 4, 2), "f4"))}
    )
    result = dialect.to_hub(modules, {"model_type": "qwen3_vl_moe"})
    assert result.tensors == modules.tensors
    assert result.notices == (
        f"square experts keep (E, out, in), which transformers 5 reads as it is: {at}gate_up_proj",
    )


@pytest.mark.parametrize("config", [None, {"model_type": "something_new"}])
def test_fused_experts_without_a_table_are_kept_and_said(config: dict[str, Any] | None) -> None:
    fused = checkpoint({"model.layers.0.mlp.experts.gate_up_proj": literal(np.ones((2, 4, 3), "f4"))})
    result = dialect.to_hub(fused, config)
    assert list(result) == list(fused)
    assert "fused experts are kept, as there is no table for" in result.notices[0]


@pytest.mark.parametrize("config", [None, {"model_type": "something_new"}])
def test_parts_without_a_table_are_kept_and_said(config: dict[str, Any] | None) -> None:
    part = checkpoint({"model.language_model.norm.weight": literal(np.ones(2, "f4"))})
    result = dialect.to_hub(part, config)
    assert list(result) == list(part)
    assert "names under model.language_model. are kept, as there is no table for" in result.notices[0]
    assert dialect.to_hub(part, {"model_type": "qwen3_vl"}) is part


def test_model_types_that_are_renamed_otherwise_are_said() -> None:
    result = dialect.to_hub(checkpoint({"a": literal(np.ones(1, "f4"))}), {"model_type": "kimi_linear"})
    assert "transformers 5 renames weights of kimi_linear, for which there is no table here" in result.notices[0]


def test_names_that_fit_neither_side_are_said() -> None:
    tensors = {"model.language_model.norm.weight": literal(np.ones(2, "f4")), "extra.bias": literal(np.ones(2, "f4"))}
    result = dialect.to_hub(checkpoint(tensors), {"model_type": "llava"})
    assert list(result) == ["extra.bias", "language_model.model.norm.weight"]
    assert result.notices[1] == "names that are neither module nor hub names of llava are kept: extra.bias"


@pytest.mark.parametrize("shape", [(2, 5, 3), (0, 4, 3), (4, 3)])
def test_experts_that_cannot_be_split_are_an_error(shape: tuple[int, ...]) -> None:
    odd = checkpoint({"model.layers.0.mlp.experts.gate_up_proj": literal(np.ones(shape, "f4"))})
    with pytest.raises(Mismatch, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj: shape .* is not that of fused"):
        dialect.to_hub(odd, {"model_type": "qwen3_moe"})


def test_two_tensors_of_one_name_are_an_error() -> None:
    one = literal(np.ones(2, "f4"))
    both = checkpoint({"model.visual.a.bias": one, "visual.a.bias": one})
    with pytest.raises(Mismatch, match=r"are both visual\.a\.bias on the hub"):
        dialect.to_hub(both, {"model_type": "qwen2_5_vl"})


def test_a_missing_expert_is_an_error() -> None:
    model = tiny_models.make("mixtral")
    hub = dialect.to_hub(of_state_dict(model.state_dict()), config_of(model))
    some = hub.select(fqn for fqn in hub if fqn != "model.layers.1.block_sparse_moe.experts.1.w3.weight")
    with pytest.raises(Incomplete, match="1 of 6 matrices of its experts are missing"):
        dialect.to_modules(some, config_of(model))


def test_no_model_type_has_two_rows_for_one_name() -> None:
    for model_type in {m for table in dialect.TABLES for m in table.model_types}:
        inner, outer = dialect.rows({"model_type": model_type})
        for sides in ([r.name for r in (*inner, *outer)], [r.hub for r in outer if not r.variant]):
            assert len(set(sides)) == len(sides), model_type
