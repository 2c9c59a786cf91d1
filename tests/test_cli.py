"""The command line as people and scripts meet it."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

import reshard
import workspace
from checkpoints import child, equals, left_in
from reshard.cli import main as cli
from reshard.cli.main import VERBS, main

EXAMPLES = workspace.EXAMPLES
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples, in the current directory."""
    for name in ("base", "run", "config.yml"):
        source = EXAMPLES / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture(scope="module")
def truth() -> Mapping[str, object]:
    return load_file(EXAMPLES.parent / "tests/data/example_truth.safetensors")


def settled(text: str, here: Path) -> str:
    """Output without what differs from run to run: the directory, durations, rates, sizes that hold paths."""
    text = text.replace(f"{here}/", "").replace(str(here), ".")
    text = re.sub(r"in [\d.]+ s, [\d.]+ .?B/s", "in T, R", text)
    return re.sub(r"22\d\.\d KB|(?<=reshard.json: )\d+ bytes", "N", text)


# ------------------------------------------------------------------------------------------------- what is printed


def test_help_names_every_verb(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb}" in out for verb in VERBS)
    assert main([]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_in_80_columns(verb: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: reshard {verb}")
    assert max(map(len, out.splitlines())) <= 120


def test_version_says_formats_and_extras(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"reshard {reshard.__version__}\nformats: dcp, ")
    assert "hub (" in out


def test_inspect_says_what_is_there_and_what_to_type(here: Path, capsys: Capture) -> None:
    assert main(["run"]) == 0
    assert (
        settled(capsys.readouterr().out, here)
        == """\
run/checkpoint-10
  format       dcp
  written by   accelerate (FSDP)
  step         10
  ranks        4
  placements   Shard(0) x 4 (21 tensors)
  tensors      21 (51 k elements, 204.0 KB)
  dtypes       float32 (21)
  complete     yes, as far as headers tell

next: reshard merge run OUT --base MODEL
"""
    )


def test_inspect_follows_an_axolotl_config(here: Path, capsys: Capture) -> None:
    assert main(["config.yml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{here}/run/checkpoint-10\n")
    assert out.endswith("\nnext: reshard merge config.yml OUT\n")


def test_inspect_lists_tensors_on_request(here: Path, capsys: Capture) -> None:
    assert main(["inspect", "run", "--tensors"]) == 0
    assert "  float32    [40]                     model.model.norm.weight\n" in capsys.readouterr().out


def test_a_merge_talks_on_stderr_and_answers_on_stdout(here: Path, capsys: Capture) -> None:
    assert main(["merge", "run", "out", "--base", "base"]) == 0
    said = capsys.readouterr()
    assert (
        settled(said.out, here)
        == """\
out: 21 tensors, N
  from run/checkpoint-10 (dcp, step 10) in T, R
  every element from one place; 84 checksums of the shards confirmed
"""
    )
    assert said.err == "note: the model is under 'model'\n"


def test_quiet_leaves_the_talk_out(here: Path, capsys: Capture) -> None:
    assert main(["merge", "run", "out", "--base", "base", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_a_dry_run_prints_the_plan_and_writes_nothing(here: Path, capsys: Capture) -> None:
    before = left_in(here)
    assert main(["merge", "run", "out", "--base", "base", "--dry-run"]) == 0
    assert (
        settled(capsys.readouterr().out, here)
        == """\
would read 212.2 KB of run/checkpoint-10 (accelerate (FSDP), dcp)
would write N to out:
  model.safetensors: 206136 bytes, 21 tensors
  config.json: 716 bytes, 0 tensors
  generation_config.json: 195 bytes, 0 tensors
  tokenizer.json: 7817 bytes, 0 tensors
  tokenizer_config.json: 172 bytes, 0 tensors
  reshard.json: N, 0 tensors
"""
    )
    assert left_in(here) == before


def test_verify_says_what_was_held(here: Path, capsys: Capture) -> None:
    assert main(["merge", "run", "out", "--base", "base", "-q"]) == 0
    capsys.readouterr()
    assert main(["verify", "out"]) == 0
    assert capsys.readouterr().out == "out: 21 tensors are what was written\n"
    assert main(["verify", "out", "--against", "run"]) == 0
    assert capsys.readouterr().out == "out: 21 tensors are what was written, and equal what run gives\n"


def test_a_missing_config_is_said(here: Path, capsys: Capture) -> None:
    assert main(["merge", "run", "out"]) == 0
    assert "note: there is no config.json beside the checkpoint, so the output has none: --base brings it\n" in (
        capsys.readouterr().err
    )


# ------------------------------------------------------------------------------------------------------------ JSON


def from_json(capsys: Capture) -> dict[str, object]:
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    return value


def test_every_verb_that_reports_does_so_in_json(here: Path, capsys: Capture) -> None:
    assert main(["inspect", "run", "--json"]) == 0
    found = from_json(capsys)
    assert (found["format"], found["step"], found["num_parameters"], found["complete"]) == ("dcp", 10, 51000, True)
    assert main(["merge", "run", "out", "--base", "base", "--dry-run", "--json"]) == 0
    plan = from_json(capsys)
    assert plan["read_nbytes"] == 212184
    assert main(["merge", "run", "out", "--base", "base", "--json"]) == 0
    merged = from_json(capsys)
    assert (merged["output"], merged["num_tensors"], merged["num_checked"]) == ("out", 21, 84)
    assert merged["nbytes"] == plan["write_nbytes"]
    assert main(["verify", "out", "--json"]) == 0
    assert from_json(capsys)["problems"] == []
    assert main(["average", "run", "run/checkpoint-10", "--output", "mean", "--base", "base", "--json"]) == 0
    assert from_json(capsys)["num_tensors"] == 21
    assert main(["inspect", "run", "--audit", "--json"]) == 0
    assert all(row["known"] for row in json.loads(capsys.readouterr().out))


# ----------------------------------------------------------------------------------------------------------- codes


def test_exit_1_and_a_hint_for_what_the_user_can_mend(here: Path, capsys: Capture) -> None:
    before = left_in(here)
    assert main(["merge", "nowhere", "out"]) == 1
    assert capsys.readouterr().err == f"error: {here}/nowhere: no such file or directory\n"
    assert main(["merge", "run", "out", "--ouput", "x"]) == 1
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --ouput x\n\nhint: did you mean --output? see reshard merge --help\n"
    )
    assert main(["--nope"]) == 1
    assert capsys.readouterr().err == "error: unknown option --nope\n\nhint: see reshard --help\n"
    assert main(["merge"]) == 1
    assert "no checkpoint was named" in capsys.readouterr().err
    assert left_in(here) == before


def test_exit_1_where_a_check_fails(here: Path, capsys: Capture) -> None:
    assert main(["merge", "run", "out", "-q"]) == 0
    with (here / "out/model.safetensors").open("r+b") as file:
        file.seek(150_000)
        file.write(b"\xff\x00\xff")
    capsys.readouterr()
    assert main(["verify", "out"]) == 1
    said = capsys.readouterr()
    assert re.fullmatch(r".*out/model.safetensors: tensor model\.\S+: not the bytes that were written\n", said.out)
    assert said.err == "error: out: 1 problem\n"


def test_an_output_that_exists_is_left_alone(here: Path, capsys: Capture) -> None:
    (here / "out").mkdir()
    (here / "out/mine").write_text("precious")
    assert main(["merge", "run", "out"]) == 1
    assert "hint: --force replaces it, once the new one is complete\n" in capsys.readouterr().err
    assert left_in(here / "out") == ["mine"]


def test_exit_2_is_our_fault(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_dispatch", broken)
    assert main(["run"]) == 2
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "error: this is a defect of reshard\n" in err


def test_exit_130_when_interrupted(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert main(["run"]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted\n")


def test_a_closed_pipe_is_no_traceback(here: Path) -> None:
    command = f"{sys.executable} -m reshard inspect run --tensors | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == f"{here}/run/checkpoint-10\n"
    assert done.stderr == ""


def test_without_a_terminal_there_is_no_colour(here: Path) -> None:
    for env in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}):
        done = child("merge", "run", "out", "--base", "base", "--force", env=env)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("script") is None, reason="needs script(1) for a terminal")
def test_no_color_is_respected_on_a_terminal(here: Path) -> None:
    command = f"{sys.executable} -m reshard merge run out --base base"
    env = {**os.environ, "NO_COLOR": "1", "TERM": "xterm"}
    done = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True, env=env, check=True)
    assert re.search(r"\x1b\[[\d;]*3\dm", done.stdout) is None
    assert "84 checksums" in done.stdout


# ------------------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize("spell", [lambda o: o, lambda o: o.replace("-", "_").replace("__", "--", 1)])
def test_hyphens_and_underscores_are_alike(spell: Callable[[str], str], here: Path) -> None:
    options = ["--output-dir", "out", "--max-shard-size", "100KB", "--no-save-tokenizer", "--keep-names"]
    words = [spell(word) if word.startswith("--") else word for word in options]
    assert main(["merge", "run", *words, "-q"]) == 0
    assert sorted(p.name for p in (here / "out").glob("model*")) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]


def test_axolotl_spells_it_so(here: Path, truth: Mapping[str, object]) -> None:
    words = ["merge", "config.yml", "--output-path", "./merged_model", "--no-save-tokenizer", "--remove-shards"]
    assert main(words) == 0
    assert equals(here / "merged_model", truth)  # type: ignore[arg-type]
    assert sorted(os.listdir("merged_model")) == [
        "config.json", "generation_config.json", "model.safetensors", "reshard.json",
    ]  # fmt: skip
    assert not list((here / "run").rglob("*.distcp"))


def test_axolotl_merges_into_its_output_dir_by_default(here: Path, truth: Mapping[str, object]) -> None:
    assert main(["merge", "config.yml"]) == 0
    assert equals(here / "run/merged", truth)  # type: ignore[arg-type]
    assert (here / "run/merged/tokenizer.json").is_file()


def test_axolotl_calls_it_from_python(here: Path, truth: Mapping[str, object]) -> None:
    cfg = {"base_model": "base", "output_dir": "run", "learning_rate": 1e-3}
    reshard.merge_fsdp_weights(cfg, "one", save_tokenizer=True)
    reshard.merge_fsdp_weights(cfg, output_path="two", save_tokenizer=False)
    reshard.merge_fsdp_weights("config.yml")
    for output in ("one", "two", "run/merged"):
        assert equals(here / output, truth)  # type: ignore[arg-type]
    assert (here / "one/tokenizer.json").is_file()
    assert not (here / "two/tokenizer.json").exists()


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 20))
"""Twenty lines of merge keys that stand for 9^20 values."""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: base\n", "has no output_dir"),
        ("output_dir: [1, 2\n", "config.yml: "),
        ("- output_dir\n", "settings are expected, it holds a list"),
        ("output_dir: 2024-02-31\n", "config.yml: day "),
        ("output_dir: !!timestamp today\n", "config.yml: a value is not what its tag says"),
        ("output_dir: !!bool perhaps\n", "config.yml: a value is not what its tag says"),
        ("output_dir: !!int ''\n", "config.yml: a value is not what its tag says"),
        ("output_dir: " + "[" * 100_000, "config.yml: it is nested deeper than 32 levels, in line 1"),
        (BOMB, "config.yml: it stands for more than 1048576 values"),
        ("output_dir: elsewhere\n", "no such file or directory"),
        ("output_dir: run\nbase_model: nowhere/at-all\n", "nowhere/at-all is neither a directory nor in "),
    ],
)
def test_an_axolotl_config_that_cannot_be_used_is_explained(text: str, said: str, here: Path, capsys: Capture) -> None:
    (here / "config.yml").write_text(text)
    assert main(["merge", "config.yml"]) == 1
    assert said in capsys.readouterr().err


@pytest.fixture
def lmms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of LMMs-Engine: two steps, the EMA of each being the other one's weights."""
    for step, seed, ema in ((4, 1, 2), (12, 2, 1)):
        directory = tmp_path / f"run/checkpoint-{step}"
        workspace.write_lmms(directory, workspace.state_of(seed=seed), ema=workspace.state_of(seed=ema))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "seed"),
    [
        ("--step 4", 1),
        ("--step 12", 2),
        ("", 2),
        ("--step 4 --state-dict-dirname pytorch_ema_model_fsdp_0", 2),
        ("--state_dict_dirname pytorch_ema_model_fsdp_0", 1),
        ("--checkpoint-type ema", 1),
        ("--step 4 --checkpoint_type regular", 1),
    ],
)
def test_lmms_engine_spells_it_so(words: str, seed: int, lmms: Path) -> None:
    assert main(["merge", "--input-dir", "run", "--type", "fsdp2", *words.split(), "--output-dir", "out", "-q"]) == 0
    assert equals(lmms / "out", workspace.state_of(seed=seed))
    assert (lmms / "out/tokenizer.json").read_bytes() == (EXAMPLES / "base/tokenizer.json").read_bytes()


def test_lmms_engine_averages_so(lmms: Path) -> None:
    assert main(["merge", "--input_dir", "run", "--type", "fsdp2", "--merge", "--output_dir", "out", "-q"]) == 0
    one, two = workspace.state_of(seed=1), workspace.state_of(seed=2)
    mean = {fqn: ((one[fqn].double() + two[fqn].double()) / 2).to(one[fqn].dtype) for fqn in one}
    assert equals(lmms / "out", mean)


def test_the_built_in_merger_of_lmms_engine_spells_it_so(lmms: Path) -> None:
    words = ["--checkpoint_path", "run/checkpoint-4", "--output_path", "out", "--checkpoint_type", "ema"]
    assert main(["merge", *words, "-q"]) == 0
    assert equals(lmms / "out", workspace.state_of(seed=2))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run out --output-dir elsewhere", "out is one path too many: SRC is run, OUT is elsewhere"),
        ("--input-dir run out more", "more is one path too many: SRC is run, OUT is out"),
        ("run out --base one --model-name-or-class other", "--base one and --model-name-or-class other are two models"),
        ("run out --checkpoint-type ema --state-dict-dirname here", "and not here"),
        ("run out --merge --remove-shards", "the shards that an average is made of are not removed"),
    ],
)
def test_options_of_a_merge_that_contradict_are_refused(words: str, said: str, lmms: Path, capsys: Capture) -> None:
    assert main(["merge", *words.split()]) == 1
    assert said in capsys.readouterr().err
    assert not {"out", "elsewhere", "more"} & {path.name for path in lmms.iterdir()}


def test_options_of_a_merge_that_change_nothing_are_said(lmms: Path, capsys: Capture) -> None:
    words = ["--type", "fsdp2", "--max-shard-size", "1GB", "--cfg-key", "cfg", "--no-save-tokenizer"]
    assert main(["merge", "run", "out.pt", *words]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "changes nothing" in line]
    assert said == [
        "note: --max-shard-size changes nothing: out.pt is one file",
        "note: --no-save-tokenizer changes nothing: out.pt is one file",
        "note: --cfg-key changes nothing: only a .ckpt has a configuration in it",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge", "", "out"], "SRC is empty"),
        (["merge", "run", ""], "OUT is empty"),
        (["merge", "run", "out", "--base", ""], "--base is empty"),
        (["convert", "run", "", "--to", "hf"], "OUT is empty"),
        (["convert", "", "out", "--to", "hf"], "SRC is empty"),
        (["export", "--megatron-path", "", "--hf-path", "out", "--hf-model", "x"], "--megatron-path is empty"),
        (
            ["export", "--megatron-path", ".", "--hf-path", "out", "--hf-model", "x"],
            "no checkpoint of Megatron is there",
        ),
    ],
)
def test_a_path_that_is_empty_is_not_the_directory_where_one_is(
    words: list[str], said: str, lmms: Path, capsys: Capture
) -> None:
    assert main(words) == 1
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in lmms.iterdir()) == ["run"]


def test_a_base_that_has_nothing_to_give_is_refused(lmms: Path, capsys: Capture) -> None:
    (lmms / "empty").mkdir()
    assert main(["merge", "run", "out", "--base", "empty"]) == 1
    assert "--base empty has neither config.json nor files of a tokenizer" in capsys.readouterr().err


def test_a_path_that_begins_with_a_dash_is_told_from_an_option(lmms: Path, capsys: Capture) -> None:
    (lmms / "run").rename(lmms / "-run")
    assert main(["merge", "-run", "out"]) == 1
    assert "hint: a path that begins with a dash is written ./-run; see" in capsys.readouterr().err
    assert main(["merge", "./-run", "out", "-q"]) == 0


def test_a_step_that_is_not_there_is_told_from_those_that_are(lmms: Path, capsys: Capture) -> None:
    assert main(["merge", "--input-dir", "run", "--step", "5", "--output-dir", "out"]) == 1
    err = capsys.readouterr().err
    assert "has no checkpoint of step 5" in err
    assert "hint: it has the steps 4, 12" in err


@pytest.mark.parametrize(
    "words",
    [
        "merge run out --base base",
        "merge run --base base out",
        "merge --base base run out",
        "merge run --output out -q",
    ],
)
def test_options_may_stand_anywhere(words: str, here: Path) -> None:
    assert main(words.split()) == 0
    assert (here / "out/model.safetensors").is_file()


def test_sources_of_an_average_may_stand_anywhere(here: Path) -> None:
    assert main(["average", "run", "--output", "out.safetensors", "run/checkpoint-10", "-q"]) == 0
    assert (here / "out.safetensors").is_file()


def tied_run(directory: Path, *, same_head: bool) -> Path:
    """A tied model's run, its weights under both names as sharded checkpoints have them."""
    tensors = workspace.state_of("qwen2", seed=1)
    if not same_head:
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    workspace.write_trainer(directory / "run/checkpoint-1", tensors, optimizer=False)
    workspace.write_base(directory / "base", "qwen2")
    return directory


def test_shards_of_a_tied_model_are_removed_as_nothing_is_lost(tmp_path: Path) -> None:
    here = tied_run(tmp_path, same_head=True)
    words = ["merge", str(here / "run"), str(here / "out"), "--base", str(here / "base"), "-q"]
    assert main([*words, "--remove-shards"]) == 0
    assert "lm_head.weight" not in load_file(here / "out/model.safetensors")
    assert not list(here.rglob("*.distcp"))
    assert not list(here.rglob(".metadata"))


def test_shards_that_hold_more_than_the_output_stay(tmp_path: Path, capsys: Capture) -> None:
    here = tied_run(tmp_path, same_head=False)
    words = ["merge", str(here / "run"), str(here / "out"), "--base", str(here / "base"), "-q"]
    assert main([*words, "--remove-shards"]) == 1
    assert "--remove-shards would lose what is not in the output: model.lm_head.weight\n" in capsys.readouterr().err
    assert len(list(here.rglob("*.distcp"))) == 2
    assert not (here / "out").exists()


def test_the_base_of_an_adapter_needs_no_config_of_a_model(tmp_path: Path) -> None:
    workspace.write_adapter(tmp_path / "lora/checkpoint-5")
    shutil.move(tmp_path / "lora/adapter_config.json", tmp_path / "elsewhere.json")
    (tmp_path / "base").mkdir()
    shutil.move(tmp_path / "elsewhere.json", tmp_path / "base/adapter_config.json")
    words = ["merge", str(tmp_path / "lora"), str(tmp_path / "out"), "--base", str(tmp_path / "base"), "-q"]
    assert main(words) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors", "reshard.json"]


def test_a_caller_of_main_keeps_its_garbage_collector(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert gc.isenabled()
