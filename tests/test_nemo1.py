"""NeMo 1's checkpoints in every wrapping, held against what the live model held and what NeMo's exporter wrote."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import reshard
from checkpoints import peak_nbytes
from reshard.cli.main import main
from reshard.errors import Corrupt, Incomplete, InputError, Mismatch, OutputError, Unsupported
from reshard.formats import nemo1, nemo2_context
from reshard.formats.fiddle import Call, Symbol
from reshard.formats.megatron import locate, open_located
from reshard.storage import tar
from reshard.storage.files import Files

DATA = Path(__file__).parent / "data" / "nemo" / "nemo1"
TOKENIZERS = {"mistral": "0073c5cf4b6b456cb103be846c52552b", "llama3_tp2": "4aa7013e0c6e44e0b82a1eaa1e28f31a"}
NUM_TOKENS = 250

Members = dict[str, bytes]


def pieces(count: int) -> bytes:
    """A SentencePiece model: field 1 for each token, and a field that is none."""
    tokens = (b"\x0a" + bytes([len(t := f"token {i}".encode()) + 2, 0x0A, len(t)]) + t for i in range(count))
    return b"".join(tokens) + b"\x12\x02\x18\x01"


def members(folder: str = "mistral", **fields: Any) -> Members:
    """What an archive holds, with fields of its YAML set; None leaves one out."""
    root = DATA / folder
    found = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    return _with_fields(found | {f"{TOKENIZERS[folder]}_tokenizer.model": pieces(NUM_TOKENS)}, fields)


def _with_fields(found: Members, fields: Mapping[str, Any]) -> Members:
    lines = found["model_config.yaml"].decode().splitlines()
    lines = [line for line in lines if line.partition(":")[0] not in fields]
    lines += [f"{name}: {json.dumps(value)}" for name, value in fields.items() if value is not None]
    return found | {"model_config.yaml": "\n".join(lines).encode()}


def pack(path: Path, found: Members, *, prefix: str = "./", mode: str = "w:", format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar archive with these members."""
    with tarfile.open(path, mode, format=format) as file:
        folders = {str(p) for name in found for p in Path(name).parents if str(p) != "."}
        for folder in sorted(folders):
            info = tarfile.TarInfo(prefix + folder)
            info.type = tarfile.DIRTYPE
            file.addfile(info)
        for name, data in found.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def extract(path: Path, found: Members) -> Path:
    for name, data in found.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def gzipped(path: Path, found: Members, *, num_streams: int = 1) -> Path:
    data = pack(path.with_suffix(".plain"), found).read_bytes()
    size = -(-len(data) // num_streams)
    path.write_bytes(b"".join(gzip.compress(data[at : at + size]) for at in range(0, len(data), size)))
    path.with_suffix(".plain").unlink()
    return path


def packed_in_a_folder(path: Path, found: Members) -> Path:
    return pack(path, {f"llama/{name}": data for name, data in found.items()})


WRAPPINGS: dict[str, Callable[[Path, Members], Path]] = {
    "plain": pack,
    "without ./": lambda path, found: pack(path, found, prefix=""),
    "GNU": lambda path, found: pack(path, found, format=tarfile.GNU_FORMAT),
    "ustar": lambda path, found: pack(path, found, format=tarfile.USTAR_FORMAT),
    "gzip": gzipped,
    "gzip of two streams": lambda path, found: gzipped(path, found, num_streams=2),
    "in a folder": packed_in_a_folder,
    "extracted": extract,
    "weights of what was extracted": lambda path, found: extract(path, found) / "model_weights",
    "a file of what was extracted": lambda path, found: extract(path, found) / "model_weights" / "__0_0.distcp",
    "the only archive in a folder": lambda path, found: pack(_made(path) / "a.nemo", found).parent,
}


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def assert_same(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def converted(source: Path, tmp_path: Path, **options: Any) -> dict[str, torch.Tensor]:
    reshard.convert(source, tmp_path / "hf", to="hf", **options)
    return load_file(tmp_path / "hf" / "model.safetensors")


def exported() -> dict[str, torch.Tensor]:
    """What NeMo's exporter wrote of the mistral archive, which it had made a NeMo 2 directory of."""
    return load_file(DATA / "mistral_hf.safetensors")


def truth() -> dict[str, torch.Tensor]:
    """What the live Llama held, a tensor for each layer, without extra states."""
    found = load_file(DATA / "llama3_truth.safetensors")
    return {name.removeprefix("model."): t for name, t in found.items() if "_extra_state" not in name}


# ------------------------------------------------------------------------------------------------------- wrappings


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_an_archive_gives_what_nemos_exporter_wrote(wrapping: str, tmp_path: Path) -> None:
    source = WRAPPINGS[wrapping](tmp_path / "m.nemo", members())
    assert_same(converted(source, tmp_path), exported())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == NUM_TOKENS
    assert (config["rope_theta"], config["rms_norm_eps"], config["torch_dtype"]) == (10000, 1e-5, "bfloat16")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == pieces(NUM_TOKENS)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_inspect_knows_it_by_its_content(wrapping: str, tmp_path: Path) -> None:
    found = reshard.inspect(WRAPPINGS[wrapping](tmp_path / "m.nemo", members()))
    assert (found.format, found.writer, found.complete) == ("torch_dist", "NeMo 1", True)
    assert found.num_parameters == sum(t.numel() for t in exported().values()) + 2 * 6 * 64


def test_an_archive_by_any_name_is_one(tmp_path: Path) -> None:
    assert_same(converted(pack(tmp_path / "weights.bin", members()), tmp_path), exported())


def _loaded(weights: Path) -> dict[str, torch.Tensor]:
    """What torch reads of a DCP's tensors."""
    about = dcp.FileSystemReader(weights).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in about.items()
        if isinstance(item, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=str(weights), no_dist=True)
    return state


def _stacked(model: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    found = {f"module.{name}": tensor for name, tensor in model.items() if ".layers." not in name}
    for name in [name for name in model if ".layers.0." in name]:
        layers = [model[name.replace(".layers.0.", f".layers.{n}.")] for n in range(num_layers)]
        found["module." + name.replace(".layers.0.", ".layers.")] = torch.stack(layers)
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("wrapping", ["plain", "gzip", "extracted"])
def test_nemo_2_gets_what_the_live_model_held_with_its_padding(wrapping: str, tmp_path: Path) -> None:
    source = WRAPPINGS[wrapping](tmp_path / "m.nemo", members("llama3_tp2"))
    words = ["--input_path", str(source), "--output_path", str(tmp_path / "nemo2")]
    assert main(["convert", *words, "--quiet"]) == 0
    assert_same(_loaded(tmp_path / "nemo2" / "weights"), _stacked(truth(), 4))
    assert (tmp_path / "nemo2" / "context" / "tokenizer.model").read_bytes() == pieces(NUM_TOKENS)


def test_what_was_converted_can_be_held_against_its_archive(tmp_path: Path) -> None:
    source = gzipped(tmp_path / "m.nemo", members())
    reshard.convert(source, tmp_path / "out", to="torch_dist")
    assert main(["verify", str(tmp_path / "out"), "--against", str(source), "--quiet"]) == 0
    changed = members(rotary_base=500.0)
    changed |= _with_a_bit_changed(changed)
    gzipped(source, changed)
    assert main(["verify", str(tmp_path / "out"), "--against", str(source), "--quiet"]) == 1


def _with_a_bit_changed(found: Members) -> Members:
    """The file with a weight that is stored as the hub has it, one bit of this changed."""
    weight = exported()["model.layers.1.self_attn.o_proj.weight"].view(torch.uint8).numpy().tobytes()
    name = next(name for name, data in found.items() if weight in data)
    at = found[name].index(weight) + 100
    return {name: found[name][:at] + bytes([found[name][at] ^ 1]) + found[name][at + 1 :]}


def test_a_bit_changed_in_a_member_is_found_by_its_checksum(tmp_path: Path) -> None:
    found = members()
    with pytest.raises(Corrupt, match=r"m\.nemo/model_weights/__0_[01]\.distcp.*CRC-32"):
        converted(pack(tmp_path / "m.nemo", found | _with_a_bit_changed(found)), tmp_path)
    assert not (tmp_path / "hf").exists()


# ------------------------------------------------------------------------------------------------------------ zarr


def _zarr(model: Mapping[str, torch.Tensor]) -> Members:
    """The layout of NeMo 1's zarr, whose dtype is no dtype of zarr's: a chunk a layer."""
    found = {"model_weights/metadata.json": b'{"sharded_backend": "zarr", "sharded_backend_version": 1}'}
    for name, tensor in model.items():
        chunks = [1, *tensor.shape[1:]] if ".layers." in name else list(tensor.shape)
        about = {"zarr_format": 2, "shape": list(tensor.shape), "chunks": chunks, "dtype": "bfloat16", "order": "C",
                 "compressor": None, "filters": None, "fill_value": None}  # fmt: skip
        folder = f"model_weights/model.{name.removeprefix('module.')}"
        found[f"{folder}/.zarray"] = json.dumps(about).encode()
        for number in range(tensor.shape[0] // chunks[0]):
            key = ".".join([str(number)] + ["0"] * (tensor.ndim - 1))
            part = tensor[number * chunks[0] : (number + 1) * chunks[0]]
            found[f"{folder}/{key}"] = part.contiguous().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["PAX", "GNU"])
@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_zarr_is_read_in_the_archive_though_names_are_longer_than_a_header(
    mode: str, format: int, tmp_path: Path
) -> None:
    about = {name: data for name, data in members("llama3_tp2").items() if "rank" not in name}
    found = about | _zarr(_stacked(truth(), 4))
    folder = "a" * 60
    source = pack(tmp_path / "m.nemo", {f"{folder}/{n}": d for n, d in found.items()}, mode=mode, format=format)
    got = open_located(locate(source)).checkpoint
    want = {name.replace("module.", "model.", 1): t for name, t in _stacked(truth(), 4).items()}
    assert {name: tuple(t.shape) for name, t in got.tensors.items()} == {n: tuple(t.shape) for n, t in want.items()}
    for name, tensor in want.items():
        assert got[name].numpy().tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_a_chunk_that_is_not_in_the_archive_is_an_error(tmp_path: Path) -> None:
    about = {name: data for name, data in members("llama3_tp2").items() if "rank" not in name}
    found = about | _zarr(_stacked(truth(), 4))
    del found["model_weights/model.decoder.layers.mlp.linear_fc2.weight/2.0.0"]
    with pytest.raises(Incomplete, match=r"linear_fc2\.weight: 1 of 4 chunks are missing: 2\.0\.0"):
        open_located(locate(pack(tmp_path / "m.nemo", found)))


# ---------------------------------------------------------------------------------------------------------- legacy


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _single(extra: bool = True) -> dict[str, Any]:
    """What NeMo saves of a model that is on one rank, with the extra states of Transformer Engine 1."""
    state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in truth().items()}
    if extra:
        state["model.decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(_saved(None))
    return state


def _legacy(files: Members) -> Members:
    about = members("llama3_tp2", tensor_model_parallel_size=1)
    return {name: data for name, data in about.items() if "rank" not in name} | files


def _assert_is_llama(source: Path) -> None:
    got = open_located(locate(source)).checkpoint
    assert {name.removeprefix("model."): tuple(t.shape) for name, t in got.tensors.items()} == {
        name: tuple(t.shape) for name, t in truth().items()
    }
    for name, tensor in truth().items():
        assert got[f"model.{name}"].numpy().tobytes() == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("wrapping", ["plain", "gzip", "extracted"])
def test_tensor_parallel_ranks_in_an_archive_are_put_together(wrapping: str, tmp_path: Path) -> None:
    _assert_is_llama(WRAPPINGS[wrapping](tmp_path / "m.nemo", members("llama3_tp2")))


@pytest.mark.parametrize("folder", ["", "model_weights/"])
def test_a_single_ranks_weights_are_read(folder: str, tmp_path: Path) -> None:
    source = pack(tmp_path / "m.nemo", _legacy({f"{folder}model_weights.ckpt": _saved(_single())}))
    _assert_is_llama(source)
    assert reshard.inspect(source).format == "megatron_legacy"


def test_rotary_frequencies_that_were_saved_are_said_and_left_out(tmp_path: Path) -> None:
    state = _single() | {"model.rotary_pos_emb.inv_freq": torch.rand(4)}
    source = extract(tmp_path / "m", _legacy({"model_weights.ckpt": _saved(state)}))
    result = reshard.convert(source, tmp_path / "hf", to="hf")
    assert any("1 rotary_pos_emb.inv_freq are not taken" in notice for notice in result.notices)


def test_an_adapter_of_nemo_1_is_not_taken_for_a_part_of_the_model(tmp_path: Path) -> None:
    name = "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight"
    state = _single() | {name: torch.rand(4, 64)}
    source = extract(tmp_path / "m", _legacy({"model_weights.ckpt": _saved(state)}))
    with pytest.raises(Unsupported, match=r"1 tensors are of an adapter \(LoRA\)"):
        reshard.convert(source, tmp_path / "hf", to="hf")


def test_experts_without_a_word_on_their_loss_make_a_config_that_transformers_reads(tmp_path: Path) -> None:
    tensors = load_file(DATA / "llama3_truth.safetensors")
    experts = {"num_moe_experts": 2, "moe_grouped_gemm": True, "moe_aux_loss_coeff": 0}
    state: dict[str, Any] = {}
    for full, tensor in tensors.items():
        if "_extra_state" in full:
            continue
        if ".mlp." not in full:
            state[full] = tensor
        elif full.endswith("layer_norm_weight"):
            state[full.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")] = tensor
            state[full.replace("linear_fc1.layer_norm_weight", "router.weight")] = torch.rand(2, 64).bfloat16()
        else:
            state |= {full.replace("mlp.", f"mlp.experts.local_experts.{n}."): tensor for n in range(2)}
    found = _legacy({"model_weights.ckpt": _saved(state)})
    source = extract(tmp_path / "m", _with_fields(found, experts))
    reshard.convert(source, tmp_path / "hf", to="hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.model_type, config.router_aux_loss_coef) == ("mixtral", 0.0)


def test_stages_are_counted_on(tmp_path: Path) -> None:
    state = _single()
    first = {n: t for n, t in state.items() if ".layers.2." not in n and ".layers.3." not in n}
    first = {n: t for n, t in first.items() if "final_layernorm" not in n and "output_layer" not in n}
    last = {n: t for n, t in state.items() if ".layers.0." not in n and ".layers.1." not in n and "embedding" not in n}
    last = {n.replace(".layers.2.", ".layers.0.").replace(".layers.3.", ".layers.1."): t for n, t in last.items()}
    ranks = {"tp_rank_00_pp_rank_000": first, "tp_rank_00_pp_rank_001": last}
    files = {f"{rank}/model_weights.ckpt": _saved(part) for rank, part in ranks.items()}
    _assert_is_llama(pack(tmp_path / "m.nemo", _with_fields(_legacy(files), {"pipeline_model_parallel_size": 2})))


def _before_core(state: Mapping[str, torch.Tensor], fused: bool) -> dict[str, torch.Tensor]:
    """One rank's state dict under the names that NeMo's converter to Megatron-Core takes them from."""
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_qkv.weight": "self_attention.query_key_value.weight",
        "self_attention.linear_proj.weight": "self_attention.dense.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "mlp.linear_fc1.weight": "mlp.dense_h_to_4h.weight",
        "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
    }
    found = {"model.language_model.rotary_pos_emb.inv_freq": torch.ones(4)}
    for name, tensor in state.items():
        old = name.replace("decoder.", "encoder.")
        for new, before in names.items():
            old = old.replace(new, before)
        if "dense_h_to_4h" in old and not fused:
            tensor, up = tensor.chunk(2)
            found[f"model.language_model.{old.replace('h.weight', 'h_2.weight')}"] = up.clone()
        found[f"model.language_model.{old}"] = tensor.clone()
    return found


def _ranks(num_ranks: int) -> list[dict[str, torch.Tensor]]:
    """The truth, cut as tensor parallel ranks hold it."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(num_ranks)]
    for name, tensor in truth().items():
        if "norm" in name:
            cut = [tensor] * num_ranks
        elif "linear_fc1" in name:
            gate, up = (half.chunk(num_ranks) for half in tensor.chunk(2))
            cut = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        else:
            cut = list(tensor.chunk(num_ranks, 1 if "linear_proj" in name or "linear_fc2" in name else 0))
        for part, piece in zip(parts, cut, strict=True):
            part[name] = piece.clone()
    return parts


@pytest.mark.parametrize("fused", [False, True], ids=["swiglu", "fast-swiglu"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_names_from_before_megatron_core_are_taken_for_the_same_weights(
    num_ranks: int, fused: bool, tmp_path: Path
) -> None:
    saved = [_saved(_before_core(part, fused)) for part in _ranks(num_ranks)]
    places = ["model_weights.ckpt"] if num_ranks == 1 else [f"mp_rank_{n:02d}/model_weights.ckpt" for n in (0, 1)]
    found = _legacy(dict(zip(places, saved, strict=True)))
    _assert_is_llama(pack(tmp_path / "m.nemo", _with_fields(found, {"tensor_model_parallel_size": num_ranks})))


def test_a_name_from_before_megatron_core_that_has_no_other_is_listed(tmp_path: Path) -> None:
    state = _before_core(truth(), True) | {"model.language_model.encoder.layers.0.adapter.weight": torch.ones(2)}
    source = pack(tmp_path / "m.nemo", _legacy({"model_weights.ckpt": _saved(state)}))
    with pytest.raises(Unsupported, match=r"layers\.0\.adapter\.weight"):
        open_located(locate(source))


def test_a_run_of_nemo_1_is_read_with_the_settings_that_lightning_keeps(tmp_path: Path) -> None:
    about = nemo1.settings_of(extract(tmp_path / "x", _legacy({})) / "model_config.yaml")
    hyper = {"cfg": {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8,
                     "num_query_groups": 2, "normalization": "rmsnorm", "activation": "fast-swiglu", "bias": False,
                     "position_embedding_type": "rope", "rotary_base": 500000.0,
                     "share_embeddings_and_output_weights": False}}  # fmt: skip
    value = {"state_dict": _single(), "global_step": 7, "hyper_parameters": hyper, "optimizer_states": [{}]}
    folder = tmp_path / "run" / "checkpoints" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save(value, folder / "megatron_gpt--val_loss=1.00-step=7-consumed_samples=56.0.ckpt")
    opened = open_located(locate(folder.parent))
    assert opened.checkpoint.origin.step == 7
    assert opened.left_out["optimizer"] == 1
    for name in ("num_query_groups", "kv_channels", "normalization", "activation_func", "rotary_base"):
        assert opened.settings.values[name] == about.values[name]
    _assert_is_llama(folder.parent)


def test_a_run_has_its_settings_above_its_checkpoints(tmp_path: Path) -> None:
    found = members()
    folder = tmp_path / "run" / "checkpoints" / "megatron_gpt--val_loss=1.00-step=7-consumed_samples=56.0-last"
    extract(folder, {name.removeprefix("model_weights/"): data for name, data in found.items() if "weights/" in name})
    text = found["model_config.yaml"].decode()
    (tmp_path / "run" / "hparams.yaml").write_text("cfg:\n" + "".join(f"  {line}\n" for line in text.splitlines()))
    got = converted(folder, tmp_path)
    want = exported()
    assert_same({n: t[:NUM_TOKENS] if t.shape[0] == 256 else t for n, t in got.items()}, want)


def test_a_save_that_did_not_finish_is_refused(tmp_path: Path) -> None:
    source = extract(tmp_path / "step=7", members())
    (tmp_path / "step=7-unfinished").touch()
    with pytest.raises(Incomplete, match="step=7-unfinished"):
        locate(source)


# --------------------------------------------------------------------------------------------------------- settings


def settings(tmp_path: Path, **fields: Any) -> Mapping[str, Any]:
    extract(tmp_path / "y", {"model_config.yaml": members(**fields)["model_config.yaml"]})
    return nemo1.settings_of(tmp_path / "y" / "model_config.yaml").values


FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "silence about the rotary base": ({}, {"rotary_base": 10000}),
    "a rotary base of its own": ({"rotary_base": 12345.0}, {"rotary_base": 12345.0}),
    "part of a head is turned": ({"rotary_percentage": 0.5}, {"rotary_percent": 0.5}),
    "a norm in capitals": ({"normalization": "RMSNorm"}, {"normalization": "RMSNorm"}),
    "no window, as NeMo's importer of Starcoder 2 writes it": ({"window_size": [None, 0]}, {"window_size": None}),
    "no groups": ({"num_query_groups": None}, {"num_query_groups": 8}),
    "heads of another size": ({"kv_channels": 16}, {"kv_channels": 16}),
    "silence about tied embeddings": (
        {"share_embeddings_and_output_weights": None}, {"share_embeddings_and_output_weights": True},
    ),
    "layernorm1p": (
        {"normalization": "layernorm1p"}, {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
    ),
    "squared ReLU": ({"activation": "squared-relu"}, {"activation_func": "squared_relu", "gated_linear_unit": False}),
    "GEGLU": ({"activation": "geglu"}, {"activation_func": "gelu", "gated_linear_unit": True}),
    "silence about biases": ({"bias": None}, {"add_bias_linear": True, "add_qkv_bias": False}),
    "a window, which counts its own token": ({"window_size": [4096, 0]}, {"window_size": [4095, 0]}),
    "Llama 3.1's scaling": (
        {"scale_positional_embedding": True, "scale_factor": 32.0},
        {"rope_scaling": True, "rope_scaling_factor": 32.0, "low_freq_factor": 1.0, "old_context_len": 8192},
    ),
    "scaling that is switched off": ({"scale_factor": 32.0}, {"rope_scaling": False}),
    "interpolation": ({"seq_len_interpolation_factor": 2.0}, {"seq_len_interpolation_factor": 2.0}),
    "experts": (
        {"num_moe_experts": 4}, {"moe_router_topk": 2, "moe_router_pre_softmax": False, "moe_aux_loss_coeff": 0},
    ),
    "a field by reference": ({"encoder_seq_length": "${max_position_embeddings}"}, {"seq_length": 128}),
    "what is set on Megatron's config itself": (
        {"mcore_customization_config": {"attention_softmax_in_fp32": True}}, {"attention_softmax_in_fp32": True},
    ),
    "FP8": ({"fp8": True, "fp8_e4m3": True}, {"fp8": "e4m3"}),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_means_what_nemo_1_takes_it_for(case: str, tmp_path: Path) -> None:
    fields, want = FIELDS[case]
    found = settings(tmp_path, **fields)
    assert {name: found.get(name) for name in want} == want


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"activation": "mish"}, "the activation 'mish'"),
        ({"normalization": "scalenorm"}, "the normalization 'scalenorm'"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"transformer_block_type": "post_ln"}, "post_ln"),
        ({"megatron_legacy": True}, "megatron_legacy True"),
        ({"num_layers": "${multiply:2,3}"}, "num_layers"),
        ({"ffn_hidden_size": [96]}, r"ffn_hidden_size \[96\]"),
        ({"normalization": ["rmsnorm"]}, "the normalization"),
        ({"seq_len_interpolation_factor": "2"}, "seq_len_interpolation_factor '2'"),
        ({"scale_positional_embedding": True, "scale_factor": "8"}, "rope_scaling_factor '8'"),
        ({"bias": "false"}, "add_bias_linear 'false'"),
        ({"mcore_customization_config": ["moe_router_topk"]}, "is no mapping"),
        (
            {"target": "nemo.collections.nlp.models.language_modeling.megatron_bert_model.MegatronBertModel"},
            "BertModel",
        ),
    ],
)
def test_a_field_that_is_not_understood_is_an_error(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=said):
        settings(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"activation": "fast-geglu"}, "activation_func: HF silu, checkpoint gelu"),
        ({"seq_len_interpolation_factor": 2}, "seq_len_interpolation_factor: HF None, checkpoint 2"),
        ({"rotary_percentage": 0.5}, r"rotary_percent: HF 1\.0, checkpoint 0\.5"),
        ({"scale_positional_embedding": True}, "rope_scaling: HF False, checkpoint True"),
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma: HF False, checkpoint True"),
        ({"apply_embedding_scaling": True}, "apply_embedding_scaling: HF False, checkpoint True"),
    ],
)
@pytest.mark.parametrize("to", ["nemo2", "hf"])
def test_a_model_that_is_named_and_computes_otherwise_is_refused_with_both_values(
    fields: dict[str, Any], said: str, to: str, tmp_path: Path
) -> None:
    converted(pack(tmp_path / "m.nemo", members()), tmp_path)
    changed = pack(tmp_path / "changed.nemo", members(**fields))
    with pytest.raises(Mismatch, match=said):
        reshard.convert(changed, tmp_path / "out", to=to, hf_model=str(tmp_path / "hf"))


def test_bands_of_a_scaling_are_held_against_the_model_that_is_named(tmp_path: Path) -> None:
    converted(pack(tmp_path / "m.nemo", members(scale_positional_embedding=True)), tmp_path)
    changed = pack(tmp_path / "changed.nemo", members(scale_positional_embedding=True, scale_factor=32.0))
    with pytest.raises(Mismatch, match=r"rope_scaling_factor: HF 8\.0, checkpoint 32\.0"):
        reshard.convert(changed, tmp_path / "out", to="hf", hf_model=str(tmp_path / "hf"))


def test_a_window_that_nemos_converters_leave_out_is_said(tmp_path: Path) -> None:
    converted(pack(tmp_path / "m.nemo", members(window_size=[32, 0])), tmp_path)
    without = pack(tmp_path / "without.nemo", members(window_size=None))
    result = reshard.convert(without, tmp_path / "out", to="hf", hf_model=str(tmp_path / "hf"))
    assert any("counts where it says otherwise: window_size: HF [31, 0]" in notice for notice in result.notices)


@pytest.mark.parametrize(
    "fields",
    [
        {"apply_embedding_scaling": True},
        {"scale_positional_embedding": True, "seq_len_interpolation_factor": 2},
        {"qk_l2_norm": True},
        {"mcore_customization_config": {"apply_residual_connection_post_layernorm": True}},
    ],
)
@pytest.mark.parametrize("to", ["nemo2", "hf"])
def test_what_no_family_computes_is_not_left_out(fields: dict[str, Any], to: str, tmp_path: Path) -> None:
    *_, last = fields.values()
    name = list(last if isinstance(last, dict) else fields)[-1]
    with pytest.raises(Unsupported, match=f"no known family.*\n  (?:mistral|llama): the checkpoint says {name}"):
        reshard.convert(pack(tmp_path / "m.nemo", members(**fields)), tmp_path / "out", to=to)


def test_the_archives_rotary_base_is_that_of_the_converted_model(tmp_path: Path) -> None:
    converted(pack(tmp_path / "m.nemo", members(rotary_base=12345.0)), tmp_path)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_theta"] == 12345.0


@pytest.mark.parametrize(
    "fields",
    [
        {"ffn_hidden_size": 100},
        {"num_query_groups": 4},
        {"num_attention_heads": 16},
        {"hidden_size": 65},
        {"num_layers": -1},
    ],
)
@pytest.mark.parametrize("to", ["nemo2", "torch_dist", "hf"])
def test_settings_that_the_tensors_contradict_are_not_written_beside_them(
    fields: dict[str, Any], to: str, tmp_path: Path
) -> None:
    archive = pack(tmp_path / "m.nemo", members(**fields))
    with pytest.raises(Mismatch):
        reshard.convert(archive, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_a_model_id_that_contradicts_the_archive_is_an_error_with_both_values(tmp_path: Path) -> None:
    source = pack(tmp_path / "m.nemo", members(rotary_base=12345.0))
    with pytest.raises(Mismatch, match=r"rotary_base is 12345\.0, not 500000.*") as raised:
        converted(source, tmp_path, model_id="meta-llama/Meta-Llama-3-8B")
    assert "hidden_size is 64, not 4096" in str(raised.value)
    assert not (tmp_path / "hf").exists()


def test_weights_that_say_nothing_of_themselves_ask_for_an_id(tmp_path: Path) -> None:
    source = extract(tmp_path / "w", members()) / "model_weights"
    (tmp_path / "w" / "model_config.yaml").unlink()
    with pytest.raises(Incomplete, match="num_attention_heads") as raised:
        converted(source, tmp_path)
    assert "--model-id" in str(raised.value.hint)


# ------------------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_of_the_hub_is_recorded_by_name_and_the_user_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"library": "huggingface", "type": "meta-llama/Llama-2-7b-hf", "model": None}
    source = pack(tmp_path / "m.nemo", _without_tokenizer(named))
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "nemo2"]) == 0
    assert "the tokenizer is meta-llama/Llama-2-7b-hf on the hub" in capsys.readouterr().err
    assert "meta-llama/Llama-2-7b-hf" in (tmp_path / "out" / "context" / "io.json").read_text()


def _without_tokenizer(named: Mapping[str, Any]) -> Members:
    lines = members()["model_config.yaml"].decode().splitlines()
    at = lines.index("tokenizer:")
    kept = [line for line in lines[at + 1 :] if not line.startswith("  ") or line.startswith("  lr")]
    about = "\n".join([*lines[:at], f"tokenizer: {json.dumps(dict(named))}", *[k for k in kept if k[:1] != " "]])
    found = {name: data for name, data in members().items() if "tokenizer" not in name}
    return found | {"model_config.yaml": about.encode()}


@pytest.mark.parametrize("name", ["/etc/passwd", "nemo:../secret.model", "nemo:link.model", "nemo:"])
def test_a_tokenizer_is_only_looked_for_beside_its_yaml(name: str, tmp_path: Path) -> None:
    source = extract(tmp_path / "m", _without_tokenizer({"library": "sentencepiece", "model": name}))
    (tmp_path / "secret.model").write_bytes(pieces(3))
    (source / "link.model").symlink_to(tmp_path / "secret.model")
    assert nemo1.tokenizer_of(source / "model_config.yaml").files == {}


_HASH = "0073c5cf4b6b456cb103be846c52552b_"


@pytest.mark.parametrize(
    ("library", "named", "kept"),
    [
        ("sentencepiece", {"model": "tokenizer.model"}, {"tokenizer.model"}),
        ("huggingface", {"model": "tokenizer.json"}, {"tokenizer.json"}),
        ("megatron", {"vocab_file": "gpt2-vocab.json", "merge_file": "gpt2-merges.txt"}, {"vocab.json", "merges.txt"}),
        ("megatron", {"vocab_file": "vocab.txt", "merge_file": None}, {"vocab.txt"}),
        ("tiktoken", {"vocab_file": "vocab.json", "merge_file": None}, {"tiktoken_vocab.json"}),
    ],
)
def test_a_tokenizers_files_have_the_names_that_its_library_looks_for(
    library: str, named: dict[str, str | None], kept: set[str], tmp_path: Path
) -> None:
    about = {"library": library, "type": None} | {k: v and f"nemo:{_HASH}{v}" for k, v in named.items()}
    files = {f"{_HASH}{name}": b"[]" for name in named.values() if name}
    source = extract(tmp_path / "m", _without_tokenizer(about) | files)
    assert nemo1.assets(source / "model_config.yaml").keys() == kept


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "reshard.json", "a_config.json"])
def test_a_vocabulary_in_the_place_of_another_file_is_refused(name: str, tmp_path: Path) -> None:
    about = {"library": "megatron", "vocab_file": f"nemo:{_HASH}{name}"}
    source = extract(tmp_path / "m", _without_tokenizer(about) | {f"{_HASH}{name}": b"{}"})
    with pytest.raises(Unsupported, match="as no vocabulary is"):
        reshard.convert(source, tmp_path / "out", to="hf")


@pytest.mark.parametrize("rest", ["", ".", ".."])
def test_a_vocabulary_without_a_name_keeps_its_number(rest: str, tmp_path: Path) -> None:
    about = {"library": "megatron", "vocab_file": f"nemo:{_HASH}{rest}"}
    source = extract(tmp_path / "m", _without_tokenizer(about) | {f"{_HASH}{rest}": b"{}"})
    reshard.convert(source, tmp_path / "out", to="hf")
    assert (tmp_path / "out" / f"{_HASH}{rest}").read_bytes() == b"{}"
    assert (tmp_path / "out/config.json").is_file()


def test_a_tiktoken_vocabulary_stays_nemos_from_one_release_to_the_other(tmp_path: Path) -> None:
    about = {"library": "tiktoken", "type": None, "model": None, "vocab_file": f"nemo:{_HASH}vocab.json"}
    source = extract(tmp_path / "m", _without_tokenizer(about) | {f"{_HASH}vocab.json": b'[{"rank": 0}]'})
    first = reshard.convert(source, tmp_path / "n2", to="nemo2")
    assert any("tiktoken" in notice for notice in first.notices)
    reshard.convert(tmp_path / "n2", tmp_path / "again", to="nemo2")
    for made in ("n2", "again"):
        context = nemo2_context.read(tmp_path / made / "context")
        assert context.tokenizer == Call(Symbol.of(nemo2_context.TIKTOKEN), {"vocab_file": "tiktoken_vocab.json"})
        assert (tmp_path / made / "context/tiktoken_vocab.json").read_bytes() == b'[{"rank": 0}]'


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"model": f"nemo:{_HASH}gone.model"}, f"not beside it: nemo:{_HASH}gone.model"),
        ({"model": "tokenizer.model", "special_tokens": {"bos_token": "<x>"}}, "adds special tokens"),
        ({"vocab_file": "vocab.txt", "library": "megatron"}, "of a kind that NeMo 2 has to be told"),
    ],
)
def test_what_of_a_tokenizer_stays_behind_is_said(about: dict[str, Any], said: str, tmp_path: Path) -> None:
    files = {"tokenizer.model": pieces(NUM_TOKENS), "vocab.txt": b"a"}
    found = _without_tokenizer({"library": "sentencepiece", **about}) | files
    notices = nemo1.settings_of(extract(tmp_path / "m", found) / "model_config.yaml").notices
    assert [said in notice for notice in notices] == [True]


SPELLED = b"".join(bytes([n << 3 & 0x7F | 0x82, n >> 4, len(t)]) + t for n, t in ((46, b"<bos>"), (47, b"<eos>")))
"""What SentencePiece's trainer was told of the first and last token, in its fields 46 and 47."""


@pytest.mark.parametrize(
    ("texts", "spelled", "want"),
    [
        ((b"<unk>", b"<s>", b"</s>"), b"", {"bos_token_id": 1, "eos_token_id": 2}),
        ((b"<pad>", b"<eos>", b"<bos>"), SPELLED, {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}),
        ((b"<unk>", b"<bos>", b"<eos>"), b"", {}),
    ],
)
@pytest.mark.parametrize("way", ["straight", "by NeMo 2"])
def test_config_json_has_the_special_tokens_of_a_sentencepiece_model(
    texts: tuple[bytes, ...], spelled: bytes, want: dict[str, int], way: str, tmp_path: Path
) -> None:
    controls = [b"\x0a" + bytes([len(text)]) + text + b"\x18\x03" for text in texts]
    head = b"".join(b"\x0a" + bytes([len(piece)]) + piece for piece in controls)
    model = head + pieces(NUM_TOKENS - len(texts)).removesuffix(b"\x12\x02\x18\x01")
    name = f"{TOKENIZERS['mistral']}_tokenizer.model"
    source = extract(tmp_path / "m", members() | {name: model + b"\x12" + bytes([len(spelled)]) + spelled})
    if way == "by NeMo 2":
        reshard.convert(source, tmp_path / "n2", to="nemo2")
    reshard.convert(tmp_path / "n2" if way == "by NeMo 2" else source, tmp_path / "hf", to="hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert {key: value for key, value in config.items() if key.endswith("_token_id")} == want


def test_a_llama_whose_heads_are_turned_in_part_is_what_turns_them_so(tmp_path: Path) -> None:
    source = pack(tmp_path / "m.nemo", members(rotary_percentage=0.5, window_size=None))
    converted(source, tmp_path)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["model_type"], config["partial_rotary_factor"]) == ("phi3", 0.5)
    reshard.convert(source, tmp_path / "n2", to="nemo2")
    assert nemo2_context.read(tmp_path / "n2/context").config.get("rotary_percent") == 0.5


def test_rows_beyond_the_tokenizer_are_kept_for_nemo_2_and_cut_for_huggingface(tmp_path: Path) -> None:
    source = pack(tmp_path / "m.nemo", members())
    reshard.convert(source, tmp_path / "n2", to="nemo2")
    about = reshard.open(tmp_path / "n2")
    assert about["module.embedding.word_embeddings.weight"].shape == (256, 64)
    assert converted(source, tmp_path)["model.embed_tokens.weight"].shape == (NUM_TOKENS, 64)


@pytest.mark.parametrize(("to", "place"), [("hf", "tokenizer.model"), ("nemo2", "context/tokenizer.model")])
def test_the_archives_tokenizer_is_taken_where_the_model_that_is_named_has_none(
    to: str, place: str, tmp_path: Path
) -> None:
    source = pack(tmp_path / "m.nemo", members())
    reshard.convert(source, tmp_path / "model", to="hf")
    (tmp_path / "model/tokenizer.model").unlink()
    (tmp_path / "model/generation_config.json").write_text('{"bos_token_id": 1}')
    reshard.convert(source, tmp_path / "out", to=to, hf_model=tmp_path / "model")
    assert (tmp_path / "out" / place).read_bytes() == pieces(NUM_TOKENS)


def test_without_a_tokenizer_all_rows_are_taken_and_the_user_is_told(tmp_path: Path) -> None:
    source = pack(tmp_path / "m.nemo", {n: d for n, d in members().items() if "tokenizer" not in n})
    result = reshard.convert(source, tmp_path / "hf", to="hf")
    assert any("all 256 rows of the embedding are taken" in notice for notice in result.notices)


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_tokenizer_that_is_named_is_written_beside_a_huggingface_model(what: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tokenizer.model").write_bytes(pieces(NUM_TOKENS))
    (tmp_path / "mine/config.json").write_text("{}")
    path = tmp_path / "mine" if what == "directory" else tmp_path / "mine/tokenizer.model"
    source = pack(tmp_path / "m.nemo", {n: d for n, d in members().items() if "tokenizer" not in n})
    reshard.convert(source, tmp_path / "hf", to="hf", tokenizer_path=path)
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == pieces(NUM_TOKENS)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["vocab_size"] == NUM_TOKENS
    assert reshard.open(tmp_path / "hf")["model.embed_tokens.weight"].shape[0] == NUM_TOKENS
    reshard.convert(source, tmp_path / "megatron", to="torch_dist", tokenizer_path=path)
    assert [p.read_bytes() for p in (tmp_path / "megatron").rglob("tokenizer.model")] == [pieces(NUM_TOKENS)]


# ------------------------------------------------------------------------------------------------------------- tar


class Entry(NamedTuple):
    """A member as it may be: with a header of any kind."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    link: str = ""
    claim: int | None = None
    """The size in the header."""


def write_tar(path: Path, entries: list[Entry], end: bytes = bytes(1024)) -> Path:
    blocks = []
    for entry in entries:
        info = tarfile.TarInfo(entry.name)
        info.type, info.linkname, info.size = entry.type, entry.link, len(entry.data)
        info.size = len(entry.data) if entry.claim is None else entry.claim
        header = info.tobuf(tarfile.GNU_FORMAT)
        blocks += [header, entry.data, bytes(-len(entry.data) % 512)]
    path.write_bytes(b"".join([*blocks, end]))
    return path


GOOD = Entry("model_config.yaml", b"hidden_size: 8\n")
HOSTILE: dict[str, tuple[Entry, type[InputError]]] = {
    "a symbolic link": (Entry("model_weights", type=tarfile.SYMTYPE, link="/etc"), Unsupported),
    "a hard link": (Entry("x.ckpt", type=tarfile.LNKTYPE, link="model_config.yaml"), Unsupported),
    "a device": (Entry("disk", type=tarfile.BLKTYPE), Unsupported),
    "a pipe": (Entry("pipe", type=tarfile.FIFOTYPE), Unsupported),
    "an absolute name": (Entry("/etc/passwd", b"x"), Unsupported),
    "a name that leads out": (Entry("a/../../x", b"x"), Unsupported),
    "the folder above": (Entry("..", type=tarfile.DIRTYPE), Unsupported),
    "a size beyond the end": (Entry("x", b"abc", claim=1 << 40), Incomplete),
    "a size beyond measure": (Entry("x", b"abc", claim=1 << 62), Incomplete),
    "a negative size": (Entry("x", b"abc", claim=-512), Corrupt),
    "a long name of a gigabyte": (Entry("x", b"abc", type=tarfile.GNUTYPE_LONGNAME, claim=1 << 30), Corrupt),
    "a PAX header of a gigabyte": (Entry("x", b"abc", type=tarfile.XHDTYPE, claim=1 << 30), Corrupt),
    "a PAX header of a negative size": (Entry("x", b"abc", type=tarfile.XHDTYPE, claim=-1024), Corrupt),
    "a file where a folder is": (Entry("model_config.yaml/x", b"x"), Corrupt),
    "a file without a name": (Entry(".", b"x"), Corrupt),
}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_member_that_is_no_plain_file_of_the_archive_is_refused(
    case: str, compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, error = HOSTILE[case]
    source = write_tar(tmp_path / "m.nemo", [GOOD, entry, GOOD._replace(name="z")])
    if compressed:
        source.write_bytes(gzip.compress(source.read_bytes()))
    scratch = _scratch_in(tmp_path, monkeypatch)
    with pytest.raises(InputError) as raised:
        locate(source)
    assert isinstance(raised.value, error | Unsupported)
    assert str(source) in str(raised.value)
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--quiet"]) == 1
    assert not (tmp_path / "out").exists()
    assert not list(scratch.iterdir())


def _scratch_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    scratch = _made(tmp_path / "scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    return scratch


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_an_archive_cut_anywhere_is_incomplete(compressed: bool, tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "m.nemo", [GOOD, Entry("a/b", bytes(3000)), Entry("c", b"x")]).read_bytes()
    whole = gzip.compress(whole, mtime=0) if compressed else whole[:-512]
    for stop in sorted({*range(520, len(whole), 97), len(whole) - 1}) if not compressed else range(60, len(whole), 7):
        (tmp_path / "m.nemo").write_bytes(whole[:stop])
        with pytest.raises(Incomplete, match=r"m\.nemo"):
            tar.opened(str(tmp_path / "m.nemo"))


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "m.nemo", [GOOD, Entry("a", b"x"), Entry("b", b"y")])
    data = bytearray(path.read_bytes())
    data[1024 + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match="the header at byte 1024 is damaged"):
        tar.opened(str(path))


def test_damage_in_a_gzip_is_found(tmp_path: Path) -> None:
    data = bytearray(gzipped(tmp_path / "m.nemo", members()).read_bytes())
    data[-6] ^= 1  # of the checksum
    (tmp_path / "m.nemo").write_bytes(data)
    with pytest.raises(Corrupt, match="incorrect data check"):
        locate(tmp_path / "m.nemo")


def test_of_members_of_one_name_the_last_counts_and_the_user_is_told(tmp_path: Path) -> None:
    entries = [Entry("./a", b"first"), Entry("a", b"second"), Entry("b/../a", b"last")]
    archive = tar.opened(str(write_tar(tmp_path / "m.nemo", entries)))
    path = tar.at(tmp_path / "m.nemo" / "a")
    assert path.read_bytes() == b"last"
    assert "several members of one name" in archive.notices[0]


def test_a_gzip_that_grows_beyond_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = _scratch_in(tmp_path, monkeypatch)
    monkeypatch.setattr(tar, "_INFLATED_NBYTES", 1 << 20)
    path = write_tar(tmp_path / "m.nemo", [GOOD, Entry("zeros", bytes(32 << 20))])
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(Unsupported, match="zeros ends at byte"):
        locate(path)
    assert not list(scratch.iterdir())


def test_the_disk_is_asked_before_a_member_is_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = _scratch_in(tmp_path, monkeypatch)
    path = gzipped(tmp_path / "m.nemo", members())
    monkeypatch.setattr(tar.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000))
    with pytest.raises(OutputError, match="which has 1000"):
        locate(path)
    assert not list(scratch.iterdir())


def test_a_decompressed_archive_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = _scratch_in(tmp_path, monkeypatch)
    assert_same(converted(gzipped(tmp_path / "m.nemo", members()), tmp_path), exported())
    assert not list(scratch.iterdir())


def test_a_yaml_and_a_pickle_that_call_something_call_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    found = _legacy({"model_weights.ckpt": _saved({**_single(), "x": _Call(os.system, f"touch {mark}")})})
    called = f"\nevil: !!python/object/apply:os.system ['touch {mark}']\n".encode()
    source = pack(tmp_path / "m.nemo", found | {"model_config.yaml": found["model_config.yaml"] + called})
    reshard.inspect(source)
    converted(source, tmp_path)
    assert not mark.exists()
    assert any(row.name == "posix.system" and not row.known for row in reshard.ops.inspect.audit(source))


class _Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.made = function, args

    def __reduce__(self) -> Any:
        return self.made


NAMES = st.lists(st.text("ab.-é", min_size=1, max_size=150), min_size=1, max_size=4).map("/".join)


@given(st.dictionaries(NAMES, st.binary(max_size=1500), max_size=6), st.sampled_from([0, 1, 2]), st.booleans())
def test_every_member_is_what_tarfile_reads(found: Members, format: int, compressed: bool) -> None:
    usable = {name: data for name, data in found.items() if not _collides(name, found)}
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"reshard-test-{os.getpid()}-{random.random()}.tar"
    try:
        try:
            pack(path, usable, mode="w:gz" if compressed else "w:", format=format)
        except ValueError:
            return  # ustar has no room for the name
        root = tar.at(path)
        if not usable:
            return
        assert isinstance(root, tar.ArchivePath)
        files = Files()
        with tarfile.open(path) as file:
            for info in file:
                if info.isreg():
                    member, data = root / os.path.normpath(info.name), file.extractfile(info)
                    assert data is not None
                    want = data.read()
                    assert member.read_bytes() == want
                    assert files.pread(str(member), 0, len(want)) == want
                    with pytest.raises(Incomplete):
                        files.pread_into(str(member), 1, bytearray(len(want) + 1))
        assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} == set(usable)
    finally:
        path.unlink(missing_ok=True)


def _collides(name: str, found: Members) -> bool:
    """Whether a name is not normal, or is a folder of another."""
    if os.path.normpath(name) != name or name.startswith((".", "-")) or "/." in f"/{name}":
        return True
    return any(other.startswith(f"{name}/") for other in found)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """150 MB of weights, most of them in one tensor, which gzip makes hardly smaller."""
    state = {f"model.{name}": tensor for name, tensor in truth().items() if ".layers." not in name or ".0." in name}
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embedding.word_embeddings.weight", "model.output_layer.weight"):
        state[name] = torch.randint(-30000, 30000, (600_000, 64), generator=generator, dtype=torch.int16).view(
            torch.bfloat16
        )
    about = members("llama3_tp2", num_layers=1, tensor_model_parallel_size=1)
    found = {"model_config.yaml": about["model_config.yaml"], "model_weights.ckpt": _saved(state)}
    path = tmp_path_factory.mktemp("large") / "m.nemo"
    with gzip.open(path, "wb", compresslevel=1) as file, tarfile.open(fileobj=file, mode="w|") as archive:
        for name, data in found.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    yield path
    shutil.rmtree(path.parent)


@pytest.mark.slow
def test_a_large_gzip_takes_no_more_memory_than_a_small_one(large: Path, tmp_path: Path) -> None:
    small = gzipped(tmp_path / "m.nemo", members())
    least = peak_nbytes("convert", small, tmp_path / "small", "--to", "hf", "--quiet")
    most = peak_nbytes("convert", large, tmp_path / "large", "--to", "hf", "--quiet")
    assert large.stat().st_size > 100 << 20
    assert most <= least + (40 << 20)


def test_headers_of_data_are_not_read(tmp_path: Path) -> None:
    """An archive that is larger than what is there of it, but for a hole: only its headers are looked at."""
    path = tmp_path / "m.nemo"
    info = tarfile.TarInfo("big")
    info.size = 1 << 40
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek((1 << 40) + 512)
        file.write(write_tar(tmp_path / "rest", [GOOD]).read_bytes())
    root = tar.at(path)
    assert (root / "big").stat().st_size == 1 << 40
    assert struct.pack("<Q", 0) == Files().pread(str(root / "big"), (1 << 40) - 8, 8)
