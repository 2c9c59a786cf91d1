"""HuggingFace directories: what transformers, safetensors and peft write is read, and written the same."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tiny_models
from reshard.core.checkpoint import Checkpoint
from reshard.core.dtypes import dtype
from reshard.core.tensor import Filled
from reshard.dialects.transformers import to_hub
from reshard.errors import Corrupt, Incomplete, Mismatch, NotFound, ReshardError, Unsupported
from reshard.formats import huggingface, open_path
from reshard.ops.config import reconcile
from reshard.ops.tie import tie
from reshard.storage.run import run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def saved(model_type: str, directory: Path, **options: Any) -> Path:
    """As transformers saves it, with a tokenizer's files."""
    tiny_models.make(model_type).save_pretrained(directory, **options)
    (directory / "tokenizer.json").write_bytes(b'{"version":  "1.0"}\r\n')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def in_module_order(checkpoint: Checkpoint, model_type: str) -> Checkpoint:
    """A safetensors file forgets the order of the state dict; a training checkpoint has it."""
    order = list(tiny_models.make(model_type).state_dict())
    return checkpoint.select(sorted(checkpoint, key=order.index))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "qwen2_5_vl"])
def test_one_file_is_written_as_transformers_writes_it(model_type: str, tmp_path: Path) -> None:
    expected = saved(model_type, tmp_path / "expected")
    run(huggingface.plan(huggingface.open(expected)), tmp_path / "actual")
    assert files(tmp_path / "actual") == files(expected)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_shard_files_and_index_are_written_as_transformers_writes_them(model_type: str, tmp_path: Path) -> None:
    expected = saved(model_type, tmp_path / "expected", max_shard_size="9KB")
    checkpoint = in_module_order(huggingface.open(expected), model_type)
    run(huggingface.plan(checkpoint, max_shard_nbytes=9000), tmp_path / "actual")
    assert files(tmp_path / "actual") == files(expected)
    assert len([n for n in files(expected) if n.startswith("model-")]) > 2


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen2_5_vl"])
def test_transformers_loads_shard_files(model_type: str, tmp_path: Path) -> None:
    model = tiny_models.make(model_type)
    opened = huggingface.open(tiny_models.save_modules(model, tmp_path / "run"))
    whole = tie(to_hub(opened, opened.config), opened.config)
    run(huggingface.plan(whole, max_shard_nbytes=9000), tmp_path / "whole")
    assert tiny_models.logits(tiny_models.load(model, tmp_path / "whole")).equal(tiny_models.logits(model))
    assert {n: v.numpy().tobytes() for n, v in huggingface.open(tmp_path / "whole").items()} == {
        n: v.numpy().tobytes() for n, v in whole.items()
    }


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 30))
def test_shards_are_filled_by_the_rule_of_the_hub(sizes: list[int], limit: int) -> None:
    tensors = {f"t{i}": Filled(dtype("U8"), (n,), b"\0") for i, n in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        {fqn: torch.zeros(t.shape, dtype=torch.uint8) for fqn, t in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    ours = huggingface.fill_shards(tensors, limit)
    assert {name: list(shard) for name, shard in ours.items()} == theirs.filename_to_tensors


def test_a_changed_config_is_written_as_transformers_writes_it(tmp_path: Path) -> None:
    expected = saved("llama", tmp_path / "expected")
    checkpoint = huggingface.open(expected)
    assert checkpoint.config is not None
    changed, changes = reconcile({**checkpoint.config, "architectures": ["FSDPLlamaForCausalLM"]}, checkpoint.tensors)
    run(huggingface.plan(replace(checkpoint, config=changed)), tmp_path / "actual")
    assert len(changes) == 1
    assert files(tmp_path / "actual") == files(expected)


def test_an_unchanged_config_keeps_its_bytes(tmp_path: Path) -> None:
    saved("llama", tmp_path / "run")
    text = b'{ "b": 1e400,\n"a": [Infinity, "\xc3\xa9"] }'
    (tmp_path / "run" / "config.json").write_bytes(text)
    run(huggingface.plan(huggingface.open(tmp_path / "run")), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == text


def test_origin_names_the_format_and_its_files(tmp_path: Path) -> None:
    directory = saved("llama", tmp_path / "run", max_shard_size="9KB")
    origin = huggingface.open(directory).origin
    assert origin.format == "huggingface"
    assert {p.name for p in origin.files} == {n for n in files(directory) if n.startswith("model")}


def test_files_of_torch_consolidation_are_read(tmp_path: Path) -> None:
    """No `__metadata__`, and data that starts at any byte."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '
    data = np.array([1, 2], "f4").tobytes()
    assert (8 + len(header)) % 8
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert huggingface.open(tmp_path)["a"].numpy().tolist() == [1, 2]


def test_names_that_were_never_saved_are_passed_over_with_a_notice(tmp_path: Path) -> None:
    """What torch's consolidation writes for names of its mapping that were never saved."""
    header = b'{"a":{"dtype":"","shape":[],"data_offsets":[0,0]},"b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    checkpoint = huggingface.open(tmp_path)
    assert list(checkpoint) == ["b"]
    assert checkpoint.notices == ("names without a tensor, which torch's consolidation lists: a",)


def test_a_header_with_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"","shape":[1],"data_offsets":[0,0]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(Unsupported, match=r"model\.safetensors: a: unknown dtype ''"):
        huggingface.open(tmp_path)


def sharded(directory: Path) -> dict[str, Any]:
    """Two shard files, and their index, which the caller may write."""
    directory.mkdir(exist_ok=True)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, directory / one)
    save_file({"c": torch.ones(3)}, directory / two)
    index = {"metadata": {"total_size": 24}, "weight_map": {"c": two, "a": one, "b": one}}
    (directory / huggingface.INDEX).write_text(json.dumps(index))
    return index["weight_map"]


def rewrite(directory: Path, weight_map: Any) -> None:
    (directory / huggingface.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_tensors_come_in_the_order_of_the_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert list(huggingface.open(tmp_path)) == ["c", "a", "b"]
    assert list(huggingface.open(tmp_path / huggingface.INDEX)) == ["c", "a", "b"]
    assert list(huggingface.open(tmp_path / "model-00002-of-00002.safetensors")) == ["c"]


def test_missing_shard_files_are_listed(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Incomplete, match=r"1 of 2 shard files are missing: model-00002-of-00002\.safetensors"):
        huggingface.open(tmp_path)


def test_a_tensor_that_is_not_where_the_index_says_is_missing(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    rewrite(tmp_path, weight_map | {"a": weight_map["c"], "z": weight_map["c"]})
    with pytest.raises(Incomplete, match=r"2 tensors are not in their shard file: a \(model-00002-of-00002\.saf"):
        huggingface.open(tmp_path)


def test_a_tensor_that_the_index_does_not_list_is_an_error(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    rewrite(tmp_path, {k: v for k, v in weight_map.items() if k != "b"})
    with pytest.raises(Corrupt, match=r"1 tensors of the shard files are not in the index: b \(model-00001"):
        huggingface.open(tmp_path)


def test_a_tensor_in_two_shard_files_is_an_error(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"c": torch.ones(3), "a": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(Corrupt, match=r"a \(model-00002-of-00002\.safetensors\)"):
        huggingface.open(tmp_path)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "..", "", "a\\b", "a\0b"])
def test_an_index_cannot_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    rewrite(tmp_path, {"a": name})
    with pytest.raises(Corrupt, match="shard files outside of the directory"):
        huggingface.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "\xff", "[" * 9999])
def test_a_broken_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / huggingface.INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(Corrupt, match="not an index of shard files"):
        huggingface.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": ', "\xff", "[" * 99999])
def test_a_broken_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Corrupt, match=r"config\.json"):
        huggingface.companions(tmp_path)


def test_enormous_json_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(huggingface.JSON_LIMIT_NBYTES + 1)
    with pytest.raises(Unsupported, match="bytes of JSON"):
        huggingface.companions(tmp_path)


def test_a_directory_without_weights_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"neither model\.safetensors nor"):
        huggingface.open(tmp_path)


def test_of_one_file_and_an_index_the_file_is_read_and_that_is_said(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"d": torch.ones(1)}, tmp_path / "model.safetensors")
    checkpoint = huggingface.open(tmp_path)
    assert list(checkpoint) == ["d"]
    assert "holds both" in checkpoint.notices[0]


def test_directories_are_known_by_their_names() -> None:
    for name in ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"):
        assert huggingface.matches(frozenset((name, "config.json")))
    assert not huggingface.matches(frozenset(("config.json", "pytorch_model.bin", ".metadata")))


def test_companions_are_carried_byte_for_byte_through_links(tmp_path: Path) -> None:
    source, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    names = [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "qwen.tiktoken",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    ]
    others = ["README.md", "trainer_state.json", "training_args.bin", "optimizer.pt", "extra.py", "rng_state_0.pth"]
    (source / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(names + others):
        (blobs / str(i)).write_bytes(b"{}" + bytes(i) if name.endswith((".model", ".py")) else b"{ }" + b"\n" * i)
        (source / name).symlink_to(os.path.relpath(blobs / str(i), (source / name).parent))
    save_file({"a": torch.ones(1)}, source / "model.safetensors")
    run(huggingface.plan(huggingface.open(source)), tmp_path / "out")
    assert set(files(tmp_path / "out")) == {*names, "model.safetensors"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_only_regular_files_are_carried(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    (tmp_path / "vocab.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "merges.txt")
    assert huggingface.companions(tmp_path) == (None, {})


def test_code_that_an_auto_map_names_is_carried_with_its_imports_and_not_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "other/repo--modeling_y.Y", "AutoTokenizer": None}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None], "Bad": "../evil.X"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "configuration_x.py").write_text("from .helper_x import f\nfrom . import part_x\nraise SystemExit(1)\n")
    (tmp_path / "helper_x.py").write_text("import os\nfrom .configuration_x import XConfig\n")
    (tmp_path / "tokenization_x.py").write_text("this is not python")
    for name in ("part_x.py", "modeling_y.py", "train.py", "os.py"):
        (tmp_path / name).write_text("1")
    _, assets = huggingface.companions(tmp_path)
    assert set(assets) == {
        "tokenizer_config.json",
        "configuration_x.py",
        "helper_x.py",
        "part_x.py",
        "tokenization_x.py",
    }


def adapter(directory: Path, names: list[str], config: bool = True) -> Checkpoint:
    directory.mkdir()
    save_file({fqn: torch.full((2, 2), float(i)) for i, fqn in enumerate(names)}, directory / "model.safetensors")
    if config:
        (directory / "adapter_config.json").write_text('{"lora_alpha": 16}')
    return huggingface.open(directory)


AT = "base_model.model.model.layers.0.self_attn.q_proj."


def test_an_adapter_is_written_with_the_names_of_peft(tmp_path: Path) -> None:
    names = {
        AT + "lora_A.default.weight": AT + "lora_A.weight",
        AT + "lora_B.default.weight": AT + "lora_B.weight",
        AT + "lora_B.default.bias": AT + "lora_B.bias",
        AT + "lora_magnitude_vector.default.weight": AT + "lora_magnitude_vector",
        "base_model.model.model.embed_tokens.lora_embedding_A.default": (
            "base_model.model.model.embed_tokens.lora_embedding_A"
        ),
        "base_model.model.score.modules_to_save.default.weight": "base_model.model.score.weight",
    }
    checkpoint = adapter(tmp_path / "run", list(names))
    run(huggingface.plan(checkpoint), tmp_path / "out")
    assert set(files(tmp_path / "out")) == {"adapter_model.safetensors", "adapter_config.json"}
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {fqn: t[0, 0].item() for fqn, t in written.items()} == {n: float(i) for i, n in enumerate(names.values())}
    (notice,) = huggingface.to_adapter(checkpoint).notices
    assert notice.startswith("6 adapter names as PEFT saves them, such as ")
    again = huggingface.open(tmp_path / "out")
    assert huggingface.to_adapter(again) is again


def test_adapters_of_transformers_get_the_prefix_of_peft(tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.up_proj.lora_A.mine.weight", "model.layers.0.mlp.up_proj.lora_B.mine.weight"]
    result = huggingface.to_adapter(adapter(tmp_path / "run", names))
    assert list(result) == [f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight" for x in "AB"]


def test_a_full_model_with_lora_inside_is_no_adapter(tmp_path: Path) -> None:
    names = [AT + "lora_A.default.weight", AT + "base_layer.weight", "base_model.model.model.norm.weight"]
    assert not huggingface.is_adapter(adapter(tmp_path / "run", names))


def test_an_adapter_without_its_config_is_written_without_one(tmp_path: Path) -> None:
    checkpoint = adapter(tmp_path / "run", [AT + "lora_A.weight"], config=False)
    assert huggingface.lacks_adapter_config(checkpoint)
    run(huggingface.plan(checkpoint), tmp_path / "out")
    assert set(files(tmp_path / "out")) == {"adapter_model.safetensors"}


def test_adapters_of_two_names_are_an_error(tmp_path: Path) -> None:
    names = [AT + "lora_A.one.weight", AT + "lora_A.two.weight"]
    with pytest.raises(Mismatch, match="adapters of several names: one, two"):
        huggingface.plan(adapter(tmp_path / "run", names))


def test_a_whole_model_leaves_the_config_of_an_adapter_behind(tmp_path: Path) -> None:
    run(huggingface.plan(adapter(tmp_path / "run", ["model.norm.weight"])), tmp_path / "out")
    assert set(files(tmp_path / "out")) == {"model.safetensors"}


def test_nothing_is_no_model(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(Incomplete, match="no tensors to write"):
        huggingface.plan(huggingface.open(tmp_path).select([]))


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("5GB", 5 * 10**9),
        ("50 gb", 50 * 10**9),
        ("1.5MB", 1_500_000),
        ("100KB", 100_000),
        ("2TB", 2 * 10**12),
        ("1GiB", 2**30),
        ("1kib", 1024),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_sizes_are_decimal_unless_they_say_otherwise(text: str, nbytes: int) -> None:
    assert huggingface.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 G B", "5XB", "1e9", "٣GB", "0.1B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(Unsupported, match="is no size"):
        huggingface.parse_size(text)


def test_shards_of_no_bytes_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ReshardError, match="shard files of 0 bytes"):
        huggingface.plan(huggingface.open(tmp_path), max_shard_nbytes=0)


# -------------------------------------------------------------------------------------------- without an index


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shard files, as transformers names them, and no index."""
    for i in range(3):
        tensors = {f"layers.{i}.weight": torch.full((2, 3), float(i)), f"layers.{i}.bias": torch.arange(3)}
        save_file(tensors, tmp_path / f"model-{i + 1:05d}-of-00003.safetensors")
    return tmp_path


def test_shard_files_without_an_index_are_read_as_they_number_themselves(shards: Path) -> None:
    checkpoint = open_path(shards)
    assert sorted(checkpoint) == sorted(f"layers.{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias"))
    assert checkpoint["layers.2.weight"].numpy().tolist() == [[2.0] * 3] * 2
    assert f"{shards} has no model.safetensors.index.json" in checkpoint.notices[0]
    assert sorted(open_path(shards / "model-00002-of-00003.safetensors")) == sorted(checkpoint)


@pytest.mark.parametrize("left", [1, 2])
def test_a_shard_file_that_is_missing_is_named_without_an_index_too(left: int, shards: Path) -> None:
    for number in range(left + 1, 4):
        (shards / f"model-{number:05d}-of-00003.safetensors").unlink()
    missing = ", ".join(f"model-{number:05d}-of-00003.safetensors" for number in range(left + 1, 4))
    with pytest.raises(Incomplete, match=f"of 3 shard files there are {left}; missing: {missing}$"):
        open_path(shards)


def test_a_count_of_shard_files_that_is_beyond_measure_takes_no_time(shards: Path) -> None:
    for file in shards.iterdir():
        file.rename(shards / file.name.replace("of-00003", "of-999999999"))
    with pytest.raises(Incomplete, match=r"of 999999999 shard files there are 3; missing: model-00004-.* and more"):
        open_path(shards)


def test_shard_files_of_several_saves_are_refused(shards: Path) -> None:
    (shards / "model-00001-of-00003.safetensors").rename(shards / "model-00001-of-00002.safetensors")
    with pytest.raises(Mismatch, match="shard files of several saves"):
        open_path(shards)


def test_a_tensor_in_two_shard_files_is_refused(shards: Path) -> None:
    (shards / "model-00001-of-00003.safetensors").write_bytes(
        (shards / "model-00002-of-00003.safetensors").read_bytes()
    )
    with pytest.raises(Corrupt, match=r"layers.1.weight \(model-00001-of-00003.safetensors and model-00002"):
        open_path(shards)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name, kind", [("pytorch_model", "bin"), ("model", "bin"), ("pytorch_model", "safetensors")])
def test_shard_files_of_other_names_need_their_index(name: str, kind: str, count: int, tmp_path: Path) -> None:
    for i in range(count):
        torch.save({"a": torch.ones(1)}, tmp_path / f"{name}-{i + 1:05d}-of-00002.{kind}")
    with pytest.raises(Incomplete, match=rf": {name}.{kind}.index.json is missing, which says what is in {name}-"):
        open_path(tmp_path)
