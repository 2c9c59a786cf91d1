"""Megatron's rank files, held against what Megatron-Core itself says that each rank holds, and against real files."""

from __future__ import annotations

import argparse
import enum
import re
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import megatron_ranks
from reshard.errors import Corrupt, Incomplete, InputError, Unsupported
from reshard.formats import megatron
from reshard.formats.megatron import MegatronCheckpoint

DATA = Path(__file__).parent / "data" / "megatron"
State = dict[str, torch.Tensor]
needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


def opened(path: Path, *, verify: bool = False) -> MegatronCheckpoint:
    return megatron.open_located(megatron.locate(path), verify=verify)


def tensors_of(path: Path, *, verify: bool = False) -> State:
    return {name: as_torch(t.numpy()) for name, t in opened(path, verify=verify).checkpoint.items()}


def as_torch(array: NDArray[Any]) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("i2").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert different == []


# --------------------------------------------------------------------------------------- against Megatron-Core's models


def save_rank(folder: str, settings: dict[str, Any]) -> list[megatron_ranks.Chunk]:
    """One rank: its file as Megatron-LM writes it, and what Megatron-Core says is in it."""
    from megatron.core import parallel_state as state

    torch.manual_seed(0)  # on the CPU every rank makes the whole tensor and keeps its part
    model = megatron_ranks.gpt_model(**settings)
    sizes = {
        "tensor_model_parallel_size": state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": state.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": state.get_expert_model_parallel_world_size(),
    }
    name = f"mp_rank_{state.get_tensor_model_parallel_rank():02d}"
    if sizes["pipeline_model_parallel_size"] > 1:
        name += f"_{state.get_pipeline_model_parallel_rank():03d}"
    if sizes["expert_model_parallel_size"] > 1:
        name += f"_{state.get_expert_model_parallel_rank():03d}"
    directory = Path(folder) / "iter_0000007" / name
    directory.mkdir(parents=True, exist_ok=True)
    args = argparse.Namespace(
        num_layers=settings.get("num_layers", 2), num_experts=settings.get("num_moe_experts"), swiglu=True,
        untie_embeddings_and_output_weights=True, **sizes,
    )  # fmt: skip
    content = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": model.state_dict_for_save_checkpoint()}
    torch.save(content, directory / "model_optim_rng.pt")
    return megatron_ranks._chunks(model, stacked=False)


def under_module_names(stored: State, like: set[str]) -> State:
    """What Megatron-Core stores, under the names that its modules have: `like` says which."""
    found: State = {}
    for name, tensor in stored.items():
        prefix, _, rest = name.partition(".mlp.experts.experts.")
        if rest:
            module, kind = rest.split(".")
            found |= {f"{prefix}.mlp.experts.local_experts.{e}.{module}.{kind}": t for e, t in enumerate(tensor)}
            continue
        module = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        module = module.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        found[module if module in like else name] = tensor
    return found


@needs_megatron
@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, settings",
    [
        ({"tensor": 2, "pipeline": 2}, {"num_layers": 4, "add_qkv_bias": True}),
        ({"pipeline": 2}, {"num_layers": 3, "num_layers_in_first_pipeline_stage": 1}),
        ({"tensor": 2}, {"gated_linear_unit": False, "add_bias_linear": True, "qk_layernorm": True}),
        ({"tensor": 2, "expert": 2, "num_ranks": 4}, {"num_moe_experts": 4, "moe_ffn_hidden_size": 48}),
        ({"pipeline": 2, "expert": 2, "num_ranks": 4}, {"num_layers": 2, "num_moe_experts": 4}),
    ],
    ids=["tp2pp2", "uneven pp2", "tp2 ungated with biases", "tp2ep2", "pp2ep2"],
)
def test_ranks_of_megatron_core_are_put_together_as_it_does(
    tmp_path: Path, mesh: dict[str, int], settings: dict[str, Any]
) -> None:
    chunks = megatron_ranks.on_ranks(save_rank, str(tmp_path), settings, **mesh)
    actual = tensors_of(tmp_path, verify=True)
    assert_same(actual, under_module_names(megatron_ranks.whole(chunks), set(actual)))


# --------------------------------------------------------------------------------------------------------- real files


def test_tensor_and_pipeline_ranks_of_megatron_lm_are_the_model_that_one_rank_saved() -> None:
    whole = torch_load(DATA / "legacy_llama" / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt")["model"]
    expected = {name: t for name, t in whole.items() if "_extra_state" not in name}
    actual = tensors_of(DATA / "legacy_llama_tp2pp2", verify=True)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):  # the vocabulary is padded for the ranks
        assert actual[name].shape[0] == 512
        actual[name], expected[name] = actual[name][:323], expected[name][:323]
    assert_same(actual, expected)


def test_mamba_parts_of_two_ranks_are_those_that_megatron_bridge_stores_apart() -> None:
    stored = torch_dcp(DATA / "nemotron_h" / "iter_0000000")
    parts = {"in_proj.weight": "z x B C dt", "conv1d.weight": "x B C", "conv1d.bias": "x B C"}
    actual = tensors_of(DATA / "legacy_nemotron_h_tp2", verify=True)
    assert len(actual) == 40
    for name, tensor in actual.items():
        disk = name.replace("conv1d_", "conv1d.")
        fused = next((key for key in parts if disk.endswith("mixer." + key)), None)
        expert = re.fullmatch(r"(.*\.experts\.)(linear_fc[12]\.weight)(\d+)", name)
        if fused:
            expected = torch.cat([stored[f"{disk}.{part}"] for part in parts[fused].split()])
        elif expert:
            expected = stored[f"{expert[1]}experts.{expert[2]}"][int(expert[3])]
        else:
            expected = stored[disk]
        assert torch.equal(tensor[: len(expected)], expected), name


def torch_load(path: Path) -> dict[str, Any]:
    """With every class of the arguments taken for a placeholder."""
    import pickle
    import types

    class Placeholder(argparse.Namespace):
        def __init__(self, *_: Any) -> None:
            pass

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return (
                Placeholder
                if module.split(".")[0] in ("megatron", "argparse", "signal")
                else super().find_class(module, name)
            )

    stand_in = types.ModuleType("stand_in")
    stand_in.Unpickler, stand_in.load = Unpickler, lambda f, **k: Unpickler(f, **k).load()  # type: ignore[attr-defined]
    found: dict[str, Any] = torch.load(path, weights_only=False, pickle_module=stand_in)
    return found


def torch_dcp(path: Path) -> State:
    """Every tensor of a DCP as torch reads it."""
    import torch.distributed.checkpoint as torch_checkpoint

    described = torch_checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    state: State = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in described.items()
        if isinstance(about, torch_checkpoint.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        torch_checkpoint.load(state, checkpoint_id=path)
    return state


def test_a_single_rank_and_its_settings() -> None:
    found = opened(DATA / "legacy_llama")
    assert (found.located.format, found.located.iteration, found.checkpoint_version) == ("megatron_legacy", 10, 3.0)
    assert (found.optimizer, found.left_out["extra_state"], found.stacked) == ("none", 22, False)
    values = found.settings.values
    assert (values["num_layers"], values["activation_func"], values["gated_linear_unit"]) == (4, "silu", True)
    assert (values["share_embeddings_and_output_weights"], values["layernorm_epsilon"]) == (False, 1e-6)
    assert str(opened(DATA / "legacy_llama_tp2pp2").settings.layout) == "tp 2, pp 2"


# ---------------------------------------------------------------------------------------------------- ranks made here


def random(*shape: int) -> torch.Tensor:
    return torch.rand(shape).to(torch.bfloat16)


class Kind(enum.Enum):
    """Stands for the enums among the arguments, which no reader can import."""

    ONE = 1


def save(folder: Path, files: Mapping[str, Any], **args: Any) -> Path:
    """A checkpoint of rank files: {directory: the model, or the model's chunks}."""
    given = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1}
    namespace = argparse.Namespace(**(given | {"kind": Kind.ONE} | args))
    for name, model in files.items():
        (folder / name).mkdir(parents=True)
        chunks = {f"model{i}": m for i, m in enumerate(model)} if isinstance(model, list) else {"model": model}
        content = {"args": namespace, "checkpoint_version": 3.0, "iteration": 3, **chunks}
        torch.save(content, folder / name / "model_optim_rng.pt")
    return folder


def test_chunks_of_an_interleaved_pipeline_take_turns(tmp_path: Path) -> None:
    """Chunk c of stage p has layer c * 2 + p, when each has one."""
    layers = [random(4, 4) for _ in range(4)]
    named = [{"decoder.layers.0.mlp.router.weight": layer} for layer in layers]
    named[0]["embedding.word_embeddings.weight"] = random(8, 4)
    named[3]["decoder.final_layernorm.weight"] = random(4)
    save(
        tmp_path, {"mp_rank_00_000": [named[0], named[2]], "mp_rank_00_001": [named[1], named[3]]},
        num_layers=4, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2,
    )  # fmt: skip
    actual = tensors_of(tmp_path)
    assert len(actual) == 6
    for number, layer in enumerate(layers):
        assert torch.equal(actual[f"decoder.layers.{number}.mlp.router.weight"], layer)


def test_layers_that_do_not_add_up_to_the_model_are_an_error_that_counts_them(tmp_path: Path) -> None:
    save(tmp_path, {"mp_rank_00": {"decoder.layers.0.mlp.router.weight": random(4, 4)}}, num_layers=2)
    with pytest.raises(Incomplete, match=r"1 layers in the files \(stage 0, chunk 0: 1\), 2 in the settings"):
        opened(tmp_path)


def test_the_second_number_is_the_expert_rank_when_the_arguments_say_so(tmp_path: Path) -> None:
    experts = {f"decoder.layers.0.mlp.experts.linear_fc2.weight{e}": random(4, 3) for e in range(4)}
    router = {"decoder.layers.0.mlp.router.weight": random(4, 4)}
    halves = [list(experts.values())[:2], list(experts.values())[2:]]
    files = {
        f"mp_rank_00_00{rank}": router
        | {f"decoder.layers.0.mlp.experts.linear_fc2.weight{i}": t for i, t in enumerate(half)}
        for rank, half in enumerate(halves)
    }
    save(tmp_path, files, num_layers=1, expert_model_parallel_size=2)
    assert_same(tensors_of(tmp_path, verify=True), experts | router)


@pytest.mark.parametrize("is_expert", [True, False])
def test_without_arguments_the_final_norm_tells_what_the_second_number_is(tmp_path: Path, is_expert: bool) -> None:
    """verl's files hold the state dicts alone; every expert rank has the norm, and just the last stage."""
    norm = {"decoder.final_layernorm.weight": random(4)}
    for rank in range(2):
        directory = tmp_path / "global_step_5" / "actor" / "model" / f"mp_rank_00_00{rank}"
        directory.mkdir(parents=True)
        state = {"decoder.layers.0.mlp.experts.linear_fc2.weight0": random(4, 3)}
        torch.save([state | (norm if rank or is_expert else {})], directory / "model.pt")
    found = opened(tmp_path)
    expected = ["decoder.layers.0.mlp.experts.linear_fc2.weight0"]
    expected += [
        expected[0].replace("weight0", "weight1") if is_expert else expected[0].replace("layers.0", "layers.1")
    ]
    assert sorted(found.checkpoint) == sorted([*expected, "decoder.final_layernorm.weight"])
    assert (found.located.writer, found.located.iteration) == ("verl", 5)


def test_names_of_stages_as_nemo_1_writes_them(tmp_path: Path) -> None:
    for stage in range(2):
        directory = tmp_path / f"tp_rank_00_pp_rank_00{stage}"
        directory.mkdir()
        torch.save({"model.decoder.layers.0.mlp.router.weight": random(2, 2)}, directory / "model_weights.ckpt")
    assert sorted(opened(tmp_path).checkpoint) == [f"model.decoder.layers.{n}.mlp.router.weight" for n in range(2)]


def test_experts_of_the_old_grouped_mlp_are_cut_apart_and_transposed(tmp_path: Path) -> None:
    """Its own forward pass views weight1 as (experts, hidden, rows) and weight2 as (experts, columns, hidden)."""
    num_experts, hidden, width = 3, 4, 5
    weight1, weight2 = random(hidden, num_experts * 2 * width), random(num_experts * width, hidden)
    prefix = "decoder.layers.0.mlp.experts."
    save(
        tmp_path, {"mp_rank_00": {prefix + "weight1": weight1, prefix + "weight2": weight2}},
        num_layers=1, num_experts=num_experts, hidden_size=hidden,
    )  # fmt: skip
    expected = {
        f"{prefix}linear_fc1.weight{e}": weight1.view(num_experts, hidden, -1)[e].T for e in range(num_experts)
    } | {f"{prefix}linear_fc2.weight{e}": weight2.view(num_experts, -1, hidden)[e].T for e in range(num_experts)}
    assert_same(tensors_of(tmp_path), expected)


def test_parts_of_a_gated_delta_net_are_put_together_part_by_part(tmp_path: Path) -> None:
    key, value, heads, prefix = 4, 12, 2, "decoder.layers.0.self_attention."
    names = ["query", "key", "value", "z", "beta", "alpha"]
    sizes = dict(zip(names, (key, key, value, value, heads, heads), strict=True))
    ranks = [{name: random(size, 6) for name, size in sizes.items()} for _ in range(2)]
    convs = [{name: random(sizes[name], 1, 3) for name in names[:3]} for _ in range(2)]
    outs, logs = [random(6, value) for _ in range(2)], [random(heads) for _ in range(2)]
    files = {
        f"mp_rank_0{r}": {
            prefix + "in_proj.weight": torch.cat(list(ranks[r].values())),
            prefix + "conv1d.weight": torch.cat(list(convs[r].values())),
            prefix + "out_proj.weight": outs[r],
            prefix + "A_log": logs[r],
        }
        for r in range(2)
    }
    save(tmp_path, files, num_layers=1, tensor_model_parallel_size=2)
    expected = {
        prefix + "in_proj.weight": torch.cat([torch.cat([rank[name] for rank in ranks]) for name in names]),
        prefix + "conv1d.weight": torch.cat([torch.cat([conv[name] for conv in convs]) for name in names[:3]]),
        prefix + "out_proj.weight": torch.cat(outs, 1),
        prefix + "A_log": torch.cat(logs),
    }
    assert_same(tensors_of(tmp_path), expected)


def test_the_copy_of_a_tied_embedding_on_the_last_stage_is_left_out(tmp_path: Path) -> None:
    embedding, layer = random(8, 4), "decoder.layers.0.mlp.router.weight"
    first = {"embedding.word_embeddings.weight": embedding, layer: random(2, 4)}
    save(
        tmp_path,
        {"mp_rank_00_000": first, "mp_rank_00_001": {"output_layer.weight": embedding.clone(), layer: random(2, 4)}},
        num_layers=2, pipeline_model_parallel_size=2, untie_embeddings_and_output_weights=False,
    )  # fmt: skip
    assert "output_layer.weight" not in tensors_of(tmp_path, verify=True)


# ------------------------------------------------------------------------------------------------------ what is refused


def two_ranks(tmp_path: Path, change: Callable[[list[State]], None], **args: Any) -> Path:
    shared = {"decoder.layers.0.input_layernorm.weight": random(4), "decoder.layers.0.mlp.router.weight": random(2, 4)}
    ranks = [dict(shared) | {"decoder.layers.0.mlp.linear_fc2.weight": random(4, 3)} for _ in range(2)]
    change(ranks)
    files = {f"mp_rank_0{rank}": state for rank, state in enumerate(ranks)}
    return save(tmp_path, files, **({"num_layers": 1, "tensor_model_parallel_size": 2} | args))


def change_norm(ranks: list[State]) -> None:
    ranks[1]["decoder.layers.0.input_layernorm.weight"] = random(4)


def change_shape(ranks: list[State]) -> None:
    ranks[1]["decoder.layers.0.mlp.linear_fc2.weight"] = random(4, 2)


def add_unknown(ranks: list[State]) -> None:
    for rank in ranks:
        rank["decoder.layers.0.mlp.novel.weight"] = random(3, 3)


def add_fc1_of_odd_size(ranks: list[State]) -> None:
    for rank in ranks:
        rank["decoder.layers.0.mlp.linear_fc1.weight"] = random(7, 4)


def add_fused_without_neighbours(ranks: list[State]) -> None:
    for rank in ranks:
        rank["decoder.layers.0.mixer.in_proj.weight"] = random(7, 4)


def add_old_names(ranks: list[State]) -> None:
    ranks[0]["decoder.layers.0.attention.query_key_value.weight"] = random(3, 3)


@pytest.mark.parametrize(
    "change, args, error, message",
    [
        (change_norm, {}, Corrupt, "input_layernorm.weight should be the same on all ranks"),
        (change_shape, {}, Corrupt, "linear_fc2.weight differs between tensor ranks"),
        (add_unknown, {}, Unsupported, "novel.weight differs between .* no rule"),
        (add_fc1_of_odd_size, {}, Corrupt, "linear_fc1.weight has 7 rows on a rank, its linear_fc2 3 columns"),
        (add_fused_without_neighbours, {}, Unsupported, "in_proj.weight cannot be cut"),
        (add_old_names, {}, Unsupported, "from before Megatron-Core"),
        (lambda _: None, {"tensor_model_parallel_size": 3}, Incomplete, "1 of 3 ranks are missing: mp_rank_02"),
        (lambda _: None, {"pipeline_model_parallel_size": 2}, Incomplete, "mp_rank_00_001, mp_rank_01_001"),
        (lambda _: None, {"moe_mlp_glu_interleave_size": 32}, Unsupported, "interleaved"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(
    tmp_path: Path, change: Callable[[list[State]], None], args: dict[str, Any], error: type[InputError], message: str
) -> None:
    two_ranks(tmp_path, change, **args)
    with pytest.raises(error, match=message):
        opened(tmp_path)


def test_a_rank_that_was_copied_over_another_is_recognised(tmp_path: Path) -> None:
    def copy(ranks: list[State]) -> None:
        ranks[1] = {name: tensor.clone() for name, tensor in ranks[0].items()}

    two_ranks(tmp_path, copy)
    with pytest.raises(Corrupt, match=r"tensor rank 0, .* and tensor rank 1, .* hold the same weights"):
        opened(tmp_path)


def test_ranks_that_hold_zeros_alone_are_no_copies(tmp_path: Path) -> None:
    def zero(ranks: list[State]) -> None:
        for rank in ranks:
            rank["decoder.layers.0.mlp.linear_fc2.weight"] = torch.zeros(4, 30)

    two_ranks(tmp_path, zero)
    assert opened(tmp_path).checkpoint.tensors["decoder.layers.0.mlp.linear_fc2.weight"].shape == (4, 60)


def test_experts_cut_over_other_ranks_than_the_rest_are_refused(tmp_path: Path) -> None:
    def add(ranks: list[State]) -> None:
        for rank in ranks:
            rank["decoder.layers.0.mlp.experts.linear_fc2.weight0"] = random(4, 3)

    two_ranks(tmp_path, add, expert_tensor_parallel_size=1)
    with pytest.raises(Unsupported, match="experts are cut over 1 ranks and the rest over 2"):
        opened(tmp_path)


def test_the_nested_models_of_before_megatron_core_are_refused(tmp_path: Path) -> None:
    save(tmp_path, {"mp_rank_00": {"language_model": {"encoder": {"layers.0.weight": random(2, 2)}}}})
    with pytest.raises(Unsupported, match="from before Megatron-Core"):
        opened(tmp_path)


class Float8Tensor(torch.Tensor):
    """Stands for Transformer Engine's."""


def test_weights_of_a_tensor_subclass_are_refused_by_name(tmp_path: Path) -> None:
    weight = torch.Tensor._make_subclass(Float8Tensor, torch.zeros(4, 4, dtype=torch.uint8))
    save(tmp_path, {"mp_rank_00": {"decoder.layers.0.mlp.linear_fc1.weight": weight}})
    with pytest.raises(Unsupported, match=r"decoder\.layers\.0\.mlp\.linear_fc1\.weight is a Float8Tensor"):
        opened(tmp_path)


def test_a_rank_directory_without_its_file_is_incomplete(tmp_path: Path) -> None:
    two_ranks(tmp_path, lambda _: None)
    (tmp_path / "mp_rank_01" / "model_optim_rng.pt").unlink()
    with pytest.raises(Incomplete, match="mp_rank_01 holds none of"):
        opened(tmp_path)


def test_the_optimizer_in_and_beside_the_files_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a", {"mp_rank_00": {"decoder.layers.0.mlp.router.weight": random(2, 2)}}, num_layers=1)
    (tmp_path / "a" / "mp_rank_00" / "distrib_optim.pt").write_bytes(b"")
    assert opened(tmp_path / "a").optimizer == "distrib_optim.pt"


def test_nothing_but_headers_is_read_to_open(tmp_path: Path) -> None:
    two_ranks(tmp_path, lambda _: None)
    found = opened(tmp_path)
    path = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    data = bytearray(path.read_bytes())
    stored = found.checkpoint["decoder.layers.0.mlp.linear_fc2.weight"].numpy()
    at = data.find(np.ascontiguousarray(stored[:, :3]).tobytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    assert sorted(opened(tmp_path).checkpoint) == sorted(found.checkpoint)
