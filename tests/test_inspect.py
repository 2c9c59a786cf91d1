"""inspect, of Megatron's checkpoints: what it calls whole convert takes, and the command that it suggests works."""

from __future__ import annotations

import atexit
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import reshard
import tiny_models
from reshard.cli.main import main
from reshard.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Capture = pytest.CaptureFixture[str]
DATA = Path(__file__).parent / "data" / "megatron"
PAINFUL = "-a run with 'quotes', $HOME & spaces"


@cache
def model(model_type: str, to: str) -> Path:
    """A tiny model of transformers, `base`, and `run`, as convert writes it."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    base = tiny_models.save_modules(tiny_models.make(model_type), directory / "base")
    reshard.convert(base, directory / "run", to=to)
    (directory / "run/reshard.json").unlink()
    return directory


def written(directory: Path, model_type: str = "llama", to: str = "fsdp_dtensor") -> Path:
    """A run of a tiny model, and `base`, of which it was made."""
    shutil.copytree(model(model_type, to), directory, dirs_exist_ok=True)
    return directory / "run"


def state_of(weights: Path) -> dict[str, torch.Tensor]:
    """What torch reads of a DCP's tensors."""
    about = dcp.FileSystemReader(weights).read_metadata().state_dict_metadata
    tensors = {name: item for name, item in about.items() if isinstance(item, dcp.metadata.TensorStorageMetadata)}
    state = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in tensors.items()}
    dcp.load(state, checkpoint_id=str(weights), no_dist=True)
    return state


def save(weights: Path, state: dict[str, torch.Tensor]) -> None:
    """The same directory with other tensors, and all else that is in it."""
    for path in [weights / ".metadata", *weights.glob("*.distcp")]:
        path.unlink()
    dcp.save(state, checkpoint_id=weights, no_dist=True)


def without(run: Path, pattern: str) -> list[str]:
    """Leave the tensors out that have this in their names."""
    weights = run / "iter_0000000"
    state = state_of(weights)
    gone = [name for name in state if re.search(pattern, name)]
    save(weights, {name: tensor for name, tensor in state.items() if name not in gone})
    return gone


def refusal(run: Path) -> str:
    """What convert says of it."""
    with pytest.raises(InputError) as caught:
        reshard.convert(run, run.parent / "never", to="hf")
    assert not (run.parent / "never").exists()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ completeness


@pytest.mark.parametrize("to", ["fsdp_dtensor", "torch_dist"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe", "deepseek_v3"])
def test_a_whole_model_is_complete_and_its_family_is_named(model_type: str, to: str, tmp_path: Path) -> None:
    found = reshard.inspect(written(tmp_path, model_type, to))
    assert (found.complete, found.problem, found.hint) == (True, "", "")
    assert found.facts["family"].startswith(f"{model_type} (")


@pytest.mark.parametrize(
    "model_type, pattern",
    [
        ("llama", r"layers\.1\."),
        ("llama", r"layers\.0\."),
        ("llama", r"layers\.1\.self_attention\.linear_qkv\.weight"),
        ("llama", r"embedding"),
        ("llama", r"linear_fc1\.weight_v"),
        ("llama", r"output_layer"),
        ("qwen2_moe", r"layers\.1\.mlp\.experts\.linear_fc1\.weight1_"),
        ("qwen2_moe", r"experts\.linear_fc[12]\.weight2"),
        ("qwen2_moe", r"layers\.1\.mlp\.router"),
        ("deepseek_v3", r"linear_kv_up_proj"),
    ],
)
def test_a_model_that_lacks_tensors_is_not_complete(model_type: str, pattern: str, tmp_path: Path) -> None:
    run = written(tmp_path, model_type)
    assert without(run, pattern)
    found = reshard.inspect(run)
    assert (found.complete, found.next_command) == (False, "")
    assert found.problem in refusal(run)


def test_stacked_layers_that_are_fewer_than_the_settings_say_are_not_complete(tmp_path: Path) -> None:
    run = written(tmp_path, to="torch_dist")
    weights = run / "iter_0000000"
    save(weights, {n: t[:1].clone() if ".layers." in n else t for n, t in state_of(weights).items()})
    found = reshard.inspect(run)
    assert found.complete is False
    assert "layers.1." in found.problem
    assert found.problem in refusal(run)


@pytest.mark.parametrize("ending", ["linear_fc1.weight_w", "linear_fc1.weight_v", "linear_fc1.weight_[wv]"])
def test_gates_of_one_tensor_parallel_rank_are_not_complete(ending: str, tmp_path: Path) -> None:
    run = written(tmp_path)
    weights = run / "iter_0000000"
    cut = {n: t[: len(t) // 2].clone() if re.search(ending, n) else t for n, t in state_of(weights).items()}
    save(weights, cut)
    found = reshard.inspect(run)
    assert found.complete is False
    assert found.problem in refusal(run)


@pytest.mark.parametrize("ending", ["linear_qkv.weight", "linear_proj.weight", "final_layernorm.weight"])
def test_rows_that_are_lost_are_not_complete(ending: str, tmp_path: Path) -> None:
    run = written(tmp_path)
    weights = run / "iter_0000000"
    save(weights, {n: t[: len(t) // 2].clone() if n.endswith(ending) else t for n, t in state_of(weights).items()})
    found = reshard.inspect(run)
    assert found.complete is False
    assert found.problem in refusal(run)


@pytest.mark.parametrize("name", ["legacy_llama_tp2pp2", "zarr_llama"])
def test_a_copy_without_some_of_its_files_is_not_complete(name: str, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(DATA / name, tmp_path / "run")
    weights = tmp_path / "run/iter_0000010"
    gone = weights / "mp_rank_01_001" if name.startswith("legacy") else weights / "decoder.layers.mlp.linear_fc2.weight"
    shutil.rmtree(gone)
    assert main(["inspect", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr().out
    assert gone.name in shown or "linear_fc2" in shown
    assert "next:" not in shown


def test_what_is_not_complete_is_described_with_a_hint(tmp_path: Path, capsys: Capture) -> None:
    run = written(tmp_path)
    without(run, r"layers\.0\.")
    assert main(["inspect", str(run)]) == 1
    shown = capsys.readouterr().out
    assert "  format       fsdp_dtensor\n" in shown
    assert "  complete     no: 6 tensors of the llama model, which the settings describe, are missing: " in shown
    assert shown.endswith("--hf-model REF names the HuggingFace model that was trained\n")
    assert main(["inspect", str(run), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["complete"] is False


def test_a_model_of_the_hub_is_held_against_the_config_beside_it(tmp_path: Path, capsys: Capture) -> None:
    base = written(tmp_path).parent / "base"
    assert reshard.inspect(base).complete is True
    state = load_file(base / "model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if ".layers.1." not in name}, base / "model.safetensors")
    assert main(["inspect", str(base)]) == 1
    assert "complete     no: " in capsys.readouterr().out
    found = reshard.inspect(base)
    assert "model.layers.1.self_attn.q_proj.weight" in found.problem
    with pytest.raises(InputError) as caught:
        reshard.merge(base, tmp_path / "never")
    assert str(caught.value) == found.problem


# -------------------------------------------------------------------------------------------------- without settings


def bare(run: Path) -> Path:
    """The run without a word of what it is."""
    weights = run / "iter_0000000"
    (weights / "run_config.yaml").unlink()
    shutil.rmtree(weights / "tokenizer", ignore_errors=True)
    return run


def test_a_model_without_settings_is_not_judged(tmp_path: Path, capsys: Capture) -> None:
    run = bare(written(tmp_path))
    assert main(["inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "family       not told by the settings\n" in shown
    assert "complete     not judged: the checkpoint has no settings" in shown
    assert shown.endswith(f"next: reshard convert {run} OUT --to hf --hf-model MODEL\n")
    assert main(["inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"] is None


@pytest.mark.parametrize(
    "model_type, pattern, said",
    [
        ("llama", r"layers\.0\.", "1 layers or experts of those that are numbered are missing: decoder.layers.0"),
        ("llama", r"linear_fc1\.weight_v", "without its other half"),
        ("qwen2_moe", r"layers\.1\..*experts.*weight2", "are missing: decoder.layers.1.mlp.experts.linear_fc1.weight2"),
    ],
)
def test_gaps_show_without_settings_too(model_type: str, pattern: str, said: str, tmp_path: Path) -> None:
    run = bare(written(tmp_path, model_type))
    without(run, pattern)
    found = reshard.inspect(run)
    assert found.complete is False
    assert said in found.problem


def test_gates_of_one_rank_show_without_settings_too(tmp_path: Path) -> None:
    run = bare(written(tmp_path))
    weights = run / "iter_0000000"
    save(
        weights, {n: t[: len(t) // 2].clone() if "linear_fc1.weight_" in n else t for n, t in state_of(weights).items()}
    )
    found = reshard.inspect(run)
    assert (found.complete, "they are not whole" in found.problem) == (False, True)


def test_names_that_one_family_alone_has_name_it(tmp_path: Path) -> None:
    shutil.copytree(DATA / "nemotron_h", tmp_path / "run")
    found = reshard.inspect(bare(tmp_path / "run"))
    assert (found.facts["family"], found.complete) == ("nemotron_h, by the names of its tensors", None)


def test_a_family_that_is_not_known_is_not_judged(tmp_path: Path, capsys: Capture) -> None:
    run = written(tmp_path)
    weights = run / "iter_0000000"
    save(weights, state_of(weights) | {"model.module.decoder.layers.0.rudder.weight": torch.ones(3)})
    found = reshard.inspect(run)
    assert (found.complete, found.facts["family"]) == (None, "not recognised")
    assert found.problem in refusal(run)
    made_from = model("llama", "fsdp_dtensor") / "base"
    assert found.next_command == f"reshard convert {run} OUT --to hf --hf-model {made_from}"
    assert main(["inspect", str(run)]) == 0
    assert "not judged: no known family" in capsys.readouterr().out


def verl(directory: Path) -> Path:
    """The run as verl leaves it: no settings, and the model's config beside the shards."""
    actor = directory / "verl/global_step_7/actor"
    shutil.copytree(bare(written(directory)) / "iter_0000000", actor / "dist_ckpt")
    (actor / "huggingface").mkdir()
    shutil.copyfile(directory / "base/config.json", actor / "huggingface/config.json")
    return directory / "verl"


def test_a_config_beside_the_shards_names_the_family_and_tells_what_is_missing(tmp_path: Path) -> None:
    run = verl(tmp_path)
    found = reshard.inspect(run)
    assert (found.writer, found.complete) == ("verl", True)
    assert found.facts["family"] == "llama (LlamaForCausalLM)"
    assert found.next_command == f"reshard convert {run} OUT --to hf"
    weights = run / "global_step_7/actor/dist_ckpt"
    save(weights, {n: t for n, t in state_of(weights).items() if ".layers.1." not in n})
    lacking = reshard.inspect(run)
    assert (lacking.complete, "of the llama model are missing" in lacking.problem) == (False, True)
    assert lacking.problem in refusal(run)


def test_what_ms_swift_says_of_the_model_names_it(tmp_path: Path) -> None:
    run = bare(written(tmp_path, "qwen2_moe"))
    said = {"model": "Qwen/Qwen1.5-MoE-A2.7B", "hf_model_type": "qwen2_moe", "model_type": "qwen2_moe"}
    (run / "iter_0000000/args.json").write_text(json.dumps(said))
    found = reshard.inspect(run)
    assert found.writer == "ms-swift"
    assert (found.facts["family"], found.facts["made from"]) == ("qwen2_moe, by args.json", said["model"])
    assert found.next_command == f"reshard convert {run} OUT --to hf --hf-model {said['model']}"


@pytest.mark.parametrize("text", ["[1]", "{", '{"model": {"a": 1}, "hf_model_type": ["x"]}', '{"model": ""}'])
def test_an_args_json_of_something_else_says_nothing(text: str, tmp_path: Path) -> None:
    run = bare(written(tmp_path))
    (run / "iter_0000000/args.json").write_text(text)
    found = reshard.inspect(run)
    assert (found.facts["family"], "made from" in found.facts) == ("not told by the settings", False)


# ---------------------------------------------------------------------------------------------------- the next command


def of_run(directory: Path) -> Path:
    return written(directory)


def of_iteration(directory: Path) -> Path:
    return written(directory) / "iter_0000000"


def of_parent(directory: Path) -> Path:
    shutil.rmtree(written(directory).parent / "base")
    return directory


def of_merge(directory: Path) -> Path:
    base = tiny_models.save_modules(tiny_models.make("llama"), directory / "base")
    dcp.save(
        {"model": load_file(base / "model.safetensors")}, checkpoint_id=directory / "shards/checkpoint-3", no_dist=True
    )
    shutil.copyfile(base / "config.json", directory / "shards/config.json")
    return directory / "shards"


@pytest.mark.parametrize("make", [of_run, of_iteration, of_parent, of_merge])
def test_the_next_command_works_whatever_the_path_is_called(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(PAINFUL).mkdir()
    source = make(tmp_path / PAINFUL).relative_to(tmp_path)
    capsys.readouterr()
    assert main(["inspect", f"./{source}"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line.removeprefix("next: "))
    assert words[0] == "reshard"
    assert main([*words[1:], "-q"]) == 0
    assert list(Path("OUT").glob("*.safetensors"))


def test_a_path_that_looks_like_an_option_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written(tmp_path / "x"), "-run")
    assert reshard.inspect("-run").next_command == "reshard convert ./-run OUT --to hf"


def test_the_step_that_was_asked_for_is_in_the_command(tmp_path: Path) -> None:
    run = written(tmp_path)
    for step in (5, 10):
        shutil.copytree(run / "iter_0000000", tmp_path / f"steps/iter_{step:07d}")
    found = reshard.inspect(tmp_path / "steps", step=5)
    assert found.next_command == f"reshard convert {tmp_path}/steps OUT --to hf --iteration 5"
    assert reshard.inspect(tmp_path / "steps").next_command == f"reshard convert {tmp_path}/steps OUT --to hf"


# ------------------------------------------------------------------------------------------------------- other places


def test_a_file_of_settings_stands_for_its_directory(tmp_path: Path) -> None:
    run = written(tmp_path)
    found = reshard.inspect(run / "iter_0000000/run_config.yaml")
    assert (found.path, found.complete) == (run / "iter_0000000", True)
    assert found.next_command == f"reshard convert {run / 'iter_0000000'} OUT --to hf"


def places(directory: Path) -> Iterable[Path]:
    (directory / "empty").mkdir(parents=True)
    (directory / "text.txt").write_text("a poem")
    (directory / "unrelated").mkdir()
    (directory / "unrelated/photo.jpg").write_bytes(b"\xff\xd8\xff")
    (directory / "zero.nemo").touch()
    (directory / "cut.safetensors").write_bytes(b"\x10")
    yield from sorted(directory.iterdir())
    yield directory / "nowhere"


def test_json_is_json_whatever_is_there(tmp_path: Path, capsys: Capture) -> None:
    for place in places(tmp_path / "odd"):
        assert main(["inspect", str(place), "--json"]) == 1, place
        said = capsys.readouterr()
        assert json.loads(said.out)["complete"] in (None, False), place
