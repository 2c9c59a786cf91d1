"""From HuggingFace to Megatron and back through the command line: bit for bit, and refused when something is wrong.

The models are transformers' own, made small, with every weight random; what `save_pretrained` wrote is the truth.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from checkpoints import peak_nbytes, same, write_dcp
from reshard.cli.main import main
from reshard.formats.fsdp_dtensor import TARGETS
from reshard.formats.megatron import locate, open_located

FAMILIES = (
    "llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "glm4_moe", "qwen2_5_vl",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model directory of a family, made once."""
    directory = tmp_path_factory.mktemp("models")

    def made(family: str) -> Path:
        if not (directory / family).exists():
            model = tiny_models.make(family).to(torch.bfloat16)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 1:
                        parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
                for module in model.modules():
                    if hasattr(module, "e_score_correction_bias"):
                        module.e_score_correction_bias = module.e_score_correction_bias.float().normal_()
            model.save_pretrained(directory / family)
        return directory / family

    return made


@pytest.fixture(scope="module")
def llama(models: Callable[[str], Path]) -> Path:
    return models("llama")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run a conversion that must fail: the message, when nothing was written."""

    def run(source: Path, *words: str) -> str:
        capsys.readouterr()
        assert main(["convert", str(source), str(tmp_path / "refused"), *words]) == 1
        assert not (tmp_path / "refused").exists()
        return capsys.readouterr().err

    return run


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not the same bits in two model directories."""
    a, b = ({k: t for f in sorted(d.glob("*.safetensors")) for k, t in load_file(f).items()} for d in (one, other))
    return sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if not same(a[name], b[name])]


@pytest.mark.parametrize("to", ["torch_dist", "fsdp_dtensor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_from_megatron_bit_for_bit(
    family: str, to: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = models(family)
    assert main(["convert", str(source), str(tmp_path / "megatron"), "--to", to, "-q"]) == 0
    back = [
        "convert",
        str(tmp_path / "megatron"),
        str(tmp_path / "back"),
        "--to",
        "hf",
        "--hf-model",
        str(source),
        "-q",
    ]
    assert main(back) == 0
    assert differing(source, tmp_path / "back") == []
    assert main(["verify", str(tmp_path / "back"), "--against", str(tmp_path / "megatron")]) == 0
    assert main(["verify", str(tmp_path / "megatron"), "--against", str(source)]) == 0


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_fsdp_dtensor_is_read_again(target: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("qwen3_moe")
    to = ["--to", "fsdp_dtensor", "--target", target, "-q"]
    assert main(["convert", str(source), str(tmp_path / "megatron"), *to]) == 0
    assert (
        main(["convert", str(tmp_path / "megatron"), str(tmp_path / "back"), "--to", "hf", "--hf-model", str(source)])
        == 0
    )
    assert differing(source, tmp_path / "back") == []


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_without_a_reference_the_config_is_made_from_megatrons_settings(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = models(family)
    assert main(["convert", str(source), str(tmp_path / "megatron"), "--to", "torch_dist", "-q"]) == 0
    (config := tmp_path / "megatron" / "iter_0000000" / "run_config.yaml").write_text(
        config.read_text().replace(str(source), "unknown")
    )
    (tmp_path / "megatron" / "reshard.json").unlink()
    assert main(["convert", str(tmp_path / "megatron"), str(tmp_path / "back"), "--to", "hf", "-q"]) == 0
    assert differing(source, tmp_path / "back") == []
    trained = tiny_models.load(tiny_models.make(family), source)
    loaded = tiny_models.load(tiny_models.make(family), tmp_path / "back")
    assert torch.equal(tiny_models.logits(loaded.float()), tiny_models.logits(trained.float()))


@pytest.mark.parametrize("first, second", [("torch_dist", "fsdp_dtensor"), ("fsdp_dtensor", "torch_dist")])
def test_one_megatron_format_becomes_the_other(
    first: str, second: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = models("qwen3_moe")
    dtype = ["--dtype", "bfloat16", "-q"]
    assert main(["convert", str(source), str(tmp_path / "a"), "--to", first, *dtype]) == 0
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", second, *dtype]) == 0
    assert main(["convert", str(source), str(tmp_path / "c"), "--to", second, *dtype]) == 0
    one, other = (open_located(locate(tmp_path / name)).checkpoint for name in "bc")
    assert one.tensors.keys() == other.tensors.keys()
    assert [n for n in one if one[n].numpy().tobytes() != other[n].numpy().tobytes()] == []


def test_bridges_own_spelling_is_taken(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = [
        "--megatron-path",
        str(tmp_path / "m"),
        "--tp",
        "2",
        "--cp",
        "1",
        "--ep",
        "1",
        "--ckpt-format",
        "fsdp_dtensor",
    ]
    assert main(["import", "--hf-model", str(llama), *to, "--torch-dtype", "bfloat16", "--trust-remote-code"]) == 0
    said = capsys.readouterr().err
    assert "--trust-remote-code changes nothing" in said
    assert "written for bridge" in said
    back = ["--megatron-path", str(tmp_path / "m"), "--hf-path", str(tmp_path / "hf"), "--no-progress", "--not-strict"]
    assert main(["export", "--hf-model", str(llama), *back, "--tp", "2"]) == 0
    assert differing(llama, tmp_path / "hf") == []


def test_masters_are_rounded_unless_float32_is_asked_for(llama: Path, tmp_path: Path) -> None:
    assert main(["convert", str(llama), str(tmp_path / "m"), "--to", "fsdp_dtensor", "-q"]) == 0
    assert {t.dtype.name for t in open_located(locate(tmp_path / "m")).checkpoint.tensors.values()} == {"F32"}
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "hf"), "--to", "hf", "-q", "--dtype", "float32"]) == 0
    loaded, truth = load_file(tmp_path / "hf" / "model.safetensors"), load_file(llama / "model.safetensors")
    assert all(torch.equal(loaded[name], truth[name].float()) for name in truth)


def test_a_padded_vocabulary_is_cut_again(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pad = ["--make-vocab-size-divisible-by", "64", "--tp", "2"]
    assert main(["convert", str(llama), str(tmp_path / "m"), "--to", "torch_dist", "-q", *pad]) == 0
    opened = open_located(locate(tmp_path / "m")).checkpoint
    assert opened["embedding.word_embeddings.weight"].shape[0] == 128
    assert not opened["embedding.word_embeddings.weight"].numpy()[67:].astype("f4").any()
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "hf"), "--to", "hf", "--hf-model", str(llama)]) == 0
    assert "pad the vocabulary from 67 to 128" in capsys.readouterr().err
    assert differing(llama, tmp_path / "hf") == []


def test_packed_experts_come_back_packed(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("qwen3_moe")
    packed = tmp_path / "packed"
    packed.mkdir()
    shutil.copy(source / "config.json", packed)
    weights = load_file(source / "model.safetensors")
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            [weights.pop(f"{experts}.{e}.{n}_proj.weight") for e in range(3)] for n in ("gate", "up", "down")
        )
        weights[f"{experts}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        weights[f"{experts}.down_proj"] = torch.stack(down)
    save_file(weights, packed / "model.safetensors", {"format": "pt"})
    assert main(["convert", str(packed), str(tmp_path / "m"), "--to", "torch_dist", "-q"]) == 0
    for reference in (packed, source):
        out = tmp_path / f"back-{reference.name}"
        assert main(["convert", str(tmp_path / "m"), str(out), "--to", "hf", "--hf-model", str(reference), "-q"]) == 0
        assert differing(reference, out) == []


# --------------------------------------------------------------------------------------------------------- refused


def test_a_reference_of_another_model_is_refused(
    models: Callable[[str], Path], llama: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert main(["convert", str(llama), str(tmp_path / "m"), "--to", "torch_dist", "-q"]) == 0
    assert "q_layernorm" in (said := refused(tmp_path / "m", "--to", "hf", "--hf-model", str(models("qwen3")))) or (
        "not a checkpoint of" in said
    )


def test_a_reference_of_another_size_is_refused(llama: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert main(["convert", str(llama), str(tmp_path / "m"), "--to", "torch_dist", "-q"]) == 0
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((llama / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    assert "vocab" in refused(tmp_path / "m", "--to", "hf", "--hf-model", str(other))
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "layers: HF 3, checkpoint 2" in refused(tmp_path / "m", "--to", "hf", "--hf-model", str(other))


def test_a_missing_shard_of_the_hub_is_named(llama: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    weights = load_file(llama / "model.safetensors")
    (copy := tmp_path / "copy").mkdir()
    shutil.copy(llama / "config.json", copy)
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in weights.items() if n != lost}, copy / "model.safetensors", {"format": "pt"})
    assert lost in refused(copy, "--to", "torch_dist")
    save_file(weights | {"model.layers.0.adapter.weight": torch.ones(2)}, copy / "model.safetensors", {"format": "pt"})
    assert "model.layers.0.adapter.weight" in refused(copy, "--to", "torch_dist")


@pytest.mark.parametrize("words, said", [
    (("--to", "torch_dist", "--tp", "3"), "num_attention_heads 2 by tp 3"),
    (("--to", "torch_dist", "--ep", "2"), "without experts by ep 2"),
    (("--to", "torch_dist", "--tp", "0"), "--tp 0"),
    (("--to", "megatron"), "no format 'megatron'"),
    (("--to", "fsdp_dtensor", "--target", "nemo"), "no target 'nemo'"),
])  # fmt: skip
def test_what_cannot_be_is_refused(words: tuple[str, ...], said: str, llama: Path, refused: Callable[..., str]) -> None:
    assert said in refused(llama, *words)


def test_experts_that_the_mesh_does_not_divide_are_refused(
    models: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    assert "num_moe_experts 3 by ep 2" in refused(models("qwen3_moe"), "--to", "fsdp_dtensor", "--ep", "2")


def test_two_sets_of_keys_that_disagree_are_refused(llama: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert main(["convert", str(llama), str(tmp_path / "m"), "--to", "fsdp_dtensor", "--target", "any", "-q"]) == 0
    shards = tmp_path / "m" / "iter_0000001"
    tensors = open_located(locate(tmp_path / "m")).checkpoint
    state = {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in tensors.items()}
    state["model.decoder.final_layernorm.weight"][3] += 1
    shutil.rmtree(shards)
    write_dcp(shards, state, ranks=1)
    assert "decoder.final_layernorm.weight" in refused(tmp_path / "m", "--to", "hf", "--hf-model", str(llama))


def test_quantized_weights_are_refused(llama: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    weights = load_file(llama / "model.safetensors")
    (copy := tmp_path / "copy").mkdir()
    shutil.copy(llama / "config.json", copy)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {f"{name}_scale_inv": torch.ones(1)}, copy / "model.safetensors", {"format": "pt"})
    assert f"{name}_scale_inv" in refused(copy, "--to", "torch_dist")


def test_families_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--json"]) == 0
    known = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert "Qwen3ForCausalLM" in known["qwen3"]["architectures"]
    assert main(["families"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


@pytest.mark.slow
def test_a_conversion_takes_no_more_memory_than_a_block(tmp_path: Path) -> None:
    """480 MB of weights, there and back, in processes of their own."""
    rows, hidden, layers = 16_000, 1_024, 12
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": 4_096,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
        "vocab_size": rows, "tie_word_embeddings": False, "dtype": "bfloat16", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    shapes = {"model.embed_tokens": (rows, hidden), "lm_head": (rows, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        for name, shape in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (1024, hidden),
            "self_attn.k_proj": (256, hidden), "self_attn.v_proj": (256, hidden), "self_attn.o_proj": (hidden, 1024),
            "mlp.gate_proj": (4096, hidden), "mlp.up_proj": (4096, hidden), "mlp.down_proj": (hidden, 4096),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}"] = shape
    (source := tmp_path / "hf").mkdir()
    (source / "config.json").write_text(json.dumps(config))
    weights = {f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    there = ["convert", str(source), str(tmp_path / "m"), "--to", "torch_dist"]
    back = ["convert", str(tmp_path / "m"), str(tmp_path / "back"), "--to", "hf", "--hf-model", str(source)]
    assert peak_nbytes(*there, "-q") < 150 << 20
    assert peak_nbytes(*back, "-q") < 150 << 20


def test_rotary_frequencies_of_old_releases_are_not_taken(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(llama / "model.safetensors")
    (copy := tmp_path / "copy").mkdir()
    shutil.copy(llama / "config.json", copy)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(weights | buffers, copy / "model.safetensors", {"format": "pt"})
    assert main(["convert", str(copy), str(tmp_path / "m"), "--to", "torch_dist"]) == 0
    assert "2 rotary_emb.inv_freq are not taken" in capsys.readouterr().err
    assert (
        main(["convert", str(tmp_path / "m"), str(tmp_path / "hf"), "--to", "hf", "--hf-model", str(copy), "-q"]) == 0
    )
    assert differing(llama, tmp_path / "hf") == []


@pytest.mark.parametrize("own", [False, True])
def test_a_head_beside_tied_weights_is_left_out_or_unties_them(
    own: bool, models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = models("qwen2")
    assert main(["convert", str(source), str(tmp_path / "m"), "--to", "fsdp_dtensor", "-q"]) == 0
    tensors = open_located(locate(tmp_path / "m")).checkpoint
    state = {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in tensors.items()}
    state["model.module.output_layer.weight"] = state["model.module.embedding.word_embeddings.weight"] + own
    shutil.rmtree(tmp_path / "m" / "iter_0000000")
    write_dcp(tmp_path / "m" / "iter_0000000", state, ranks=1)
    (reference := tmp_path / "config").mkdir()
    shutil.copy(source / "config.json", reference)
    back = ["convert", str(tmp_path / "m"), str(tmp_path / "hf"), "--to", "hf", "--hf-model", str(reference)]
    assert main(back) == 0
    assert ("tie_word_embeddings becomes false" if own else "to which it is tied") in capsys.readouterr().err
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert ("lm_head.weight" in written) is own
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is not own


def test_a_config_alone_says_how_experts_are_packed_on_the_hub(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models("qwen3_vl_moe")
    (reference := tmp_path / "config").mkdir()
    shutil.copy(source / "config.json", reference)
    assert main(["convert", str(source), str(tmp_path / "m"), "--to", "torch_dist", "-q"]) == 0
    back = ["convert", str(tmp_path / "m"), str(tmp_path / "back"), "--to", "hf", "--hf-model", str(reference), "-q"]
    assert main(back) == 0
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert written["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (3, 16, 24)
    trained, loaded = (tiny_models.load(tiny_models.make("qwen3_vl_moe"), path) for path in (source, tmp_path / "back"))
    assert [n for n, t in trained.state_dict().items() if not same(t, loaded.state_dict()[n])] == []


def test_special_tokens_come_from_the_tokenizer_beside_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, copy := tmp_path / "copy")
    (copy / "generation_config.json").unlink(missing_ok=True)
    (copy / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    words = {"model": {"vocab": {"a": 0, "<s>": 5}}, "added_tokens": [{"id": 9, "content": "</s>"}]}
    (copy / "tokenizer.json").write_text(json.dumps(words))
    assert main(["convert", str(copy), str(tmp_path / "m"), "--to", "torch_dist", "-q"]) == 0
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "hf"), "--to", "hf", "-q"]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (5, 9)
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
