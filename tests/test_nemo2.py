"""Directories of NeMo 2: real ones are read, and what is written is held against them, Fiddle and Megatron-Core."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import sys
import tracemalloc
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer as FastTokenizer
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from transformers import AutoModelForCausalLM

import reshard
import tiny_models
from checkpoints import left_in, same
from megatron_ranks import on_ranks
from reshard.cli.main import main
from reshard.dialects import nemo_config
from reshard.errors import Corrupt, Mismatch, Unsupported
from reshard.formats import dcp, fiddle, megatron_settings, nemo2_classes, nemo2_context, token_count
from reshard.formats.fiddle import Call, Symbol
from reshard.formats.megatron import locate, open_located
from reshard.ops import nemo2
from test_torch_dist import load_by_hand

DATA = Path(__file__).parent / "data" / "nemo2"
REAL, TRUTH = DATA / "llama3", DATA / "llama3_hf"
CONTEXTS = ("llama3-8b", "mistral-7b", "mixtral-8x7b", "nemotron3-8b")

needs_megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core has no wheel")

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_BANDS = {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0, "original_max_position_embeddings": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 5e5, "rms_norm_eps": 1e-5}),
    "llama3.1": ("llama", {"rope_scaling": {"rope_type": "llama3", **_BANDS}, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 32, "head_dim": 16}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "nemotron": ("nemotron", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 8, "norm_topk_prob": True}),
    "gemma": ("gemma", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "starcoder2": ("starcoder2", {"sliding_window": 32, "use_bias": True, "tie_word_embeddings": True}),
    "starcoder2 with NeMo's own GELU": ("starcoder2", {"hidden_act": "gelu", "use_bias": True}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5}),
    "llama with another activation": ("llama", {"hidden_act": "relu"}),
}
CLASSES = {
    "llama": "llama.LlamaConfig", "llama3.1": "llama.Llama31Config", "mistral": "mistral.MistralConfig7B",
    "mistral without a window": "mistral.MistralConfig7B", "mixtral": "mixtral.MixtralConfig",
    "nemotron": "nemotron.NemotronConfig", "qwen2": "qwen2.Qwen2Config", "qwen3": "qwen3.Qwen3Config",
    "qwen3_moe": "qwen3.Qwen3MoEConfig", "gemma": "gemma.GemmaConfig", "gemma2": "gemma2.Gemma2Config",
    "starcoder2": "starcoder2.Starcoder2Config", "starcoder2 with NeMo's own GELU": "starcoder2.Starcoder2Config",
    "phi3": "phi3mini.Phi3Config", "llama with another activation": "llama.LlamaConfig",
}  # fmt: skip


def saved(directory: Path, kind: str, **changes: Any) -> Path:
    """A model directory of transformers, small and random."""
    config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model directory by its name in MODELS, made once."""
    folder = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        kind, changes = MODELS[name]
        return folder / name if (folder / name).exists() else saved(folder / name, kind, **changes)

    return made


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not the same bits in two model directories."""
    a, b = weights(one), weights(other)
    return sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if not same(a[name], b[name])]


Entries = tuple[dict[str, tuple[tuple[int, ...], str]], set[str]]
"""Shapes and dtypes by key, and the keys of objects."""


def described(directory: Path) -> Entries:
    """What torch sees of a DCP."""
    entries = FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {k: e for k, e in entries.items() if isinstance(e, TensorStorageMetadata)}
    objects = {k for k, e in entries.items() if isinstance(e, BytesStorageMetadata)}
    return {k: (tuple(e.size), str(e.properties.dtype).removeprefix("torch.")) for k, e in tensors.items()}, objects


def real() -> Entries:
    """What there is in NeMo's own: torch would have to import Megatron to see it."""
    opened = dcp.open(REAL / "weights")
    tensors = {n: (t.shape, t.dtype.torch) for n, t in opened.tensors.items() if "_extra_state/" not in n}
    return tensors, set(opened.objects)


def arguments(directory: Path) -> dict[str, Any]:
    """The config's arguments in a context's io.json."""
    return dict(nemo2_context.read(directory / "context").config.arguments)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the real model is converted to."""
    target = tmp_path_factory.mktemp("written") / "nemo2"
    assert main(["convert", str(TRUTH), str(target), "--to", "nemo2", "-q"]) == 0
    return target


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    source = models(name)
    assert main(["convert", str(source), str(tmp_path / "nemo2"), "--to", "nemo2", "-q"]) == 0
    assert nemo2_context.read(tmp_path / "nemo2/context").config.target.path.endswith(f".{CLASSES[name]}")
    assert main(["convert", str(tmp_path / "nemo2"), str(tmp_path / "back"), "--to", "hf", "-q"]) == 0
    assert differing(source, tmp_path / "back") == []
    assert main(["verify", str(tmp_path / "nemo2"), "--against", str(source)]) == 0
    one, other = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        for path in (source, tmp_path / "back")
    )
    tokens = torch.arange(3, 51).unsqueeze(0)
    assert torch.equal(one(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize("to", ["torch_dist", "fsdp_dtensor"])
def test_nemo_becomes_every_other_format(to: str, tmp_path: Path) -> None:
    dtype = ["--dtype", "bfloat16", "-q"]
    assert main(["convert", str(REAL), str(tmp_path / "a"), "--to", to, *dtype]) == 0
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "nemo2", *dtype]) == 0
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "hf"), "--to", "hf", *dtype]) == 0
    assert differing(TRUTH, tmp_path / "hf") == []


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("starcoder2", "nemo.collections.llm.fn.activation.openai_gelu"),
        ("starcoder2 with NeMo's own GELU", None),
        ("llama with another activation", "torch.nn.functional.relu"),
    ],
)
def test_an_activation_is_written_where_the_class_has_another(
    name: str, function: str | None, models: Callable[[str], Path], tmp_path: Path
) -> None:
    reshard.convert(models(name), tmp_path / "nemo2", to="nemo2")
    given = arguments(tmp_path / "nemo2")
    expected = (None, None) if function is None else (Symbol.of(function), False)
    assert (given.get("activation_func"), given.get("bias_activation_fusion")) == expected


def test_rows_that_pad_the_vocabulary_stay(models: Callable[[str], Path], tmp_path: Path) -> None:
    pad = ["--make-vocab-size-divisible-by", "96", "-q"]
    assert main(["convert", str(models("llama")), str(tmp_path / "a"), "--to", "torch_dist", *pad]) == 0
    for source, target, to in (("a", "b", "nemo2"), ("b", "c", "nemo2"), ("c", "d", "torch_dist")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), "--to", to, "-q"]) == 0
        tensors = open_located(locate(tmp_path / target)).checkpoint.tensors
        assert [t.shape[0] for n, t in tensors.items() if n.endswith("word_embeddings.weight")] == [96]
    assert arguments(tmp_path / "b")["vocab_size"] == 96
    found = {"vocab_size": 96, "make_vocab_size_divisible_by": 32}
    assert {name: arguments(tmp_path / "c")[name] for name in found} == found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_context_has_the_dtype_of_the_weights(dtype: str, tmp_path: Path) -> None:
    assert main(["convert", str(TRUTH), str(tmp_path / "a"), "--to", "nemo2", "--dtype", dtype, "-q"]) == 0
    found = arguments(tmp_path / "a")
    assert found["params_dtype"] == Symbol("torch", dtype)
    assert (found["bf16"], found["fp16"]) == (dtype == "bfloat16", dtype == "float16")
    assert {kind for _, kind in described(tmp_path / "a/weights")[0].values()} == {dtype}


# --------------------------------------------------------------------------------------------- against NeMo's own


def test_the_weights_are_those_of_nemos_own_import(written: Path) -> None:
    ours, objects = described(written / "weights")
    theirs, asked = real()
    assert ours == theirs
    assert asked <= objects
    a, b = (open_located(locate(path)).checkpoint for path in (written, REAL))
    assert [name for name in b if a[name].numpy().tobytes() != b[name].numpy().tobytes()] == []


def test_the_context_is_that_of_nemos_own_import(written: Path) -> None:
    ours, theirs = (nemo2_context.read(path / "context") for path in (written, REAL))
    assert (ours.model.target, ours.config.target) == (theirs.model.target, theirs.config.target)
    assert ours.tokenizer == theirs.tokenizer
    assert ours.config.get("generation_config") == theirs.config.get("generation_config")
    one, other = (nemo2_context.settings_of(path / "context").values for path in (written, REAL))
    unlike = {name: (value, other.get(name)) for name, value in one.items() if value != other.get(name)}
    assert unlike == {"vocab_size": (None, 323)}  # which is the tokenizer's number
    inside = [name for name in left_in(REAL / "context") if "." in name]
    assert [name for name in left_in(written / "context") if "." in name] == inside
    for name in inside:
        if name not in ("io.json", "model.yaml", "nemo_tokenizer/special_tokens_map.json"):  # NeMo saves the last anew
            assert (written / "context" / name).read_bytes() == (REAL / "context" / name).read_bytes()


def test_model_yaml_says_what_io_json_says(written: Path) -> None:
    found = megatron_settings.of_model_yaml(written / "context/model.yaml").values
    for name, value in arguments(written).items():
        if not isinstance(value, Call):
            assert found[name] == (value.name if isinstance(value, Symbol) else value)
    text = (written / "context/model.yaml").read_text()
    for path in ("llm.gpt.model.llama.LlamaModel", "torch.nn.functional.silu", "torch.bfloat16", "auto_tokenizer.Auto"):
        assert path in text


def test_a_real_directory_becomes_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    assert main(["convert", str(REAL), str(tmp_path / "hf"), "--to", "hf", "-q"]) == 0
    assert differing(TRUTH, tmp_path / "hf") == []
    ours, truth = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "hf", TRUTH))
    written_by_class = {"pretraining_tp", "rope_scaling", "transformers_version", "use_cache"}
    assert {k: v for k, v in truth.items() if k not in written_by_class} == {
        k: ours.get(k) for k in truth.keys() - written_by_class
    }
    for place in ("nemo_tokenizer", "artifacts"):
        for file in (REAL / "context" / place).iterdir():
            assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()


def test_extra_states_are_lists_of_none(written: Path) -> None:
    stream = io.BytesIO()
    torch.save([None], stream)
    assert (written / "weights/__0_0.distcp").read_bytes().startswith(stream.getvalue())
    _, objects = described(written / "weights")
    modules = {name.partition("._extra_state/")[0].rpartition(".")[2] for name in objects}
    linears = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert modules == linears | {"core_attention", "fused_attention", "final_layernorm"}


def test_common_pt_is_that_of_a_run_that_has_not_begun(written: Path) -> None:
    ours = torch.load(written / "weights/common.pt", weights_only=True)
    theirs = torch.load(REAL / "weights/common.pt", weights_only=False)
    assert {name: ours[name] for name in ("epoch", "global_step", "pytorch-lightning_version", "lr_schedulers")} == {
        name: theirs[name] for name in ("epoch", "global_step", "pytorch-lightning_version", "lr_schedulers")
    }
    assert (written / "weights/metadata.json").read_text() == (REAL / "weights/metadata.json").read_text()


@needs_megatron
@pytest.mark.slow
def test_megatron_core_loads_what_a_model_of_nemos_asks_for(written: Path) -> None:
    tensors, asked = real()
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    (found,) = on_ranks(load_by_hand, written / "weights", shapes, sorted(asked))
    truth = open_located(locate(REAL)).checkpoint
    for name in shapes:
        assert found[name].view(torch.uint16).numpy().tobytes() == truth[name].numpy().tobytes()
    assert all(found[name] is None for name in asked)


# --------------------------------------------------------------------------------------------------------- fiddle


def stubs(text: str) -> Iterator[types.ModuleType]:
    """Modules with all that a file names of NeMo, so that Fiddle can import it: classes that take any argument."""
    named = re.findall(r'"type": "pyref", "module": "(nemo\.[\w.]+)", "name": "(\w+)"', text)
    modules: dict[str, types.ModuleType] = {}
    for path, name in named:
        parts = path.split(".")
        for n in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
        made = type(name, (), {"__init__": lambda self, **given: None, "__module__": path})
        setattr(modules[path], name, made)
    yield from modules.values()


@pytest.mark.parametrize("name", MODELS)
def test_fiddle_reads_it_and_would_have_written_it_so(
    name: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fiddle")
    from fiddle._src.experimental import serialization

    assert main(["convert", str(models(name)), str(tmp_path / "nemo2"), "--to", "nemo2", "-q"]) == 0
    text = (tmp_path / "nemo2/context/io.json").read_text()
    for module in stubs(text):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(
        serialization._serialization_constants_by_id,
        id(torch.bfloat16),
        serialization.SerializationConstant("torch", "bfloat16"),
    )
    context = serialization.load_json(text)
    assert context.model.config.num_layers == 2
    assert context.model.config.params_dtype is torch.bfloat16
    assert context.trainer.strategy.setup_optimizers is False
    assert json.loads(serialization.dump_json(context)) == json.loads(text)


@pytest.mark.parametrize("path", sorted(DATA.rglob("io.json")), ids=lambda path: str(path.relative_to(DATA)))
def test_what_nemo_wrote_is_read_and_written_with_the_same_meaning(path: Path) -> None:
    root = fiddle.loads(path.read_bytes(), str(path))
    assert fiddle.loads(fiddle.dumps(root), "ours") == root
    assert root.target.path == "nemo.lightning.io.pl.TrainerContext"


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", CONTEXTS)
def test_io_json_and_the_classes_say_all_that_model_yaml_says(name: str, tmp_path: Path) -> None:
    stated = megatron_settings.of_model_yaml(DATA / "contexts" / name / "model.yaml").values
    shutil.copy(DATA / "contexts" / name / "io.json", tmp_path)
    found = nemo2_context.settings_of(tmp_path)
    assert {key: (value, stated.get(key)) for key, value in found.values.items() if stated.get(key) != value} == {}
    assert [n for n in nemo2_classes.GPT if n not in found.values] == []
    said = [notice for notice in found.notices if "moe_router_pre_softmax" in notice]
    assert len(said) == (name == "mixtral-8x7b")


def test_the_classes_have_the_values_that_nemo_has() -> None:
    truth = json.loads((DATA / "classes.json").read_text())
    for name, values in truth.items():
        found = nemo2_classes.defaults(values.pop("_class"))
        assert found is not None
        found["num_query_groups"] = found["num_query_groups"] or found["num_attention_heads"]
        found["kv_channels"] = found["kv_channels"] or found["hidden_size"] // found["num_attention_heads"]
        if found["num_moe_experts"]:
            found["moe_ffn_hidden_size"] = found["ffn_hidden_size"]
        short = {k: v.rpartition(".")[2] if k in ("activation_func", "params_dtype") else v for k, v in values.items()}
        assert (name, found) == (name, short)


def test_values_of_llama_3_1_are_scaled() -> None:
    settings = nemo2_context.settings_of(DATA / "contexts/llama3.1-8b").values
    assert (settings["scale_factor"], settings["old_context_len"], settings["seq_length"]) == (8.0, 8192, 131072)
    assert settings["normalization"] == "RMSNorm"


def changed(source: Path, target: Path, change: Callable[[str], str], name: str = "io.json") -> Path:
    shutil.copytree(source, target)
    text = (target / "context" / name).read_text()
    assert change(text) != text
    (target / "context" / name).write_text(change(text))
    return target


def test_io_json_counts_where_model_yaml_says_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = changed(REAL, tmp_path / "a", lambda t: t.replace("500000.0", "12345.0"))
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert "rotary_base 500000.0, 12345.0" in capsys.readouterr().err
    assert json.loads((tmp_path / "hf/config.json").read_text())["rope_theta"] == 12345.0


def test_io_json_alone_is_enough(tmp_path: Path) -> None:
    source = tmp_path / "a"
    shutil.copytree(REAL, source)
    (source / "context/model.yaml").unlink()
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf", "-q"]) == 0
    assert differing(TRUTH, tmp_path / "hf") == []


def test_embeddings_are_multiplied_by_gemmas_class_alone(models: Callable[[str], Path], tmp_path: Path) -> None:
    reshard.convert(models("gemma"), tmp_path / "nemo2", to="nemo2")
    (tmp_path / "nemo2/context/model.yaml").unlink()
    text = tmp_path / "nemo2/context/io.json"
    text.write_text(text.read_text().replace('"GemmaModel"', '"GPTModel"'))
    with pytest.raises(Unsupported, match="gemma: the checkpoint says apply_embedding_scaling False, not True"):
        reshard.convert(tmp_path / "nemo2", tmp_path / "hf", to="hf")


def test_heads_that_are_turned_in_part_are_not_said_of_models_that_turn_whole_ones(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    reshard.convert(models("starcoder2"), tmp_path / "nemo2", to="nemo2")
    (tmp_path / "nemo2/context/model.yaml").unlink()
    text = tmp_path / "nemo2/context/io.json"
    percent = """["Attr(name='rotary_percent')", {"type": "leaf", "value": 1.0"""
    assert percent in text.read_text()
    text.write_text(text.read_text().replace(percent, percent.replace("1.0", "0.5")))
    with pytest.raises(Unsupported, match=r"turns 0\.5 of each head: Starcoder2ForCausalLM .* turns whole heads"):
        reshard.convert(tmp_path / "nemo2", tmp_path / "hf", to="hf")


def test_weights_and_context_may_lie_in_one_directory(tmp_path: Path) -> None:
    """As the first releases of NeMo 2 kept them."""
    for name in ("weights", "context"):
        shutil.copytree(REAL / name, tmp_path / "a", dirs_exist_ok=True)
    (tmp_path / "a/model.yaml").unlink()
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "hf"), "--to", "hf", "-q"]) == 0
    assert differing(TRUTH, tmp_path / "hf") == []


def test_the_directory_of_the_weights_is_enough_to_name(tmp_path: Path) -> None:
    assert main(["convert", str(REAL / "weights"), str(tmp_path / "hf"), "--to", "hf", "-q"]) == 0
    assert differing(TRUTH, tmp_path / "hf") == []


# ----------------------------------------------------------------------------------------- the script and its names


def test_the_twelve_models_of_nvidias_script_are_known() -> None:
    assert len(nemo2_classes.MODEL_IDS) == 12
    assert nemo_config.of_id("nemotron4-340b")["kv_channels"] == 192
    assert nemo_config.of_id("nvidia/nemotron-3-8b-base-4k")["num_query_groups"] == 32
    with pytest.raises(Unsupported, match=r"meta-llama/Meta-Llama-3-8B.*nemotron4-340b"):
        nemo_config.of_id("meta-llama/Llama-3.3-70B")
    with pytest.raises(Unsupported, match=r"hybrid"):
        nemo_config.of_id("nemotronh8b")


def test_a_model_id_fills_what_a_checkpoint_does_not_say() -> None:
    name = "mistralai/Mistral-7B-v0.1"
    assert nemo2.filled({}, name) == nemo_config.of_id(name)
    assert nemo2.filled({}, name)["window_size"] == [4095, 0]  # tokens before a token
    partial = {"num_layers": 32, "window_size": [4095, 0], "seq_length": 1024, "rotary_base": 10000.0}
    assert nemo2.filled(partial, name)["layernorm_epsilon"] == 1e-5
    assert nemo2.filled(partial, name)["seq_length"] == 1024


@pytest.mark.parametrize(
    "name, context",
    [("meta-llama/Meta-Llama-3-8B", "llama3-8b"), ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
     ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"), ("nvidia/nemotron-3-8b-base-4k", "nemotron3-8b")],
)  # fmt: skip
def test_a_model_id_agrees_with_nemos_own_context_of_that_model(name: str, context: str) -> None:
    stated = nemo2_context.settings_of(DATA / "contexts" / context).values
    assert nemo2.filled(stated, name).items() >= {n: v for n, v in stated.items() if v is not None}.items()
    others = [other for other in nemo2_classes.MODEL_IDS if other != name]
    for other in others:
        with pytest.raises(Mismatch, match=re.escape(other)):
            nemo2.filled(stated, other)


def test_a_model_id_that_contradicts_the_checkpoint_is_refused_with_both_values() -> None:
    stated = {"num_layers": 32, "rotary_base": 12345, "layernorm_epsilon": 1e-6}
    with pytest.raises(Mismatch, match=r"rotary_base is 12345, not 500000") as caught:
        nemo2.filled(stated, "meta-llama/Meta-Llama-3-8B")
    assert "layernorm_epsilon is 1e-06, not 1e-05" in str(caught.value)


def test_a_model_id_may_be_a_directory_of_nemos(tmp_path: Path) -> None:
    shutil.copytree(REAL / "weights", tmp_path / "bare/weights")
    words = ["convert", str(tmp_path / "bare"), str(tmp_path / "hf"), "--to", "hf", "--model-id", str(REAL), "-q"]
    assert main(words) == 0
    assert differing(TRUTH, tmp_path / "hf") == []


def test_nvidias_spelling_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--input_path", str(TRUTH), "--output_path", str(tmp_path / "nemo2")]
    tokenizer = ["--tokenizer_path", str(TRUTH), "--tokenizer_library", "huggingface"]
    assert main(["convert", *paths, *tokenizer, "--model_id", "meta-llama/Meta-Llama-3-8B"]) == 1
    said = capsys.readouterr().err
    assert "num_layers is 2, not 32" in said
    assert "leave --model-id out" in said
    assert main(["convert", *paths, *tokenizer, "-q"]) == 0
    assert nemo2_context.read(tmp_path / "nemo2/context").model.target.path.endswith("LlamaModel")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--to", "hf"], "there is no SRC, OUT"),
        (["a", "b"], "there is no --to"),
        (["a", "b", "--input-path", "c", "--output-path", "d"], "a is one path too many"),
    ],
)
def test_a_path_or_format_that_is_missing_is_named(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *words]) == 1
    assert said in capsys.readouterr().err


def test_a_model_id_is_enough_for_weights_that_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copytree(REAL / "weights", tmp_path / "bare/weights")
    words = ["convert", str(tmp_path / "bare"), str(tmp_path / "hf"), "--to", "hf"]
    assert main(words) == 1
    assert "do not say num_attention_heads, rotary_base" in capsys.readouterr().err
    by_id = ["--model-id", "meta-llama/Meta-Llama-3-8B"]
    assert main([*words, *by_id]) == 1
    assert not (tmp_path / "hf").exists()
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "kv_channels": 8}
    small = {**nemo_config.of_id("meta-llama/Meta-Llama-3-8B"), **sizes, "num_query_groups": 2}
    monkeypatch.setattr(nemo_config, "of_id", lambda _: small)
    assert main([*words, *by_id, "-q"]) == 0
    assert differing(TRUTH, tmp_path / "hf") == []


# ------------------------------------------------------------------------------------------------------ tokenizers


def pieces(count: int) -> bytes:
    """A SentencePiece model's protobuf: pieces, then the trainer's spec."""
    body = b"".join(b"\x0a" + bytes([len(p)]) + p for p in (b"\x0a\x03" + f"{n:03}".encode() for n in range(count)))
    return body + b"\x12\x02\x08\x01"


def test_tokens_are_counted_as_tokenizers_counts_them() -> None:
    path = TRUTH / "tokenizer.json"
    assert token_count.count(path) == FastTokenizer.from_file(str(path)).get_vocab_size() == 323
    assert token_count.count(TRUTH) == 323
    assert token_count.of_bytes(pieces(250)) == 250
    assert [token_count.of_bytes(data) for data in (b"", b"{", b"{}", b"\x0a\xff", b"\x0a\x05ab", b"hello")] == [
        None
    ] * 6


def test_special_tokens_are_found_without_a_list_of_all_pieces(tmp_path: Path) -> None:
    controls = b"\x0a\x07\x0a\x03<s>\x18\x03" + b"\x0a\x08\x0a\x04</s>\x18\x03"
    (tmp_path / "my.model").write_bytes(b"\x0a\x00" * 200_000 + controls)
    tracemalloc.start()
    found = token_count.special_pieces(tmp_path / "my.model")
    _, peak_nbytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == {"bos": 200_000, "eos": 200_001}
    assert peak_nbytes < 2 << 20


def test_a_sentencepiece_model_lies_where_io_json_says(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.model").write_bytes(pieces(64))
    words = ["--to", "nemo2", "--tokenizer-path", str(tmp_path / "my.model"), "--tokenizer-library", "sentencepiece"]
    assert main(["convert", str(models("llama")), str(tmp_path / "a"), *words]) == 0
    found = nemo2_context.read(tmp_path / "a/context")
    assert found.tokenizer is not None
    assert found.tokenizer.target.path == nemo2_context.SENTENCE_PIECE
    assert (tmp_path / "a/context" / found.tokenizer.get("model_path")).read_bytes() == pieces(64)
    assert "vocab_size" not in found.config.arguments  # every release finds 64 rows by itself
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "hf"), "--to", "hf", "-q"]) == 0
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == pieces(64)
    (tmp_path / "other.model").write_bytes(pieces(60))
    capsys.readouterr()
    assert (
        main(
            [
                "convert",
                str(models("llama")),
                str(tmp_path / "b"),
                "--to",
                "nemo2",
                "--tokenizer-path",
                str(tmp_path / "other.model"),
            ]
        )
        == 0
    )
    assert "64 rows, the tokenizer 60 tokens" in capsys.readouterr().err
    assert arguments(tmp_path / "b")["vocab_size"] == 64


@pytest.mark.parametrize(
    "words, said",
    [
        (["--tokenizer-library", "tiktoken", "--tokenizer-path", "."], "sentencepiece and huggingface are written"),
        (["--tokenizer-library", "tiktoken"], "sentencepiece and huggingface are written"),
        (["--tokenizer-path", str(TRUTH / "config.json")], "config.json is not a SentencePiece model"),
        (["--tokenizer-path", str(REAL / "weights")], "has no files of a known tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(TRUTH), str(tmp_path / "a"), "--to", "nemo2", *words]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# -------------------------------------------------------------------------------------------- refused, and hostile


@pytest.mark.parametrize(
    "kind, changes, said",
    [
        ("olmoe", {"num_experts": 4}, "no class for olmoe models"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "position_embedding_type 'yarn'"),
        ("mistral", {"rope_scaling": {"rope_type": "llama3", **_BANDS}}, "has no scaling of the rotary embedding"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}, "window_attn_skip_freq"),
    ],
)
def test_what_nemo_computes_otherwise_is_refused(
    kind: str, changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "hf", kind, **changes)
    assert main(["convert", str(source), str(tmp_path / "a"), "--to", "nemo2"]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_model_with_a_vision_tower_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.make("qwen2_5_vl").save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "a"), "--to", "nemo2"]) == 1
    assert "no class for qwen2_5_vl models" in capsys.readouterr().err


def context(change: Callable[[dict[str, Any]], None]) -> bytes:
    document = json.loads((REAL / "context/io.json").read_text())
    change(document)
    return json.dumps(document).encode()


def self_held(document: dict[str, Any]) -> None:
    document["objects"]["llama_model_1"]["items"][0][1] = {"type": "ref", "key": "llama_model_1"}


def deep(document: dict[str, Any]) -> None:
    for n in range(200):
        item = {"type": "ref", "key": f"d{n + 1}"}
        document["objects"][f"d{n}"] = {
            "type": {"type": "pyref", "module": "builtins", "name": "list"}, "items": [["", item]], "metadata": None,
        }  # fmt: skip
    document["objects"]["llama_model_1"]["items"][0][1] = {"type": "ref", "key": "d0"}


def absent(document: dict[str, Any]) -> None:
    del document["objects"]["llama_config_1"]


def listed_root(document: dict[str, Any]) -> None:
    document["root"] = [1]


def wide(document: dict[str, Any]) -> None:
    leaves = [["", {"type": "leaf", "value": 1}]] * 200_000
    document["objects"]["llama_config_1"]["items"] = leaves


@pytest.mark.parametrize(
    "change", [self_held, deep, absent, listed_root, wide], ids=lambda change: str(change.__name__)
)
def test_a_context_without_end_or_sense_is_corrupt(change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(Corrupt, match=r"io\.json"):
        fiddle.loads(context(change), "io.json")


@pytest.mark.parametrize("data", [b"", b"[", b"[]", b"{}", b"null", b'{"objects": {}, "root": 1}', b"[" * 100_000])
def test_what_is_no_context_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt, match=r"io\.json"):
        fiddle.loads(data, "io.json")


def test_a_shared_object_is_read_once(tmp_path: Path) -> None:
    """Twenty-four lists, each twice in the next: sixteen million values, were they not shared."""

    def bomb(document: dict[str, Any]) -> None:
        kind = {"type": "pyref", "module": "builtins", "name": "list"}
        document["objects"]["b0"] = {"type": kind, "items": [], "metadata": None}
        for n in range(1, 25):
            two = [["", {"type": "ref", "key": f"b{n - 1}"}]] * 2
            document["objects"][f"b{n}"] = {"type": kind, "items": two, "metadata": None}
        items = document["objects"]["llama_config_1"]["items"]
        items.append(["Attr(name='bomb')", {"type": "ref", "key": "b24"}])

    root = fiddle.loads(context(bomb), "io.json")
    assert root.get("model").get("config").get("num_layers") == 2
    (tmp_path / "io.json").write_bytes(context(bomb))
    with pytest.raises(Corrupt, match=r"io\.json: its values refer to each other over and over"):
        nemo2_context.settings_of(tmp_path)


def test_nothing_that_a_context_names_is_imported_or_called(tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    source = tmp_path / "a"
    shutil.copytree(REAL, source)

    def evil(document: dict[str, Any]) -> None:
        config = document["objects"]["llama_config_1"]
        metadata = {"type": {"type": "pyref", "module": "fiddle._src.config", "name": "BuildableTraverserMetadata"},
                    "items": [["Attr(name='fn_or_cls')", {"type": "pyref", "module": "os", "name": "system"}]],
                    "metadata": None}  # fmt: skip
        document["objects"]["m"] = metadata
        document["objects"]["evil"] = {**config, "metadata": {"type": "ref", "key": "m"}, "items": [
            ["Attr(name='command')", {"type": "leaf", "value": f"touch {mark}"}]]}  # fmt: skip
        config["items"].append(["Attr(name='init_method')", {"type": "ref", "key": "evil"}])
        config["items"].append(["Attr(name='x')", {"type": "pyref", "module": "no_such_module_of_mine", "name": "x"}])

    (source / "context/io.json").write_bytes(context(evil))
    text = (source / "context/model.yaml").read_text()
    (source / "context/model.yaml").write_text(text + f"evil: !!python/object/apply:os.system ['touch {mark}']\n")
    (source / "context/0f2d7a6a5b0c4c0e9d6b7f1e2a3b4c5d").write_bytes(
        b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    )
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf", "-q"]) == 0
    assert not mark.exists()
    assert "no_such_module_of_mine" not in sys.modules


@pytest.mark.parametrize("named", ["/etc", "../../../../etc", "nemo_tokenizer/../.."])
def test_a_tokenizer_outside_of_the_context_is_not_taken(named: str, tmp_path: Path) -> None:
    source = changed(
        REAL, tmp_path / "a", lambda text: text.replace('"value": "nemo_tokenizer"', f'"value": "{named}"')
    )
    found = nemo2_context.read(source / "context")
    assert found.tokenizer is not None
    assert found.tokenizer.get("pretrained_model_name") == named
    assert nemo2_context.tokenizer_path(source / "context", found) is None
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf", "-q"]) == 0
    assert not (tmp_path / "hf/tokenizer.json").exists()


def test_an_adapter_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(REAL, tmp_path / "a")
    (tmp_path / "a/weights/adapter_metadata.json").write_text('{"model_ckpt_path": "/base"}')
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "hf"), "--to", "hf"]) == 1
    assert "an adapter's weights alone" in capsys.readouterr().err


def test_a_context_of_another_kind_of_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = fiddle.dumps(
        Call(Symbol("nemo.lightning.io.pl", "TrainerContext"), {"model": Call(Symbol("my.own", "Model"))})
    )
    source = tmp_path / "a"
    shutil.copytree(REAL, source)
    (source / "context/model.yaml").unlink()
    (source / "context/io.json").write_text(text)
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf"]) == 1
    assert "my.own.Model, which has no config" in capsys.readouterr().err


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "io.json").open("wb") as file:
        file.truncate(fiddle.LIMIT_NBYTES + 1)
    with pytest.raises(Unsupported, match=r"such files have some thousands"):
        nemo2_context.settings_of(tmp_path)
