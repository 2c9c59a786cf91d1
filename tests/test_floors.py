"""The house stands: imports go down only, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
MODULES = sorted((SRC / "reshard").rglob("*.py"))
FLOORS = {
    "errors": -1, "version": -1, "core": 0, "storage": 1, "formats": 2, "dialects": 2, "families": 3, "ops": 4,
    "report": 5, "evaluate": 5, "cli": 6, "integrations": 6,
}  # fmt: skip
TRAINING_FRAMEWORKS = {
    "torch", "transformers", "accelerate", "deepspeed", "safetensors", "megatron", "nemo", "lightning", "peft",
    "omegaconf",
}  # fmt: skip
OPTIONAL = {"zstandard", "huggingface_hub", "numcodecs"}
HEAVY = {
    "numpy",
    "ml_dtypes",
    "msgspec",
    "xxhash",
    "rich",
    "yaml",
    "zstandard",
    "huggingface_hub",
    "numcodecs",
    "asyncio",
}


def name_of(module: Path) -> str:
    return ".".join(module.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def floor(module: str) -> int:
    """Of a module; the package itself and `__main__` stand above all."""
    return FLOORS.get(module.split(".")[1], 9) if "." in module else 9


def imports(module: Path, *, at_top_only: bool = False) -> Iterator[str]:
    """Every module that one imports, by its whole name."""
    tree = ast.parse(module.read_text())
    for node in tree.body if at_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (SRC / (whole.replace(".", "/") + ".py")).exists() or (
                    SRC / whole.replace(".", "/")
                ).is_dir()
                yield whole if is_module else node.module


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_imports_go_down_or_stay_on_their_floor(module: Path) -> None:
    above = [i for i in imports(module) if i.split(".")[0] == "reshard" and floor(i) > floor(name_of(module))]
    assert above == []


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_every_module_stands_on_a_floor(module: Path) -> None:
    assert name_of(module) in ("reshard", "reshard.__main__") or name_of(module).split(".")[1] in FLOORS


@pytest.mark.parametrize("module", sorted((SRC / "reshard" / "core").glob("*.py")), ids=name_of)
def test_the_core_needs_numpy_and_the_standard_library_only(module: Path) -> None:
    allowed = sys.stdlib_module_names | {"numpy", "ml_dtypes", "reshard"}
    assert {i.split(".")[0] for i in imports(module)} <= allowed
    ours = {i for i in imports(module) if i.startswith("reshard.") and not i.startswith("reshard.core")}
    assert ours <= {"reshard.errors"}


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_no_training_framework_is_imported_anywhere(module: Path) -> None:
    assert {i.split(".")[0] for i in imports(module)} & TRAINING_FRAMEWORKS == set()


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_optional_packages_are_imported_where_they_are_used_only(module: Path) -> None:
    assert {i.split(".")[0] for i in imports(module, at_top_only=True)} & OPTIONAL == set()


def imported_by(*arguments: str) -> set[str]:
    """The top names of everything that a Python process with these arguments imports."""
    child = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True)
    return {
        line.rsplit("|", 1)[1].strip().split(".")[0] for line in child.stderr.splitlines() if "import time:" in line
    }


def test_help_imports_nothing_heavy() -> None:
    assert imported_by("-m", "reshard", "--help") & HEAVY == set()


def test_the_help_of_a_verb_imports_nothing_heavy() -> None:
    assert imported_by("-m", "reshard", "merge", "--help") & HEAVY == set()


def test_importing_reshard_imports_nothing_heavy() -> None:
    assert imported_by("-c", "import reshard") & HEAVY == set()


def test_a_merge_imports_no_bar_and_no_hub_where_there_is_no_terminal(tmp_path: Path) -> None:
    source = SRC.parent / "examples" / "run"
    found = imported_by("-m", "reshard", "merge", str(source), str(tmp_path / "out.safetensors"))
    assert found & {"rich", "yaml", "huggingface_hub", "zstandard", *TRAINING_FRAMEWORKS} == set()
