"""Every command of the README and of the pages under docs/ does what it is said to do."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import workspace
from checkpoints import equals, left_in
from reshard.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def rows(page: Path) -> list[str]:
    """The commands in tables."""
    return re.findall(r"^\|.*\| `(reshard [^`]*)` \|$", page.read_text(), re.MULTILINE)


def lines(page: Path) -> list[str]:
    """The commands in code blocks."""
    found = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in found if line.startswith("reshard ")]


COMMANDS = [pytest.param(c, id=f"{p.name}: {c}"[:90]) for p in PAGES for c in rows(p) + lines(p)]
PYTHON = [pytest.param(b, id=f"{p.name} {i}") for p in PAGES for i, b in enumerate(blocks(p, "python"))]


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every system, and `merged`, the model of one of them."""
    directory = workspace.write_workspace(tmp_path_factory.mktemp("workspace"))
    arguments = [str(directory / "output/checkpoint-500"), str(directory / "merged"), "-q"]
    assert main(["merge", *arguments, "--base", str(directory / workspace.BASE)]) == 0
    return directory


@pytest.fixture
def here(everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be changed; the current directory."""
    shutil.copytree(everything, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "here"


def output_of(command: str) -> Path | None:
    """Where a command writes, if it does."""
    words = shlex.split(command)
    if words[1] not in ("merge", "average") or "--dry-run" in words:
        return None
    for option in ("--output", "--output-dir", "--output-path"):
        if option in words:
            return Path(words[words.index(option) + 1])
    return Path(words[3])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_does_its_work(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = left_in(here)
    assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    output = output_of(command)
    if output is None:
        assert left_in(here) == before
    else:
        assert output.exists()
        assert main(["verify", str(output)]) == 0


FIRST, SECOND = 1, 2
SAME_MODEL = {
    "reshard merge config.yml": SECOND,
    "reshard merge output/checkpoint-500 model": SECOND,
    "reshard merge --input-dir run --type fsdp2 --step 500 --output-dir": SECOND,
    "reshard merge --input-dir run --type fsdp2 --step 500 --state-dict-dirname": FIRST,
    "reshard merge verl": SECOND,
    "reshard merge nemo/step=500.ckpt model --base": SECOND,
    "reshard merge fsdp1": SECOND,
    "reshard merge outputs": SECOND,
    "reshard merge sharded_save": SECOND,
    "reshard merge consolidated.pt": SECOND,
    "reshard merge big_model": 0,
}
"""The seed of the model that a command of the README writes."""


@pytest.mark.parametrize("begins", SAME_MODEL)
def test_what_a_documented_command_writes_is_the_model_that_was_saved(begins: str, here: Path) -> None:
    command = next(c for c in rows(PAGES[0]) if c.startswith(begins))
    assert main(shlex.split(command)[1:]) == 0
    output = output_of(command)
    assert output is not None
    assert equals(output, workspace.state_of("llama", SAME_MODEL[begins]))


@pytest.mark.parametrize("block", PYTHON)
def test_a_documented_piece_of_python_runs(block: str, here: Path) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_the_first_command_merges_the_example_bit_for_bit(tmp_path: Path) -> None:
    command = blocks(PAGES[0], "sh")[0].strip().split(" && ")[-1]
    assert command.startswith(".venv/bin/reshard merge examples/")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    words = [sys.executable, "-m", "reshard", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = blocks(PAGES[0], "text")[0]
    shown = re.sub(r" in [\d.]+ s, [\d.]+ .?B/s", "", done.stdout.replace(f"{tmp_path.resolve()}/", ""))
    assert re.sub(r", 22\d\.\d KB", ", 221.0 KB", shown) == said  # the manifest holds the path
    assert equals(tmp_path / "merged_model", load_file(ROOT / "tests/data/example_truth.safetensors"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged_model" / name).read_bytes() == (ROOT / "examples/base" / name).read_bytes()


def test_the_command_that_runs_the_tests_is_what_ci_runs() -> None:
    command = blocks(PAGES[0], "sh")[1].strip()
    assert command.endswith("-m pytest -q -n 2")
    assert "README.md" in (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
