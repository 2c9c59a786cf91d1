"""Megatron's directories: found from anywhere in them, opened with the model's settings, refused when damaged."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import reshard
from reshard.cli.main import main
from reshard.core.tensor import Tensor
from reshard.errors import Corrupt, Incomplete, InputError, NotFound, Unsupported
from reshard.formats import detect, megatron, megatron_settings
from reshard.formats.megatron import MegatronCheckpoint
from reshard.formats.megatron_settings import Layout, Settings, of_args, plain

DATA = Path(__file__).parent / "data" / "megatron"
EMBEDDING = "embedding.word_embeddings.weight"
MODEL = {EMBEDDING: torch.rand(8, 4), "decoder.layers.mlp.router.weight": torch.rand(2, 3, 4)}


def opened(path: Path, iteration: int | None = None) -> MegatronCheckpoint:
    return megatron.open_located(megatron.locate(path, iteration))


def save(path: Path, state: dict[str, Any] | None = None, *, backend: str | None = "torch_dist", **common: Any) -> Path:
    """A DCP of torch with Megatron's files beside it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        planner = torch_checkpoint.DefaultSavePlanner(flatten_state_dict=False)
        torch_checkpoint.save(state or dict(MODEL), checkpoint_id=path, planner=planner)
    if backend is not None:
        (path / "metadata.json").write_text(json.dumps({"sharded_backend": backend, "sharded_backend_version": 1}))
        torch.save({"checkpoint_version": 3.0, "iteration": 10} | common, path / "common.pt")
    return path


def run_of(root: Path, *iterations: int, tracker: str | None = None) -> Path:
    for iteration in iterations:
        save(root / f"iter_{iteration:07d}")
    if tracker is not None:
        (root / "latest_checkpointed_iteration.txt").write_text(tracker)
    return root


# ----------------------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize(
    "name, format, iteration, num_tensors, source, num_layers",
    [
        ("nemotron_h", "torch_dist", 0, 50, "run_config.yaml", 5),
        ("fsdp_gdn", "fsdp_dtensor", 0, 21, "args", 2),
        ("zarr_llama", "zarr", 10, 9, "args", 4),
        ("legacy_llama", "megatron_legacy", 10, 27, "args", 4),
        ("legacy_llama_tp2pp2", "megatron_legacy", 10, 27, "args", 4),
    ],
)
def test_real_directories_are_known_with_their_settings_from_anywhere_in_them(
    name: str, format: str, iteration: int, num_tensors: int, source: str, num_layers: int
) -> None:
    run = DATA / name
    weights = run / f"iter_{iteration:07d}"
    names = (".zarray", ".metadata", "model_optim_rng.pt")
    inside = [p for p in weights.rglob("*") if p.suffix == ".distcp" or p.name in names]
    for path in (run, weights, run / "latest_checkpointed_iteration.txt", *inside):
        found = opened(path)
        located = found.located
        assert (located.format, located.weights, located.iteration) == (format, weights, iteration)
        assert (len(found.checkpoint), found.settings.source) == (num_tensors, source)
        assert found.settings.values["num_layers"] == num_layers
        assert sorted(reshard.open(path)) == sorted(found.checkpoint)


def test_tensors_of_megatron_bridge_are_what_torch_reads() -> None:
    path = DATA / "nemotron_h" / "iter_0000000"
    described = torch_checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in described.items()
        if isinstance(about, torch_checkpoint.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        torch_checkpoint.load(state, checkpoint_id=path)
    found = opened(path)
    assert sorted(found.checkpoint) == sorted(state)
    for name, tensor in found.checkpoint.items():
        assert tensor.numpy().tobytes() == state[name].contiguous().view(torch.uint8).numpy().tobytes(), name
    assert (found.stacked, found.core, found.left_out["extra_state"]) == (False, "0.19 or later", 21)


def test_settings_of_megatron_bridge_are_plain_values() -> None:
    settings = opened(DATA / "nemotron_h").settings
    values = settings.values
    assert (values["activation_func"], values["params_dtype"], values["gated_linear_unit"]) == (
        "squared_relu", "bfloat16", False,
    )  # fmt: skip
    assert values["attention_backend"] == "flash"
    assert (settings.hf_model_id, settings.vocab_size, settings.layout) == (
        "hf/nemotron_h",
        323,
        Layout(expert_tensor=1),
    )
    assert isinstance(values["_target_"], str)


def test_a_fused_delta_net_of_megatron_fsdp_keeps_its_keys() -> None:
    found = opened(DATA / "fsdp_gdn")
    assert found.checkpoint.tensors["model.module.decoder.layers.0.self_attention.in_proj.weight"].shape == (168, 32)
    assert (found.stacked, found.optimizer, found.checkpoint_version) == (False, "none", 3.0)


# ----------------------------------------------------------------------------------------------------------------- runs


def test_the_tracker_says_which_iteration_is_read(tmp_path: Path) -> None:
    run = run_of(tmp_path, 10, 20, 30, tracker="20")
    assert megatron.locate(run).iteration == 20
    assert megatron.locate(run, 30).iteration == 30
    assert megatron.locate(run / "iter_0000010").iteration == 10


def test_without_a_tracker_the_newest_complete_iteration_is_read(tmp_path: Path) -> None:
    run = run_of(tmp_path, 9, 10)
    (run / "iter_0000011").mkdir()
    shutil.copytree(run / "iter_0000010", run / "iter_0000012")
    (run / "iter_0000012" / ".metadata").unlink()
    found = megatron.locate(run)
    assert found.iteration == 10
    assert found.notices == (
        "iter_0000012 has __0_0.distcp and no whole .metadata, which is written last: iter_0000010 is read",
        "iter_0000011 is empty: iter_0000010 is read",
    )


def test_an_iteration_that_the_tracker_names_and_that_is_gone_is_said(tmp_path: Path) -> None:
    found = megatron.locate(run_of(tmp_path, 10, tracker="500\n"))
    assert found.iteration == 10
    assert "iter_0000500, which latest_checkpointed_iteration.txt names, is not there" in found.notices[0]


def test_a_release_is_read_where_the_tracker_says_so(tmp_path: Path) -> None:
    save(run_of(tmp_path, 10, tracker="release") / "release")
    assert megatron.locate(tmp_path).iteration == "release"
    assert megatron.locate(tmp_path / "release").weights == tmp_path / "release"
    assert opened(tmp_path).checkpoint.origin.step == 10  # common.pt tells


def test_an_iteration_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has no iteration 5") as error:
        megatron.locate(run_of(tmp_path, 10), 5)
    assert "10" in str(error.value.hint)
    with pytest.raises(NotFound, match="iteration 10, not 5"):
        megatron.locate(tmp_path / "iter_0000010", 5)


@pytest.mark.parametrize("text", ["", "ten", "-1", "../../etc", "9" * 300])
def test_a_tracker_that_says_neither_a_number_nor_release_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(Corrupt, match=r"latest_checkpointed_iteration\.txt says"):
        megatron.locate(run_of(tmp_path, 10, tracker=text))


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_crashed_save_leaves_is_refused_with_the_reason(tmp_path: Path, inside: bool) -> None:
    (tmp_path / "iter_0000000").mkdir()
    path = tmp_path / "iter_0000000" if inside else tmp_path
    for look in (lambda: megatron.locate(path), lambda: detect.find(path)):
        with pytest.raises(Incomplete, match="is empty") as error:
            look()
        assert error.value.hint


def test_a_save_that_was_cut_off_before_its_index_is_incomplete(tmp_path: Path) -> None:
    save(tmp_path / "iter_0000010")
    (tmp_path / "iter_0000010" / ".metadata").unlink()
    with pytest.raises(Incomplete):
        opened(tmp_path / "iter_0000010")


def test_a_shard_file_that_is_gone_is_named(tmp_path: Path) -> None:
    save(tmp_path / "iter_0000010")
    (tmp_path / "iter_0000010" / "__0_0.distcp").unlink()
    with pytest.raises(Incomplete, match=r"__0_0\.distcp"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["empty", "plain DCP", "rank files with a tracker"])
def test_what_is_not_megatrons_is_left_to_others(tmp_path: Path, kind: str) -> None:
    if kind == "plain DCP":
        save(tmp_path, {"model.layers.0.weight": torch.rand(2)}, backend=None)
    elif kind != "empty":
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
        (tmp_path / "global_step_5" / "actor").mkdir(parents=True)
        torch.save({"a": torch.rand(2)}, tmp_path / "global_step_5/actor/model_world_size_1_rank_0.pt")
    with pytest.raises(NotFound, match="not a Megatron checkpoint"):
        megatron.locate(tmp_path)
    if kind != "empty":
        assert detect.find(tmp_path).parts[0].format in ("dcp", "rank_files")


def test_a_sharded_backend_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="'hdf5' is not known"):
        megatron.locate(save(tmp_path, backend="hdf5"))


# -------------------------------------------------------------------------------------------------------------- layouts


def test_verl_keeps_its_shards_beside_a_huggingface_directory(tmp_path: Path) -> None:
    actor = tmp_path / "global_step_20" / "actor"
    save(actor / "dist_ckpt")
    (actor / "huggingface").mkdir()
    (actor / "huggingface" / "config.json").write_text("{}")
    (actor / "transformer_config.json").write_text('{"num_layers": 2, "activation_func": "silu"}')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    for path in (tmp_path, tmp_path / "global_step_20", actor, actor / "dist_ckpt"):
        found = opened(path)
        assert (found.located.writer, found.located.iteration) == ("verl", 20)
        assert found.located.huggingface == actor / "huggingface"
        assert found.located.companions[0] == actor / "huggingface"
        assert (found.settings.source, found.settings.values["num_layers"]) == ("transformer_config.json", 2)
        assert detect.find(path).root == tmp_path / "global_step_20"


def test_nemo_2_keeps_its_settings_in_a_context(tmp_path: Path) -> None:
    save(tmp_path / "weights", {f"module.{name}": tensor for name, tensor in MODEL.items()})
    (tmp_path / "context" / "nemo_tokenizer").mkdir(parents=True)
    (tmp_path / "context" / "nemo_tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "context" / "model.yaml").write_text(
        "_target_: nemo.collections.llm.gpt.model.llama.LlamaModel\n"
        "config:\n  num_layers: 2\n  activation_func: {_call_: false, _target_: torch.nn.functional.silu}\n"
    )
    for path in (tmp_path, tmp_path / "weights"):
        found = opened(path)
        assert (found.located.writer, found.located.checkpoint) == ("NeMo 2", tmp_path)
        assert found.located.tokenizer == tmp_path / "context" / "nemo_tokenizer"
        assert found.settings.values["activation_func"] == "silu"
        assert found.settings.values["model_class"].endswith("LlamaModel")


def test_nemo_is_known_by_its_prefixes_where_there_is_nothing_else(tmp_path: Path) -> None:
    for prefix, writer in (("module.", "NeMo 2"), ("model.", "NeMo 1"), ("", "Megatron-LM")):
        path = save(tmp_path / (prefix or "none"), {prefix + name: tensor for name, tensor in MODEL.items()})
        assert opened(path).checkpoint.origin.writer == writer


def test_both_prefixes_of_megatron_fsdp_are_given_as_stored(tmp_path: Path) -> None:
    both = {prefix + name: t for name, t in MODEL.items() for prefix in ("model.", "model.module.")}
    save(tmp_path, both | {"checkpoint_version": 3.0, "iteration": 4}, backend=None)
    found = opened(tmp_path)
    assert found.located.format == "fsdp_dtensor"
    assert sorted(found.checkpoint) == sorted(both)
    assert (found.checkpoint_version, found.checkpoint.origin.step) == (3.0, 4)


def test_the_byte_entry_that_took_the_place_of_common_pt_is_read(tmp_path: Path) -> None:
    args = argparse.Namespace(num_layers=7, swiglu=True, tensor_model_parallel_size=4)
    save(tmp_path, MODEL | {"common_state/shard_0_1": [{"args": args, "checkpoint_version": 3.0, "iteration": 9}]})
    (tmp_path / "common.pt").unlink()
    found = opened(tmp_path)
    assert (found.settings.values["num_layers"], found.core) == (7, "0.19 or later")
    assert (str(found.settings.layout), found.checkpoint.origin.step) == ("tp 4", 9)


# ------------------------------------------------------------------------------------------------------------ optimizer

WEIGHT = "decoder.layers.mlp.router.weight"


@pytest.mark.parametrize(
    "states, common, expected",
    [
        ({}, {}, "none"),
        ({f"optimizer.state.exp_avg.{WEIGHT}": (2, 3, 4)}, {}, "plain"),
        ({f"optimizer.state.exp_avg.{WEIGHT}": (2, 1, 12)}, {}, "fully_sharded_model_space"),
        ({f"chained_0.optimizer.state.fp32_param.{WEIGHT}": (2, 1, 12)}, {}, "fully_sharded_model_space"),
        ({f"optimizer.state.param.{WEIGHT}": (2, 3, 4)}, {}, "fully_reshardable"),
        (
            {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(a, b).bucket_idx_0.param": (9,)},
            {},
            "dp_reshardable",
        ),
        ({"optimizer.state.exp_avg.x": (9,)}, {"content_metadata": {"distrib_optim_sharding_type": "novel"}}, "novel"),
        (
            {"optimizer.state.exp_avg.x": (9,)},
            {"optimizer": {0: {"param_state_sharding_type": "dp_zero_gather_scatter"}}},
            "dp_zero_gather_scatter",
        ),
    ],
)
def test_the_layout_of_the_optimizer_is_named_and_its_entries_are_no_weights(
    tmp_path: Path, states: dict[str, tuple[int, ...]], common: dict[str, Any], expected: str
) -> None:
    save(tmp_path, MODEL | {name: torch.zeros(shape) for name, shape in states.items()}, **common)
    found = opened(tmp_path)
    assert (found.optimizer, sorted(found.checkpoint)) == (expected, sorted(MODEL))
    assert found.left_out.get("optimizer", 0) == len(states)
    assert [part.role for part in detect.find(tmp_path).parts] == ["model", *(["optimizer"] if states else [])]


def test_a_directory_of_optimizer_states_alone_says_where_the_weights_are(tmp_path: Path) -> None:
    save(tmp_path / "actor" / "dist_ckpt", {"optimizer.state.exp_avg.x": torch.zeros(2)})
    (tmp_path / "actor" / "huggingface").mkdir()
    (tmp_path / "actor" / "huggingface" / "config.json").write_text("{}")
    with pytest.raises(NotFound, match="holds no weights of a model") as error:
        opened(tmp_path / "actor")
    assert "huggingface" in str(error.value.hint)


# ------------------------------------------------------------------------------------------------- FP8 and quantization


def extra_state(**content: Any) -> list[io.BytesIO]:
    stream = io.BytesIO()
    torch.save(content or None, stream)
    return [stream]


def test_empty_extra_states_are_left_out_in_silence_and_scales_with_a_notice(tmp_path: Path) -> None:
    states: dict[str, Any] = {
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": [torch.zeros(0, dtype=torch.uint8)],
        "decoder.layers.mlp.linear_fc2._extra_state/shard_0_2": [None],
        "decoder.layers.self_attention.linear_proj._extra_state/shard_0_2": extra_state(),
    }
    save(tmp_path / "a", MODEL | states)
    assert opened(tmp_path / "a").checkpoint.notices == ()
    held = {"decoder.layers.mlp.linear_fc1._extra_state/shard_1_2": extra_state(scale_fwd=torch.ones(512))}
    save(tmp_path / "b", MODEL | states | held)
    found = opened(tmp_path / "b")
    assert found.left_out == {"extra_state": 4}
    assert "FP8 scales" in found.checkpoint.notices[0]


@pytest.mark.parametrize(
    "entries",
    [
        {"decoder.layers.mlp.linear_fc1.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)},
        {"decoder.layers.mlp.linear_fc1.weight": torch.zeros(2, 2, dtype=torch.uint8)},
        {"decoder.layers.mlp.linear_fc1.weight_quantizer._amax": torch.zeros(2)},
    ],
)
def test_weights_that_are_stored_quantized_are_refused_by_name(tmp_path: Path, entries: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=next(iter(entries))):
        opened(save(tmp_path, MODEL | entries))


def test_models_that_modelopt_changed_are_refused(tmp_path: Path) -> None:
    (save(tmp_path) / "modelopt_state").mkdir()
    with pytest.raises(Unsupported, match="ModelOpt"):
        opened(tmp_path)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "args, expected",
    [
        ({"norm_epsilon": 1e-6}, {"layernorm_epsilon": 1e-6}),
        ({"layernorm_epsilon": 1e-6}, {"layernorm_epsilon": 1e-6}),
        ({"untie_embeddings_and_output_weights": True}, {"share_embeddings_and_output_weights": False}),
        ({"num_experts": 8}, {"num_moe_experts": 8}),
        ({"num_experts": None}, {"num_moe_experts": None}),
        ({"swiglu": True}, {"activation_func": "silu", "gated_linear_unit": True}),
        ({"swiglu": False, "squared_relu": True}, {"activation_func": "squared_relu", "gated_linear_unit": False}),
        ({"swiglu": False, "quick_geglu": True}, {"activation_func": "quick_gelu", "gated_linear_unit": True}),
        ({"swiglu": False}, {"activation_func": "gelu", "gated_linear_unit": False}),
        ({"use_rope_scaling": True, "rope_scaling_factor": 8.0}, {"rope_scaling": True, "rope_scaling_factor": 8.0}),
        ({"apply_layernorm_1p": True}, {"layernorm_zero_centered_gamma": True}),
        ({"rotary_seq_len_interpolation_factor": 2}, {"seq_len_interpolation_factor": 2}),
        ({"use_rotary_position_embeddings": True}, {"position_embedding_type": "rope"}),
        (
            {"group_query_attention": False, "num_query_groups": 1, "num_attention_heads": 4},
            {"num_query_groups": 4},
        ),
        (
            {"num_attention_heads": 4, "hidden_size": 64, "kv_channels": None},
            {"kv_channels": 16, "ffn_hidden_size": 256},
        ),
        ({"params_dtype": torch.bfloat16}, {}),
        ({"moe_layer_freq": [0, 1, 1]}, {"moe_layer_freq": [0, 1, 1]}),
        ({"decoder_first_pipeline_num_layers": 3}, {"num_layers_in_first_pipeline_stage": 3}),
    ],
)
def test_arguments_of_megatron_lm_are_settings_under_the_other_vocabulary(
    args: dict[str, Any], expected: dict[str, Any]
) -> None:
    values = of_args(args).values
    assert {name: values[name] for name in expected} == expected
    assert (
        not {"norm_epsilon", "num_experts", "untie_embeddings_and_output_weights", "apply_layernorm_1p"} & values.keys()
    )


def test_a_vocabulary_is_stated_only_where_it_is_certain() -> None:
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 322, "padded_vocab_size": 384}
    assert of_args(null).vocab_size == 323
    assert of_args(null | {"padded_vocab_size": 322}).vocab_size is None
    assert of_args(null | {"tokenizer_type": "HuggingFaceTokenizer"}).vocab_size is None
    assert "vocab_size" not in of_args(null).values


def test_a_size_that_is_no_number_is_refused_when_it_is_asked_for() -> None:
    with pytest.raises(Corrupt, match="num_layers is 'many'"):
        Settings({"num_layers": "many"}).size("num_layers")


def run_config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run_config.yaml"
    path.write_text(text)
    return path


def test_values_of_run_config_are_reduced_and_nothing_is_made_of_their_targets(tmp_path: Path) -> None:
    text = """
model:
  _target_: os.system
  activation_func: {_target_: torch.nn.functional.silu, _call_: false}
  attention_backend: {_target_: a.AttnBackend, _call_: true, _args_: [5], _name_: auto}
  scope: {_target_: a.Scope, _call_: true, _args_: [1]}
  init_method: {_target_: torch.nn.init.normal_, _partial_: true, _args_: [], std: 0.02}
  layernorm_epsilon: 1e-6
  tagged: !!python/object/apply:os.system [touch /tmp/never]
  vocab_size: 100
  should_pad_vocab: false
"""
    settings = megatron_settings.of_run_config(run_config(tmp_path, text))
    values = settings.values
    assert (values["activation_func"], values["attention_backend"], values["scope"]) == ("silu", "auto", 1)
    assert (values["layernorm_epsilon"], values["init_method"]["std"], values["_target_"]) == (1e-6, 0.02, "os.system")
    assert (values["tagged"], settings.vocab_size) == (["touch /tmp/never"], 100)


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "other: {}\n",
        "model: [1, 2]\n",
        "model: {a: [\n",
        "model: \x00\n",
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
        + "model: {x: *i}\n",
        "model: " + "[" * 5000,
        "model: {? [1, 2] : 3}\n",
        "model: &m {a: *m}\n",
    ],
    ids=["list", "no model", "no mapping", "cut", "nul", "aliases", "deep", "unhashable", "holds itself"],
)
def test_a_run_config_that_is_none_or_has_no_end_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(Corrupt, match=r"run_config\.yaml"):
        megatron_settings.of_run_config(run_config(tmp_path, text))


def test_settings_of_an_impossible_size_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "run_config.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(Unsupported, match="1073741824 bytes"):
        megatron_settings.of_run_config(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda key: key != "_target_"), inner),
)


@given(VALUES)
def test_plain_values_stay_as_they_are(value: Any) -> None:
    assert plain(value) == value


# --------------------------------------------------------------------------------------------------------- command line


def test_inspect_says_what_a_megatron_directory_is_and_what_to_type(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = argparse.Namespace(num_layers=2, tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    state = MODEL | {f"optimizer.state.exp_avg.{WEIGHT}": torch.zeros(2, 3, 4)}
    save(tmp_path / "iter_0000010", state, args=args)
    save(tmp_path / "iter_0000005")
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for line in (
        "format       torch_dist", "written by   Megatron-LM", "step         10", "mesh         tp 2, pp 4",
        "layers       one tensor of each kind for all", "optimizer    plain", "left out     optimizer (1)",
        "other steps  5", f"next: reshard convert {tmp_path} OUT --to hf",
    ):  # fmt: skip
        assert line in shown


def test_inspect_reports_a_crashed_save_as_not_complete(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "iter_0000000").mkdir()
    assert main(["inspect", str(tmp_path)]) == 1
    assert "iter_0000000 is empty" in capsys.readouterr().out


def test_merge_points_to_convert_and_keeps_names_when_told_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save(tmp_path / "run" / "iter_0000010")
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    assert "reshard convert" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "out.safetensors"), "--keep-names"]) == 0
    merged = reshard.open(tmp_path / "out.safetensors")
    assert {name: tuple(t.shape) for name, t in merged.items()} == {name: tuple(t.shape) for name, t in MODEL.items()}


def test_optimizer_entries_come_along_when_everything_is_merged(tmp_path: Path) -> None:
    name = f"optimizer.state.exp_avg.{WEIGHT}"
    save(tmp_path / "run" / "iter_0000010", MODEL | {name: torch.ones(2, 3, 4)})
    arguments = [str(tmp_path / "run"), str(tmp_path / "out.safetensors"), "--keep-names", "--all"]
    assert main(["merge", *arguments]) == 0
    assert sorted(reshard.open(tmp_path / "out.safetensors")) == sorted([*MODEL, name])


# -------------------------------------------------------------------------------------------------------------- hostile


@given(st.binary(max_size=300))
def test_whatever_a_small_file_holds_is_refused_by_type_or_read(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in ("metadata.json", "latest_checkpointed_iteration.txt", "common.pt", ".metadata"):
            path = Path(folder) / name
            path.write_bytes(data)
            try:
                found: dict[str, Tensor] = dict(opened(Path(folder)).checkpoint.tensors)
            except InputError:
                found = {}
            assert found == {}
            path.unlink()
