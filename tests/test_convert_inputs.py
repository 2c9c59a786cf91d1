"""Models as users have them: renamed, quantized, of mixed dtypes, damaged or not what their config says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file, save_file

import tiny_models
from checkpoints import write_dcp
from reshard.cli.main import main
from reshard.formats.megatron import locate, open_located

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model directory of a family, made once."""
    directory = tmp_path_factory.mktemp("hub")

    def made(family: str) -> Path:
        if not (directory / family).exists():
            tiny_models.make(family).to(torch.bfloat16).save_pretrained(directory / family)
        return directory / family

    return made


def changed(source: Path, target: Path, edit: Callable[[Tensors], Tensors] = dict, **config: object) -> Path:
    """A copy of a model directory with other tensors and other values in config.json; None takes one out."""
    shutil.copytree(source, target)
    save_file(edit(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return target


def megatron(source: Path, target: Path, **model: object) -> Path:
    """A torch_dist checkpoint of a model, whose run_config.yaml says something else."""
    assert main(["convert", str(source), str(target), "--to", "torch_dist", "-q"]) == 0
    path = target / "iter_0000000" / "run_config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["model"] |= model
    path.write_text(yaml.safe_dump(settings))
    return target


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run a conversion that must fail: the message, when nothing was written."""

    def run(*words: object, output: str = "refused") -> str:
        capsys.readouterr()
        assert main([*map(str, words)]) == 1
        assert not (tmp_path / output).exists()
        return capsys.readouterr().err

    return run


# ------------------------------------------------------------------------------------------- unknown architectures


def test_an_unknown_architecture_is_taken_for_the_plainest_family_and_the_others_are_named(
    hub: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = changed(hub("llama"), tmp_path / "foo", model_type="foo", architectures=["FooForCausalLM"])
    assert main(["convert", str(model), str(tmp_path / "out"), "--to", "torch_dist"]) == 0
    notice = capsys.readouterr().err
    assert "FooForCausalLM is not a known architecture: its tensors are exactly those of llama; " in notice
    assert "ernie4_5" in notice
    run_config = yaml.safe_load((tmp_path / "out" / "iter_0000000" / "run_config.yaml").read_text())
    assert run_config["model"]["rotary_interleaved"] is False


def test_a_reference_of_an_unknown_architecture_is_known_by_the_names_of_the_checkpoint(
    hub: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = megatron(hub("qwen3_moe"), tmp_path / "checkpoint")
    model = changed(hub("qwen3_moe"), tmp_path / "foo", model_type="foo", architectures=["FooForCausalLM"])
    (model / "model.safetensors").unlink()
    words = ["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--hf-model", str(model)]
    assert main(words) == 0
    assert "exactly those of qwen3_moe" in capsys.readouterr().err
    back, truth = (load_file(path / "model.safetensors") for path in (tmp_path / "out", hub("qwen3_moe")))
    assert back.keys() == truth.keys()
    assert all(torch.equal(back[name], truth[name]) for name in truth)


def test_the_nearest_family_of_a_model_with_more_tensors_is_the_plainest(
    hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    model = changed(
        hub("llama"), tmp_path / "foo", lambda t: t | {"model.foo": torch.ones(1)}, model_type="foo", architectures=None
    )
    message = said("convert", model, tmp_path / "refused", "--to", "torch_dist")
    assert "foo is not a known architecture; the nearest is llama, from which 1 names differ: model.foo" in message


# ------------------------------------------------------------------------------------------------ quantized models


def test_a_reference_of_eight_bits_stands_for_the_model_that_was_quantized(
    hub: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantize(tensors: Tensors) -> Tensors:
        scales = {f"{name}_scale_inv": torch.ones(1, 1) for name in tensors if "_proj" in name}
        return {n: t.to(torch.float8_e4m3fn) if "_proj" in n else t for n, t in tensors.items()} | scales

    plain = hub("deepseek_v3")
    quantized = changed(plain, tmp_path / "fp8", quantize, quantization_config={"quant_method": "fp8"})
    checkpoint = megatron(plain, tmp_path / "checkpoint")
    words = ["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--hf-model", str(quantized)]
    assert main(words) == 0
    assert "quantization_config fp8 is left out" in capsys.readouterr().err
    back, truth = (load_file(path / "model.safetensors") for path in (tmp_path / "out", plain))
    assert back.keys() == truth.keys()
    assert all(torch.equal(back[name], truth[name]) for name in truth)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_reference_whose_weights_share_bytes_lends_its_config_alone(
    hub: Callable[[str], Path], tmp_path: Path
) -> None:
    def quantize(tensors: Tensors) -> Tensors:
        packed = {f"{name}_blocks": torch.zeros(1, dtype=torch.uint8) for name in tensors if "mlp" in name}
        return {name: tensor for name, tensor in tensors.items() if "mlp" not in name} | packed

    quantized = changed(hub("llama"), tmp_path / "q", quantize, quantization_config={"quant_method": "mxfp4"})
    checkpoint = megatron(hub("llama"), tmp_path / "checkpoint")
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--hf-model", str(quantized)]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(
        hub("llama") / "model.safetensors"
    ).keys()  # fmt: skip


def test_eight_bits_without_scales_are_quantized_weights_too(
    hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    model = changed(
        hub("llama"),
        tmp_path / "fp8",
        lambda t: {n: v.to(torch.float8_e4m3fn) if "mlp" in n else v for n, v in t.items()},
    )
    assert "the weights are quantized" in said("convert", model, tmp_path / "refused", "--to", "torch_dist")


# ---------------------------------------------------------------------------------------------------- mixed dtypes


def test_layers_of_several_dtypes_are_stored_in_one_that_holds_all_and_come_back(
    hub: Callable[[str], Path], tmp_path: Path
) -> None:
    mixed = changed(
        hub("qwen3_moe"), tmp_path / "mixed",
        lambda t: {n: v.float() if "layers.1" in n or "experts.0" in n or "q_proj" in n else v for n, v in t.items()},
    )  # fmt: skip
    checkpoint = megatron(mixed, tmp_path / "checkpoint")
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--hf-model", str(mixed)]) == 0
    back, truth = (load_file(path / "model.safetensors") for path in (tmp_path / "out", mixed))
    assert back.keys() == truth.keys()
    assert all(back[n].dtype is t.dtype and torch.equal(back[n], t) for n, t in truth.items())


def test_a_layer_of_whole_numbers_is_named(
    hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    name = "model.layers.1.input_layernorm.weight"
    model = changed(hub("llama"), tmp_path / "int", lambda t: t | {name: t[name].to(torch.int32)})
    message = said("convert", model, tmp_path / "refused", "--to", "torch_dist")
    assert f"{model}: decoder.layers.self_attention.linear_qkv.layer_norm_weight, one tensor of all layers" in message


# ------------------------------------------------------------------------------------------------------ the options


@pytest.mark.parametrize(
    "words, message",
    [
        (("--to", "torch_dist", "--make-vocab-size-divisible-by", "0"), "it begins at 1"),
        (("--to", "torch_dist", "--make-vocab-size-divisible-by", "-4"), "it begins at 1"),
        (("--to", "torch_dist", "--dtype", "float8_e4m3fn"), "weights are written in float32, bfloat16"),
        (("--to", "torch_dist", "--dtype", "int8"), "weights are written in float32, bfloat16"),
        (("--to", "torch_dist", "--not-strict"), "no loader of Megatron takes a model that lacks tensors"),
    ],
)
def test_options_that_no_model_can_have_are_refused(
    words: tuple[str, ...], message: str, hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    assert message in said("convert", hub("llama"), tmp_path / "refused", *words)


def test_bridges_export_knows_the_formats_and_bridges_import_says_what_changes_nothing(
    hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, checkpoint = str(hub("llama")), str(tmp_path / "checkpoint")
    assert main(["import", "--hf-model", model, "--megatron-path", checkpoint, "--etp", "2"]) == 0
    assert "--etp 2 changes nothing" in capsys.readouterr().err
    words = ("export", "--hf-model", model, "--megatron-path", checkpoint, "--hf-path", tmp_path / "refused")
    assert "no format 'nonsense' of Megatron" in said(*words, "--ckpt-format", "nonsense")
    assert "--etp 0" in said(*words, "--etp", "0")


def test_a_reference_may_be_named_by_its_config_and_one_that_is_not_there_is_asked_for(
    hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    checkpoint = megatron(hub("llama"), tmp_path / "checkpoint")
    words = ["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--hf-model"]
    assert main([*words, str(hub("llama") / "config.json")]) == 0
    words[2] = str(tmp_path / "refused")
    assert "hint: --hf-model names" in said(*words, tmp_path / "nowhere" / "at" / "all")


# ------------------------------------------------------------------------------------- checkpoints that say too much


def test_settings_that_no_parser_comes_to_the_end_of_are_refused(
    hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    checkpoint = megatron(hub("llama"), tmp_path / "checkpoint")
    (checkpoint / "iter_0000000" / "run_config.yaml").write_text("model: " + "[" * 100_000)
    assert "it is nested deeper than" in said("convert", checkpoint, tmp_path / "refused", "--to", "hf")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("rotary_base", ".nan", "the settings say rotary_base"),
        ("layernorm_epsilon", -1, "the settings say layernorm_epsilon -1"),
        ("vocab_size", 10**12, "the settings say vocab_size 1000000000000, the embedding has"),
        ("hidden_size", 10**9, "have not the shapes that config.json implies"),
    ],
)
def test_settings_that_no_model_has_are_refused_with_the_checkpoint(
    name: str, value: object, message: str, hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    checkpoint = megatron(hub("llama"), tmp_path / "checkpoint", **{name: value})
    text = said("convert", checkpoint, tmp_path / "refused", "--to", "hf")
    assert message in text
    assert str(checkpoint) in text


def test_a_reference_of_fewer_tokens_than_the_checkpoint_says_is_refused(
    hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    checkpoint = megatron(hub("llama"), tmp_path / "checkpoint")
    smaller = changed(hub("llama"), tmp_path / "smaller", vocab_size=32)
    (smaller / "model.safetensors").unlink()
    message = said("convert", checkpoint, tmp_path / "refused", "--to", "hf", "--hf-model", smaller)
    assert "tokens, --hf-model has 32" in message


# ------------------------------------------------------------------------------ checkpoints with other tensors in them


def rewritten(model: Path, target: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    """A torch_dist checkpoint of a model, with other tensors in it."""
    checkpoint = megatron(model, target)
    weights = checkpoint / "iter_0000000"
    held = open_located(locate(checkpoint)).checkpoint.tensors
    tensors = {name: torch.empty(t.shape, dtype=getattr(torch, t.dtype.torch)) for name, t in held.items()}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(weights))
    shutil.copytree(weights, target.with_suffix(".kept"), ignore=shutil.ignore_patterns("*.distcp", ".metadata"))
    shutil.rmtree(weights)
    target.with_suffix(".kept").rename(weights)
    write_dcp(weights, edit(tensors), ranks=1)
    return checkpoint


@pytest.mark.parametrize("shape", [(), (0,), (1,), (48, 1)])
def test_a_tensor_of_another_shape_is_refused_without_a_reference_too(
    shape: tuple[int, ...], hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    norm = {"decoder.final_layernorm.weight": torch.ones(shape, dtype=torch.bfloat16)}
    checkpoint = rewritten(hub("llama"), tmp_path / "checkpoint", lambda t: t | norm)
    message = said("convert", checkpoint, tmp_path / "refused", "--to", "hf")
    assert "1 tensors have not the shapes that config.json implies: model.norm.weight is" in message


def test_an_adapter_among_the_weights_is_refused(
    hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    name = "decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight"
    checkpoint = rewritten(hub("llama"), tmp_path / "checkpoint", lambda t: t | {name: torch.ones(2, 2)})
    assert f"an adapter (LoRA), which is not merged into the model: {name}" in said(
        "convert", checkpoint, tmp_path / "refused", "--to", "hf", "--hf-model", hub("llama")
    )


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_head_beside_tied_weights_is_understood_without_a_reference(
    is_equal: bool, hub: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = changed(
        hub("llama"), tmp_path / "tied", lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"},
        tie_word_embeddings=True,
    )  # fmt: skip
    embedding = "embedding.word_embeddings.weight"
    checkpoint = rewritten(
        tied, tmp_path / "checkpoint", lambda t: t | {"output_layer.weight": t[embedding] + (not is_equal)}
    )
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is is_equal
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not is_equal
    assert ("to which it is tied: left out" in capsys.readouterr().err) is is_equal


def test_what_is_missing_is_listed_where_a_reference_has_no_headers(
    hub: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = rewritten(
        hub("llama"), tmp_path / "checkpoint", lambda t: {n: v for n, v in t.items() if "linear_fc2" not in n}
    )
    words = ["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--not-strict"]
    (tmp_path / "config").mkdir()
    shutil.copy(hub("llama") / "config.json", tmp_path / "config")
    assert main([*words, "--hf-model", str(tmp_path / "config")]) == 0
    notice = capsys.readouterr().err
    assert "tensors of the model are not in the checkpoint: model.layers.0.mlp.down_proj.weight, " in notice


def test_a_reference_may_predict_further_tokens_where_the_checkpoint_does_not(
    hub: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = f"model.layers.{json.loads((hub('deepseek_v3') / 'config.json').read_text())['num_hidden_layers']}."
    reference = changed(
        hub("deepseek_v3"), tmp_path / "reference", lambda t: {n: v for n, v in t.items() if not n.startswith(layer)}
        | {f"{layer}enorm.weight": torch.ones(4), f"{layer}embed_tokens.weight": torch.ones(4)},
        num_nextn_predict_layers=1,
    )  # fmt: skip
    plain = changed(
        hub("deepseek_v3"), tmp_path / "plain", lambda t: {n: v for n, v in t.items() if not n.startswith(layer)},
        num_nextn_predict_layers=0,
    )  # fmt: skip
    checkpoint = megatron(plain, tmp_path / "checkpoint")
    words = ["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--hf-model", str(reference)]
    assert main(words) == 0
    assert "2 tensors of its multi-token prediction are not in the checkpoint" in capsys.readouterr().err
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(plain / "model.safetensors").keys()


# ----------------------------------------------------------------------------------------------- metadata.json is lost


def test_a_directory_without_metadata_json_is_known_by_its_entries(hub: Callable[[str], Path], tmp_path: Path) -> None:
    weights = megatron(hub("llama"), tmp_path / "checkpoint") / "iter_0000000"
    (weights / "metadata.json").unlink()
    (weights / "common.pt").unlink()
    assert main(["convert", str(weights), str(tmp_path / "out"), "--to", "hf", "--hf-model", str(hub("llama"))]) == 0


def test_a_metadata_json_that_is_damaged_is_named(
    hub: Callable[[str], Path], tmp_path: Path, said: Callable[..., str]
) -> None:
    weights = megatron(hub("llama"), tmp_path / "checkpoint") / "iter_0000000"
    (weights / "metadata.json").write_text("{")
    message = said("convert", weights, tmp_path / "refused", "--to", "hf")
    assert f"{weights / 'metadata.json'} is not JSON" in message


# --------------------------------------------------------------------------------------- what the mesh does not divide


@pytest.mark.parametrize("divisor", [4, 48, 128])
def test_megatron_pads_the_vocabulary_to_the_rows_that_are_there(
    divisor: int, hub: Callable[[str], Path], tmp_path: Path
) -> None:
    words = ["--to", "torch_dist", "--tp", "2", "--make-vocab-size-divisible-by", str(divisor)]
    assert main(["convert", str(hub("llama")), str(tmp_path / "out"), *words]) == 0
    settings = yaml.safe_load((tmp_path / "out" / "iter_0000000" / "run_config.yaml").read_text())["model"]
    rows = open_located(locate(tmp_path / "out")).checkpoint.tensors["embedding.word_embeddings.weight"].shape[0]
    unit = settings["make_vocab_size_divisible_by"] * settings["tensor_model_parallel_size"]
    assert -(-settings["vocab_size"] // unit) * unit == rows


def test_layers_and_vocabularies_that_need_something_of_the_run_are_said(
    hub: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((hub("llama") / "config.json").read_text())["vocab_size"]
    words = ["convert", str(hub("llama")), str(tmp_path / "out"), "--to", "torch_dist", "--tp", "2", "--pp", "9"]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert f"a vocabulary of {rows} does not divide by tp 2" in said
    assert "layers do not divide by pp 9: the run needs a pipeline layout of its own" in said


def test_megatron_lm_is_not_given_projections_that_it_would_mix_up(tmp_path: Path, said: Callable[..., str]) -> None:
    model = Path(__file__).parent / "data" / "megatron" / "nemotron_h"
    words = ("--to", "fsdp_dtensor", "--target", "megatron-lm")
    message = said("convert", model, tmp_path / "refused", *words, "--tp", "2")
    assert "tensors whole, with the rows of each rank together, and would mix them up" in message
    assert main(["convert", str(model), str(tmp_path / "out"), *words]) == 0
