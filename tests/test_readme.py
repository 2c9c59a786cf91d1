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

import family_table
import workspace
from checkpoints import equals, left_in
from megatron_workspace import DENSE, MIXTURE, truth_of, write_megatron
from nemo_workspace import EXPORTED, LLAMA, write_nemo
from reshard.cli.main import main
from reshard.formats.fsdp_dtensor import TARGETS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDE = ROOT / "docs" / "megatron.md"
LAUNCHERS = ("torchrun", "srun", "mpirun")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def rows(page: Path) -> list[str]:
    """The commands in tables."""
    programs = "|".join(("reshard", *LAUNCHERS))
    return re.findall(rf"^\|.*\| `((?:{programs}) [^`]*)` \|$", page.read_text(), re.MULTILINE)


def examples(page: Path) -> list[list[str]]:
    """The commands of each code block."""
    begins = tuple(f"{program} " for program in ("reshard", *LAUNCHERS))
    found = [[line for line in block.splitlines() if line.startswith(begins)] for block in blocks(page, "sh")]
    return [commands for commands in found if commands]


COMMANDS = [pytest.param([c], id=f"{p.name}: {c}"[:90]) for p in PAGES for c in rows(p)]
COMMANDS += [pytest.param(cs, id=f"{p.name}: {cs[0]} ..."[:90]) for p in PAGES for cs in examples(p)]
PYTHON = [pytest.param(b, id=f"{p.name} {i}") for p in PAGES for i, b in enumerate(blocks(p, "python"))]


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every system, and `merged`, the model of one of them."""
    directory = write_nemo(write_megatron(workspace.write_workspace(tmp_path_factory.mktemp("workspace"))))
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


OUTPUT_OPTIONS = ("--output", "--output-dir", "--output-path", "--output_path", "--hf-path", "--megatron-path")


def output_of(command: str) -> Path | None:
    """Where a command writes, if it does."""
    words = shlex.split(command, comments=True)
    words = words[words.index("reshard") :]
    if words[1] not in ("merge", "average", "convert", "import", "export") or "--dry-run" in words:
        return None
    for option in OUTPUT_OPTIONS:
        if option in words:
            return Path(words[words.index(option) + 1])
    return Path(words[3])


LAUNCHER = """#!/bin/sh
# as the real one: `srun --ntasks N COMMAND ...` starts a command N times and tells each which it is
tasks=$2
shift 2
for task in $(seq 0 $((tasks - 1))); do
    VARIABLES "$@" &
    started="$started $!"
done
for process in $started; do wait "$process" || exit 1; done
"""


VARIABLES = {
    "srun": "SLURM_STEP_ID=0 SLURM_NTASKS=$tasks SLURM_PROCID=$task",
    "mpirun": "OMPI_COMM_WORLD_SIZE=$tasks OMPI_COMM_WORLD_RANK=$task",
}


def run(command: str) -> None:
    """A command of the documentation, as typed; launchers start two processes, however many it says."""
    if command.startswith("reshard "):
        assert main(shlex.split(command, comments=True)[1:]) == 0
        return
    programs = Path("programs")
    programs.mkdir(exist_ok=True)
    for name, variables in VARIABLES.items():
        (programs / name).write_text(LAUNCHER.replace("VARIABLES", variables))
        (programs / name).chmod(0o755)
    path = f"{programs.resolve()}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    words = shlex.split(re.sub(r"(--nproc-per-node|--ntasks|mpirun -n) \d+", r"\1 2", command))
    subprocess.run(words, env=env, check=True, capture_output=True, timeout=120)
    shutil.rmtree(programs)


@pytest.mark.parametrize("commands", COMMANDS)
def test_documented_commands_do_their_work(commands: list[str], here: Path) -> None:
    for command in commands:
        before = left_in(here)
        run(command)
        output = output_of(command)
        if command.startswith(("reshard watch", "reshard evals")):
            assert (here / "output/evals/evals.jsonl").exists()
        elif output is None:
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


CONVERTED: dict[str, str | int] = {
    "reshard convert bridge": DENSE,
    "reshard export": DENSE,
    "reshard convert megatron_fsdp": MIXTURE,
    "reshard convert megatron_lm": SECOND,
    "reshard convert nemo2": LLAMA,
    "reshard convert verl_megatron": SECOND,
}
"""The directory that a conversion of the README gives back, or the seed of its model."""


@pytest.mark.parametrize("begins", CONVERTED)
def test_what_comes_back_from_megatron_is_the_model_that_went_there(begins: str, here: Path) -> None:
    command = next(c for c in rows(PAGES[0]) if c.startswith(begins))
    truth = CONVERTED[begins]
    run(command)
    wanted = truth_of(here / truth) if isinstance(truth, str) else workspace.state_of("llama", truth)
    assert equals(here / "model", wanted)


@pytest.mark.parametrize(
    "command", [row for row in rows(PAGES[0]) if " nemo2_model" in row and " model_weights" not in row]
)
def test_what_comes_back_from_nemo_2_is_the_model_that_went_there(command: str, here: Path) -> None:
    """Weights alone do not say which of their rows are padding: these keep all."""
    run(command)
    run("reshard convert nemo2_model model --to hf")
    assert equals(here / "model", truth_of(here / LLAMA) if LLAMA in command else load_file(EXPORTED))


def test_what_nemo_1_trained_is_what_nemos_own_exporter_makes_of_it(here: Path) -> None:
    run(next(c for c in rows(PAGES[0]) if re.match(r"reshard convert model\.nemo \S+ --to hf", c)))
    assert equals(here / "model", load_file(EXPORTED))


@pytest.mark.parametrize("number, model", [(0, DENSE), (1, MIXTURE), (2, MIXTURE), (-1, DENSE)])
def test_an_example_of_the_guide_comes_back_bit_for_bit(number: int, model: str, here: Path) -> None:
    for command in examples(GUIDE)[number]:
        run(command)
    assert equals(here / "model", truth_of(here / model))


def test_the_guide_lists_the_families_that_there_are() -> None:
    assert family_table.documented() == family_table.table(), "python tests/family_table.py writes the table anew"


def test_the_guide_says_of_every_target_what_is_written_for_it() -> None:
    found = re.findall(
        r"^\| `([\w.-]+)`(?: \(default\))? \|.*\| (.*) \| (.*) \| (.*) \|$", GUIDE.read_text(), re.MULTILINE
    )
    said = {name: tuple(cells) for name, *cells in found if name in TARGETS}
    split = {(True,): "in parts", (False,): "whole, for TP 1", (True, False): "both"}
    assert said == {
        name: (_one_or_both(target.prefixes), _one_or_both(target.mtp), split[target.split_parts])
        for name, target in TARGETS.items()
    }


def test_the_page_of_fsdp_dtensor_says_what_a_target_is() -> None:
    page = (ROOT / "docs" / "formats" / "fsdp_dtensor.md").read_text()
    split = {(True,): "parts", (False,): "whole", (True, False): "both"}
    for name, target in TARGETS.items():
        cells = [
            f"`{name}`", _one_or_both(target.prefixes), _one_or_both(target.mtp), split[target.split_parts],
            str(target.iteration), "yes" if target.has_train_state else "no", "yes" if target.has_args else "no",
        ]  # fmt: skip
        assert f"| {' | '.join(cells)} |" in page


def _one_or_both(names: tuple[str, ...]) -> str:
    return f"`{names[0]}`" if len(names) == 1 else "both"


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
