"""Conversions by several processes: the same bytes as one process writes, killed ranks included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import tiny_models
from reshard.cli.main import main

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "reshard"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "qwen3_moe"
    model = tiny_models.make("qwen3_moe", hidden_size=256, moe_intermediate_size=512, num_hidden_layers=4)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_torchrun_converts_there_and_back_as_one_process_does(source: Path, tmp_path: Path) -> None:
    there = ["convert", str(source), "--to", "fsdp_dtensor", "--max-shard-size", "2MB"]
    assert main([*there, str(tmp_path / "one"), "-q"]) == 0
    subprocess.run([*LAUNCHER, *there, str(tmp_path / "four"), "-q"], check=True)
    assert content(tmp_path / "four") == content(tmp_path / "one")
    back = ["export", "--hf-model", str(source), "--megatron-path", str(tmp_path / "one"), "--max-shard-size", "2MB"]
    assert main([*back, "--hf-path", str(tmp_path / "back"), "-q"]) == 0
    shared = [*back, "--distributed-save", "--save-every-n-ranks", "2", "-q"]
    subprocess.run([*LAUNCHER, *shared, "--hf-path", str(tmp_path / "shared")], check=True)
    assert content(tmp_path / "shared") == content(tmp_path / "back")


@pytest.mark.slow
def test_a_conversion_goes_on_after_ranks_were_killed(source: Path, tmp_path: Path) -> None:
    words = ["convert", str(source), str(tmp_path / "out"), "--to", "torch_dist", "--memory", "256KB", "--threads", "1"]
    assert main([*words[:2], str(tmp_path / "one"), *words[3:5], "-q"]) == 0
    for number in range(4):
        ranks = start(words, join_timeout_s=5)
        time.sleep(0.4 + 0.2 * number)
        ranks[number % 4].send_signal(signal.SIGKILL)
        codes = [rank.wait(timeout=60) for rank in ranks]
        if (tmp_path / "out").exists():  # it came too late
            break
        assert all(codes), codes
    if not (tmp_path / "out").exists():
        assert [rank.wait(timeout=200) for rank in start(words, join_timeout_s=120)] == [0] * 4
    assert content(tmp_path / "out") == content(tmp_path / "one")


def start(words: Sequence[str], join_timeout_s: int) -> list[subprocess.Popen[bytes]]:
    """Four ranks, as a scheduler starts them."""
    environment = {**os.environ, "WORLD_SIZE": "4", "RESHARD_JOIN_TIMEOUT_S": str(join_timeout_s)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "reshard", *words, "-q"], env={**environment, "RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for rank in range(4)
    ]  # fmt: skip
