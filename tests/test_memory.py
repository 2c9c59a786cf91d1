"""Memory is bounded by the block: peaks of real processes, for models of two sizes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints import peak_nbytes, write_dcp

LIMIT_NBYTES = 200 << 20
SMALL, LARGE = 3, 12
"""Layers of 25 MB: 75 MB and 300 MB, with an embedding that alone exceeds what a process may take."""


def tensors(num_layers: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(2500, 2500, generator=generator)
    return {f"layers.{i}.weight": large + i for i in range(num_layers)} | {
        "embed.weight": torch.randn(4 * num_layers, 800_000, generator=generator)
    }


@pytest.fixture(scope="module", params=[0, 1], ids=["rows", "columns"])
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """Checkpoints of two sizes, cut by rows or by columns."""
    directory = tmp_path_factory.mktemp("memory")
    made = {n: write_dcp(directory / str(n), tensors(n), ranks=4, dim=request.param) for n in (SMALL, LARGE)}
    yield made
    shutil.rmtree(directory)


CASES: dict[str, list[str]] = {
    "merge": ["merge", "{source}", "{output}"],
    "one file": ["merge", "{source}", "{output}.safetensors"],
    "torch file": ["merge", "{source}", "{output}.pt"],
    "cast": ["merge", "{source}", "{output}", "--dtype", "bfloat16"],
    "average": ["average", "{source}", "{source}", "{source}", "--output", "{output}"],
    "average and cast": [
        "average", "{source}", "{source}", "--weights", "1,3", "--dtype", "bfloat16", "--output", "{output}",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_peak_does_not_depend_on_the_size_of_the_model(sources: dict[int, Path], tmp_path: Path, case: str) -> None:
    peaks = {}
    for size, source in sources.items():
        words = [word.format(source=source, output=tmp_path / f"out{size}") for word in CASES[case]]
        peaks[size] = peak_nbytes(*words, "--quiet", "--threads", "4")
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert max(peaks.values()) <= LIMIT_NBYTES
    assert peaks[LARGE] <= 1.1 * peaks[SMALL]


@pytest.mark.slow
def test_verify_takes_no_more(sources: dict[int, Path], tmp_path: Path) -> None:
    peaks = {}
    for size, source in sources.items():
        peak_nbytes("merge", source, tmp_path / "out", "--force", "--quiet")
        peaks[size] = peak_nbytes("verify", tmp_path / "out", "--against", source)
    assert max(peaks.values()) <= LIMIT_NBYTES
    assert peaks[LARGE] <= 1.1 * peaks[SMALL]


@pytest.mark.slow
def test_less_memory_may_be_asked_for(sources: dict[int, Path], tmp_path: Path) -> None:
    usual = peak_nbytes("merge", sources[LARGE], tmp_path / "out", "--quiet")
    less = peak_nbytes("merge", sources[LARGE], tmp_path / "less", "--quiet", "--memory", "1MB")
    assert less <= usual + (1 << 20)
