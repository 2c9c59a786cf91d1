"""In a trainer: nothing waits, nothing is raised, and results come back at their own steps."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from reshard.errors import InputError
from reshard.evaluate.log import read
from reshard.integrations import submit as module
from reshard.integrations.submit import Submitter
from reshard.integrations.transformers import AsyncEvalCallback
from test_serve import CHILD, Client, shell, started

SCORES = 'printf \'{"t": {"acc,none": 0.%s, "acc,strict": 0.1, "acc_stderr,none": 0.1}}\' "$2" > "$3"'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "root").mkdir()
    process, client = started([sys.executable, "-c", CHILD, str(tmp_path), json.dumps(shell(SCORES))])
    yield client
    process.kill()
    process.communicate()


@pytest.fixture
def nobody() -> str:
    """An address at which nobody answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def saved(tmp_path: Path, step: int) -> Path:
    path = tmp_path / "root" / "run" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return path


def test_the_file_can_be_copied_it_needs_the_standard_library_only() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} <= sys.stdlib_module_names


def test_what_is_submitted_comes_back_at_its_step(server: Client, tmp_path: Path) -> None:
    submitter = Submitter(f"http://127.0.0.1:{server.port}", ["t"], poll_interval=0.05)
    for step in (3, 1, 2):
        submitter.submit(saved(tmp_path, step), step)
    assert submitter.drain(30) == []
    results = {result.step: result.metrics for result in submitter.results()}
    assert results == {step: {"t/acc": step / 10, "t/acc.strict": 0.1} for step in (1, 2, 3)}
    assert submitter.results() == []


def test_a_dead_server_costs_one_warning_and_no_time(
    nobody: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    submitter = Submitter(nobody, ["t"], poll_interval=0.01)
    began = time.monotonic()
    for step in range(5):
        submitter.submit(tmp_path / f"checkpoint-{step}", step)
    assert time.monotonic() - began < 1
    time.sleep(1.5)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be reached" in caplog.text
    assert len(submitter.drain(60, away_s=0.2)) == 5
    assert time.monotonic() - began < 10


def test_a_server_that_comes_back_gets_what_was_submitted(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    submitter = Submitter(f"http://127.0.0.1:{port}", ["t"], poll_interval=0.05)
    submitter.submit(saved(tmp_path, 1), 1)
    time.sleep(0.3)
    program = [sys.executable, "-c", CHILD.replace("port=0", f"port={port}"), str(tmp_path), json.dumps(shell(SCORES))]
    process, _ = started(program)
    try:
        assert submitter.drain(30) == []
    finally:
        process.kill()
        process.communicate()
    assert [result.metrics["t/acc"] for result in submitter.results()] == [0.1]


def test_what_the_server_refuses_is_told_and_forgotten(
    server: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    submitter = Submitter(f"http://127.0.0.1:{server.port}", ["t"], poll_interval=0.05)
    submitter.submit("/etc", 1)
    assert submitter.drain(30) == []
    (result,) = submitter.results()
    assert "outside the directories" in result.error
    assert "the evaluation of step 1 failed" in caplog.text


def test_an_address_that_is_none_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("RESHARD_SERVER", "http://[::1")
    monkeypatch.setattr(module, "_submitter", None)
    module.submit(tmp_path, 5)
    assert module.drain(1) == []
    (said,) = caplog.messages
    assert "step 5 is not submitted" in said


def test_only_rank_zero_submits_from_any_loop(monkeypatch: pytest.MonkeyPatch, server: Client, tmp_path: Path) -> None:
    monkeypatch.setenv("RESHARD_SERVER", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("RESHARD_TASKS", "t")
    module.configure(poll_interval=0.05)
    monkeypatch.setenv("RANK", "1")
    module.submit(saved(tmp_path, 1), 1)
    monkeypatch.setenv("RANK", "0")
    module.submit(saved(tmp_path, 2), 2)
    assert module.drain(30) == []
    assert [result.step for result in module.results()] == [2]


# ------------------------------------------------------------------------------------------------ HuggingFace's Trainer


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(8) + index
        return {"input_ids": tokens, "labels": tokens}


def trained(output: Path, *callbacks: Any) -> Trainer:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=6, save_steps=2, logging_steps=1, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=Sentences(), callbacks=list(callbacks))
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_logs_each_result_at_the_step_of_its_checkpoint(server: Client, tmp_path: Path) -> None:
    run = tmp_path / "root" / "run"
    callback = AsyncEvalCallback(
        {
            "server_url": f"http://127.0.0.1:{server.port}", "tasks": ["t"], "checkpoint_key": "pretrained",
            "model": "hf", "poll_interval": 0.05,
        },
        drain_s=60,
    )  # fmt: skip
    trainer = trained(run, callback)
    logged = {entry["step"]: entry["eval/t/acc"] for entry in trainer.state.log_history if "eval/t/acc" in entry}
    assert logged == {2: 0.2, 4: 0.4, 6: 0.6}
    rows = [(row.step, row.name, row.value) for _, row in read(run / "evals.jsonl")]
    wanted = [
        (step, name, value) for step in (2, 4, 6) for name, value in (("t/acc", step / 10), ("t/acc.strict", 0.1))
    ]
    assert sorted(rows) == wanted


@pytest.mark.filterwarnings("ignore")
def test_a_training_with_a_dead_server_ends_as_one_without(
    nobody: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = AsyncEvalCallback({"server_url": nobody, "tasks": ["t"], "poll_interval": 0.05}, drain_s=0.2)
    assert trained(tmp_path / "run", callback).state.global_step == 6
    told = [record for record in caplog.records if record.name == "reshard.submit" and "reached" in record.message]
    assert len(told) == 1
    assert not (tmp_path / "run" / "evals.jsonl").exists()


def test_settings_are_those_of_the_watcher(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown key task; did you mean tasks"):
        AsyncEvalCallback({"task": ["t"]})
    with pytest.raises(InputError, match="a callback submits to a server"):
        AsyncEvalCallback({"tasks": ["t"], "backend": "lm_eval"})
    file = tmp_path / "eval.yaml"
    file.write_text("eval_config:\n  tasks: [t]\n")
    assert AsyncEvalCallback(str(file)).on_step_end(None, None, None) is None


# -------------------------------------------------------------------------------------------------- lm_eval, for real


TASK = """\
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
metadata: {{version: 1.0}}
"""


@pytest.mark.slow
def test_lm_eval_scores_shards_as_it_does_the_model_that_was_trained(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    root = tmp_path / "root"
    (root / "tasks").mkdir(parents=True)
    lines = [json.dumps({"text": f"the cat number {n} sat on mat {n * n}"}) for n in range(6)]
    (root / "tasks" / "text.jsonl").write_text("\n".join(lines))
    (root / "tasks" / "tiny_text.yaml").write_text(TASK.format(data=root / "tasks" / "text.jsonl"))
    truths = [write_run(root, step) for step in (1, 2, 3)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "d"),
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", "--port", str(port), "--root", str(root), "--slots", "2", "--include-path", str(root / "tasks")]
    server = subprocess.Popen([sys.executable, "-m", "reshard", *words], env=environment, stderr=subprocess.DEVNULL)
    client = Client(port)
    try:
        wait_for(client)
        more = {"tasks": ["tiny_text"], "device": "cpu", "batch_size": 2, "log_samples": False}
        jobs = [client.evaluate(root / "run" / f"checkpoint-{step}", **more) for step in (1, 2, 3)]
        ended = [client.ended(job, 300) for job in jobs]
    finally:
        server.terminate()
        server.wait(30)
    assert [said["status"] for said in ended] == ["completed"] * 3, ended
    assert [said["step"] for said in ended] == [1, 2, 3]
    scores = [said["metrics"][0]["value"] for said in ended]
    words = [sys.executable, "-c", DIRECTLY, str(root / "tasks"), *map(str, truths)]
    direct = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert scores == json.loads(direct.splitlines()[-1])
    assert len(set(scores)) == 3


DIRECTLY = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[1])
scores = []
for model in sys.argv[2:]:
    said = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": model}, tasks=["tiny_text"], task_manager=manager, device="cpu",
        batch_size=2,
    )
    scores.append(said["results"]["tiny_text"]["byte_perplexity,none"])
print(json.dumps(scores))
"""


def wait_for(client: Client) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            if client("GET", "/health")[0] == 200:
                return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.1)


def write_run(root: Path, step: int) -> Path:
    """A checkpoint as shards in the run, and the same model as transformers writes it; gives the latter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from checkpoints import write_dcp

    torch.manual_seed(step)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({character: i for i, character in enumerate([*alphabet, "<eos>"])}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    truth = root / "truth" / f"step-{step}"
    model.save_pretrained(truth)
    tokenizer.save_pretrained(truth)
    checkpoint = root / "run" / f"checkpoint-{step}"
    write_dcp(checkpoint / "pytorch_model_fsdp_0", {f"model.{name}": t for name, t in model.state_dict().items()})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    return truth
