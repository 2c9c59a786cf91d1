"""Options of a conversion that mean nothing where they stand: refused where they contradict, said where they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file

import tiny_models
from checkpoints import same, write_dcp
from reshard.cli.main import main
from reshard.formats.megatron import locate, open_located

Tensors = dict[str, torch.Tensor]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama, qwen3_moe and, packed, the same; a Megatron checkpoint `NAME-megatron` of the first two."""
    directory = tmp_path_factory.mktemp("models")
    for family, to in (("llama", "torch_dist"), ("qwen3_moe", "fsdp_dtensor")):
        tiny_models.make(family).to(torch.bfloat16).save_pretrained(directory / family)
        convert = ["convert", str(directory / family), str(directory / f"{family}-megatron"), "--to", to, "-q"]
        assert main([*convert, "--dtype", "bfloat16"]) == 0
    shutil.copytree(directory / "qwen3_moe", directory / "packed")
    save_file(packed(load_file(directory / "qwen3_moe" / "model.safetensors")), directory / "packed/model.safetensors")
    return directory


def packed(weights: Tensors) -> Tensors:
    """With the experts of a layer in one tensor."""
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        gate, up, down = ([weights.pop(f"{at}.{e}.{n}_proj.weight") for e in range(3)] for n in ("gate", "up", "down"))
        weights[f"{at}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        weights[f"{at}.down_proj"] = torch.stack(down)
    return weights


def without(checkpoint: Path, target: Path, *names: str, more: Tensors | None = None) -> Path:
    """A Megatron checkpoint without the tensors whose names end so, and with others."""
    shutil.copytree(checkpoint, target)
    weights = target / "iter_0000000"
    held = open_located(locate(target)).checkpoint.located().tensors
    tensors = {name: torch.empty(t.shape, dtype=getattr(torch, t.dtype.torch)) for name, t in held.items()}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(weights))
    shutil.rmtree(target)
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("*.distcp", ".metadata"))
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(names)}
    assert len(kept) == len(tensors) - len(names)
    write_dcp(weights, kept | (more or {}), ranks=1)
    return target


def refused(capsys: Capture, *words: object) -> str:
    """The message of a command that must fail."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 1
    return capsys.readouterr().err


def test_a_directory_above_a_run_is_answered_with_the_one_to_name(
    models: Path, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copytree(models / "llama-megatron", tmp_path / "above/run")
    said = refused(capsys, "convert", tmp_path / "above", tmp_path / "out", "--to", "fsdp_dtensor")
    assert said.splitlines()[-1] == f"hint: name {tmp_path / 'above/run/iter_0000000'} itself"


# -------------------------------------------------------------------------------------------------- without meaning


@pytest.mark.parametrize(
    "source, words, message",
    [
        ("llama", "torch_dist --target any", "--target any: fsdp_dtensor alone is written for a loader, and this is"),
        ("llama", "nemo2 --target bridge", "--target bridge: fsdp_dtensor alone"),
        ("llama-megatron", "hf --target megatron-lm", "and this is --to hf"),
        ("llama-megatron", "hf --make-vocab-size-divisible-by 8", "--make-vocab-size-divisible-by 8: a HuggingFace"),
        ("llama-megatron", "hf --tokenizer-path here", "--tokenizer-path here"),
        ("llama", "torch_dist --tokenizer-library huggingface", "--tokenizer-library huggingface: no --tokenizer-path"),
        (
            "llama",
            "nemo2 --tokenizer-path here --no-save-tokenizer",
            "--tokenizer-path here: --no-save-tokenizer writes",
        ),
        ("llama", "torch_dist --iteration 5", "is one model, not a run of which an iteration could be picked"),
        (
            "llama",
            "torch_dist --max-shard-size huge",
            "error: 'huge' is no size\n\nhint: --max-shard-size and --memory",
        ),
        (
            "llama",
            "torch_dist --dtype bf17",
            "--dtype bf17: weights are written in float32, bfloat16, float16 or float64",
        ),
        ("llama-megatron", "hf --hf-model /", "--hf-model /: there is no config.json in /"),
        (
            "llama/model.safetensors",
            "torch_dist --tp 3",
            "hint: the files are the same for every mesh: leave the sizes",
        ),
        ("llama-megatron/iter_0000000", "hf --iteration 5", "is iteration 0, not 5"),
    ],
)
def test_options_that_contradict_are_refused(
    source: str, words: str, message: str, models: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert message in refused(capsys, "convert", models / source, tmp_path / "out", "--to", *words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "source, words, message",
    [
        (
            "llama-megatron",
            "hf --tp 2 --ep 4",
            "--tp 2 --ep 4 changes nothing: a HuggingFace directory is the same for",
        ),
        ("llama", "nemo2 --pp 2", "--pp 2 changes nothing: NeMo 2 takes its mesh from the trainer"),
        ("llama", "hf --not-strict", "--not-strict changes nothing: a model under HuggingFace's names is read whole"),
    ],
)
def test_options_that_change_nothing_are_said(
    source: str, words: str, message: str, models: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["convert", str(models / source), str(tmp_path / "out"), "--to", *words.split()]) == 0
    assert f"note: {message}" in capsys.readouterr().err


def test_options_without_meaning_are_no_errors_of_a_script(models: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["--hf-model", str(models / "llama"), "--megatron-path"]
    flags = [
        "--target",
        "any",
        "--make-vocab-size-divisible-by",
        "67",
        "--iteration",
        "0",
        "--ckpt-format",
        "torch_dist",
    ]
    assert main(["import", *words, str(tmp_path / "m"), *flags]) == 0
    said = capsys.readouterr().err
    assert "--target any changes nothing" in said
    assert "--iteration 0 changes nothing" in said
    assert main(["export", *words, str(tmp_path / "m"), "--hf-path", str(tmp_path / "hf"), *flags]) == 0
    said = capsys.readouterr().err
    assert [
        w for w in ("--target", "--make-vocab-size-divisible-by", "--ckpt-format") if f"note: {w}" not in said
    ] == []
    for output, source in (("m", models / "llama"), ("hf", tmp_path / "m")):
        assert main(["verify", str(tmp_path / output), "--against", str(source)]) == 0


def test_an_output_that_is_called_as_a_file_is_refused(models: Path, tmp_path: Path, capsys: Capture) -> None:
    said = refused(capsys, "convert", models / "llama-megatron", tmp_path / "out.safetensors", "--to", "hf")
    assert "is called as a file, and convert writes directories" in said
    assert f"name a directory, such as {tmp_path / 'out'}; `reshard merge` makes one file of that" in said


def test_a_run_whose_index_is_missing_is_said_to_have_its_shards(models: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(models / "llama-megatron", tmp_path / "m")
    (tmp_path / "m/iter_0000000/.metadata").unlink()
    said = refused(capsys, "convert", tmp_path / "m", tmp_path / "out", "--to", "hf")
    assert (
        "iter_0000000, which latest_checkpointed_iteration.txt names, has __0_0.distcp and no whole .metadata" in said
    )


def test_a_config_of_another_vocabulary_asks_whose_it_is(models: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(models / "llama", tmp_path / "smaller")
    config = json.loads((tmp_path / "smaller/config.json").read_text())
    (tmp_path / "smaller/config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    said = refused(capsys, "convert", tmp_path / "smaller", tmp_path / "out", "--to", "torch_dist")
    assert "model.embed_tokens.weight: the vocabulary has 67 rows, 50 expected by the config" in said
    assert "hint: is the config.json, or the --hf-model, that of these tensors?" in said


def test_scripts_take_the_direction_that_they_are_for(models: Path, tmp_path: Path, capsys: Capture) -> None:
    hf, megatron = models / "llama", models / "llama-megatron"
    export = ("export", "--hf-model", hf, "--hf-path", tmp_path / "out", "--megatron-path")
    assert "no checkpoint of Megatron is there" in refused(capsys, *export, hf)
    assert "no such file or directory" in refused(capsys, *export, tmp_path / "nowhere")
    to = ("import", "--megatron-path", tmp_path / "out", "--hf-model")
    assert "`reshard export` makes a HuggingFace model of it" in refused(capsys, *to, megatron)
    assert "no format 'hf' of Megatron" in refused(capsys, *to, hf, "--ckpt-format", "hf")


def test_a_model_is_held_against_the_one_that_it_is_said_to_come_from(
    models: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ("convert", models / "llama", tmp_path / "out", "--to", "torch_dist", "--hf-model")
    assert "model_type: HF qwen3_moe, checkpoint llama" in refused(capsys, *words, models / "qwen3_moe")
    shutil.copytree(models / "llama", tmp_path / "larger")
    config = json.loads((tmp_path / "larger/config.json").read_text())
    (tmp_path / "larger/config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    assert "HF 96, checkpoint" in refused(capsys, *words, tmp_path / "larger")
    (tmp_path / "larger/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert main([*map(str, words), str(tmp_path / "larger")]) == 0
    assert "its own config.json counts: tied embeddings: HF True, checkpoint False" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, hint",
    [
        ("nemo2 --tokenizer-path /nowhere", "hint: --tokenizer-path names a SentencePiece model, a directory"),
        ("torch_dist --hf-model /nowhere", "hint: --hf-model DIR names"),
    ],
)
def test_hints_name_the_option_that_was_given(
    words: str, hint: str, models: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert hint in refused(capsys, "convert", models / "llama", tmp_path / "out", "--to", *words.split())


def test_missing_parameters_of_a_model_are_no_matter_of_options_that_convert_lacks(
    models: Path, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copytree(models / "llama", tmp_path / "copy")
    weights = load_file(models / "llama" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    for to in ("hf", "torch_dist"):
        said = refused(capsys, "convert", tmp_path / "copy", tmp_path / "out", "--to", to)
        assert "model.norm.weight" in said
        assert "is every shard there" in said
        assert "--keep-names" not in said


# -------------------------------------------------------------------------------------------------------- not strict


def test_a_head_that_is_missing_is_left_out_where_that_is_asked_for_and_said(
    models: Path, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = without(models / "llama-megatron", tmp_path / "headless", "output_layer.weight")
    words = ["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--hf-model", str(models / "llama")]
    assert "output_layer.weight" in refused(capsys, *words)
    assert main([*words, "--not-strict"]) == 0
    assert "lm_head.weight IS NOT WRITTEN: the checkpoint has none" in capsys.readouterr().err
    wanted, found = (load_file(d / "model.safetensors") for d in (models / "llama", tmp_path / "out"))
    assert wanted.keys() - found.keys() == {"lm_head.weight"}
    assert [name for name in found if not same(found[name], wanted[name])] == []
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert main(["verify", str(tmp_path / "out"), "--against", str(checkpoint)]) == 0


def test_tensors_that_have_no_name_on_the_hub_are_left_out_where_that_is_asked_for_and_said(
    models: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = {"decoder.value_head.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    checkpoint = without(models / "llama-megatron", tmp_path / "more", more=more)
    words = ["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--hf-model", str(models / "llama")]
    assert "decoder.value_head.weight" in refused(capsys, *words)
    assert main([*words, "--not-strict"]) == 0
    assert "NOT WRITTEN, as a llama model has no such tensors: 1: decoder.value_head.weight" in capsys.readouterr().err
    wanted, found = (load_file(d / "model.safetensors") for d in (models / "llama", tmp_path / "out"))
    assert wanted.keys() == found.keys()


def test_an_expert_that_is_missing_is_left_out_alone_and_never_of_a_tensor_of_all(
    models: Path, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = without(models / "qwen3_moe-megatron", tmp_path / "short", "layers.1.mlp.experts.linear_fc2.weight2")
    words = ["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--not-strict", "--hf-model"]
    said = refused(capsys, *words, models / "packed")
    assert "model.layers.1.mlp.experts.2.down_proj.weight" in said
    assert "all experts of a layer in one tensor, of which no part can be left out" in said
    assert not (tmp_path / "out").exists()
    assert main([*words, str(models / "qwen3_moe")]) == 0
    assert "1 of its tensors are not in the checkpoint: model.layers.1.mlp.experts.2" in capsys.readouterr().err


def test_a_family_that_packs_its_experts_itself_lacks_none(tmp_path: Path, capsys: Capture) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 3, "vocab_size": 32, "pad_token_id": None}
    config = transformers.GptOssConfig(**sizes, **more)
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    words = ["convert", str(tmp_path / "model"), str(tmp_path / "m"), "--to", "fsdp_dtensor", "--dtype", "bfloat16"]
    assert main([*words, "-q"]) == 0
    checkpoint = without(tmp_path / "m", tmp_path / "short", "layers.0.mlp.experts.linear_fc2.weight1")
    back = ("convert", checkpoint, tmp_path / "out", "--to", "hf", "--not-strict", "--hf-model", tmp_path / "model")
    said = refused(capsys, *back)
    assert "experts are missing of model.layers.0.mlp.experts.down_proj (has 2 of 3): one tensor holds all" in said
    assert "--not-strict leaves out whole tensors only" in said
