"""A training loop under FSDP2 on two processes, and a watcher beside it that is killed once: every step is evaluated
on its own weights, and logged once.

The truth is the loss of the whole model in the trainer's memory, at the moment of the save.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reshard.cli.main import main

STEPS = (2, 4, 6, 8)
TRAIN = """
import json, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import tiny_models

run, tokens = Path(sys.argv[1]), torch.tensor([[5, 11, 7, 30, 42, 8, 19]])
dist.init_process_group("gloo")
torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
model, whole = tiny_models.make("llama"), tiny_models.make("llama")
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
truth = {}
for step in range(1, 9):
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 2:
        continue
    checkpoint = run / f"checkpoint-{step}"
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0")
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        whole.config.architectures, whole.config.dtype = ["LlamaForCausalLM"], "float32"
        whole.config.save_pretrained(checkpoint)
        whole.load_state_dict(full)
        with torch.no_grad():
            truth[step] = whole(input_ids=tokens, labels=tokens).loss.item()
        (run / "truth.json").write_text(json.dumps(truth))
    time.sleep(1)
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads, torn down with the interpreter, now and then abort a process whose work is done
"""
EVALUATE = """
import json, sys, torch, transformers
tokens = torch.tensor([[5, 11, 7, 30, 42, 8, 19]])
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    loss = model(input_ids=tokens, labels=tokens).loss.item()
open(sys.argv[2], "w").write(json.dumps({"text": {"loss": loss}}))
"""


@pytest.mark.slow
def test_every_step_of_a_training_loop_is_evaluated_on_its_own_weights(tmp_path: Path) -> None:
    (run := tmp_path / "run").mkdir()
    (evaluate := tmp_path / "evaluate.py").write_text(EVALUATE)
    (settings := tmp_path / "eval.yaml").write_text(
        "eval_strategy: steps\neval_steps: 2\neval_config:\n  backend: command\n  poll_interval: 0.2\n"
        f"  command: {sys.executable} -W ignore {evaluate} {{model}} {{output}}\n"
    )
    trainers = [start_trainer(run, rank) for rank in range(2)]
    watcher = start_watcher(run, settings)
    wait_for(run / "evals" / "evals.jsonl")
    watcher.send_signal(signal.SIGKILL)
    watcher.wait()
    watcher = start_watcher(run, settings)
    assert [trainer.wait(timeout=180) for trainer in trainers] == [0, 0]
    (run / "evals" / "training-ended").touch()
    assert watcher.wait(timeout=180) == 0
    truth = {int(step): loss for step, loss in json.loads((run / "truth.json").read_text()).items()}
    rows = [json.loads(line) for line in (run / "evals" / "evals.jsonl").read_text().splitlines()]
    assert sorted(row["step"] for row in rows) == list(STEPS)
    assert {row["step"]: row["value"] for row in rows} == pytest.approx(truth, abs=1e-5)
    assert main(["evals", str(run), "--best", "text/loss", "--lowest"]) == 0
    assert all((run / f"checkpoint-{step}" / "pytorch_model_fsdp_0" / ".metadata").exists() for step in STEPS)


def start_trainer(run: Path, rank: int) -> subprocess.Popen[bytes]:
    port = 20_000 + os.getpid() % 20_000
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **common, "PYTHONPATH": paths, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", TRAIN, str(run)], env=environment)


def start_watcher(run: Path, settings: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "reshard", "watch", str(run), "--config", str(settings), "-q"])


def wait_for(path: Path) -> None:
    until = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.05)
