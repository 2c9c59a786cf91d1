"""The evaluation server, as its clients see it: over HTTP, with real processes behind it."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from safetensors.torch import load_file

from checkpoints import model, write_dcp
from reshard.errors import InputError
from reshard.evaluate.backend import Phase, Refused, Request
from reshard.evaluate.backends import lmms_eval, lmms_results
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.records import Job, Key, New, State
from reshard.evaluate.serve import page, worker
from reshard.evaluate.serve.app import make_app
from reshard.evaluate.serve.plot import plot
from reshard.evaluate.serve.settings import ServeSettings, devices_of_slots
from reshard.evaluate.store import Store
from reshard.integrations.submit import Submitter

RECORDED = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "lmms" / "server.jsonl").read_text().splitlines()
]
SCORES = 'printf \'{"t": {"acc,none": 0.%s, "acc_stderr,none": 0.1}}\' "$2" > "$3"'
Answer = tuple[int, Any]


class Client:
    """Requests to a server."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port, self.token = port, token

    def __call__(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        chosen = {"Content-Type": "application/json"} if body is not None else {}
        chosen |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        try:
            connection.request(method, path, data, chosen | (headers or {}))
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(text) if is_json else text

    def evaluate(self, path: Path | str, **more: Any) -> str:
        status, said = self("POST", "/evaluate", asked(path, **more))
        assert status == 200, said
        return str(said["job_id"])

    def ended(self, job_id: str, within_s: float = 60.0) -> dict[str, Any]:
        until = time.monotonic() + within_s
        while (said := self("GET", f"/jobs/{job_id}")[1])["status"] in ("queued", "running"):
            assert time.monotonic() < until, said
            time.sleep(0.02)
        return dict(said)


def asked(path: Path | str, **more: Any) -> dict[str, Any]:
    return {"model": "hf", "tasks": ["t"], "model_args": {"pretrained": str(path)}} | more


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.01)


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script, "eval", "{model}", "{step}", "{output}")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A model that needs no merging."""
    path = tmp_path / "root" / "run" / "checkpoint-5"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


Serve = Callable[..., Client]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Servers in this process, with `tmp_path/root` as their root."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []
    (tmp_path / "root").mkdir(exist_ok=True)

    def start(script: str = SCORES, **settings: Any) -> Client:
        chosen: dict[str, Any] = {"backend": "command", "command": shell(script), "state": tmp_path / "root" / "state"}
        app = make_app(ServeSettings(**{**chosen, "roots": (tmp_path / "root",), **settings}))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", access_log=False))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        until = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        return Client(server.servers[0].sockets[0].getsockname()[1], settings.get("token"))

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


# --------------------------------------------------------------------------------------------------------- the protocol


def test_a_job_goes_through_and_its_results_come_back(serve: Serve, whole: Path) -> None:
    client = serve()
    said = client.ended(client.evaluate(whole))
    assert said["status"] == "completed"
    assert said["step"] == 5
    assert said["metrics"] == [{"task": "t", "metric": "acc", "filter": "none", "value": 0.5}]
    ((name, files),) = said["result"].items()
    assert name == "run__checkpoint-5"
    document = json.loads(Path(files["results"]).read_text())
    assert document["results"]["t"]["acc,none"] == 0.5
    assert client("GET", f"/jobs/{said['job_id']}/results") == (200, document)
    assert client("GET", "/queue")[1]["completed_jobs"] == 1


def recorded(method: str, path: str, status: int) -> Any:
    return next(
        e["answer"]
        for e in RECORDED
        if e["method"] == method and e["status"] == status and re.fullmatch(path, e["path"]) and e["answer"]
    )


def test_answers_have_the_fields_of_lmms_evals(serve: Serve, whole: Path) -> None:
    client = serve("sleep 0.5;" + SCORES)
    first, second = client.evaluate(whole), client.evaluate(whole)
    for method, path, pattern, status in (
        ("GET", "/health", "/health", 200),
        ("GET", "/queue", "/queue", 200),
        ("GET", "/tasks", "/tasks", 200),
        ("GET", f"/jobs/{first}", "/jobs/.*", 200),
        ("GET", "/jobs/nope", "/jobs/.*", 404),
        ("DELETE", f"/jobs/{second}", "/jobs/.*", 200),
    ):
        code, said = client(method, path)
        assert code == status
        assert set(recorded(method, pattern, status)) <= set(said), path
    code, said = client("DELETE", f"/jobs/{second}")
    assert (code, said) == (400, {"detail": "Job already finished or cancelled"})
    assert client("GET", f"/jobs/{second}")[1]["status"] == "cancelled"
    assert set(client("GET", f"/jobs/{first}")[1]["request"]) == set(recorded("GET", "/jobs/.*", 200)["request"])
    submitted = client("POST", "/evaluate", asked(whole))[1]
    assert set(submitted) == set(recorded("POST", "/evaluate", 200))


@pytest.mark.parametrize("exchange", [e for e in RECORDED if e["scenario"] == "422"], ids=lambda e: str(e["body"]))
def test_what_is_ill_formed_is_refused_where_lmms_eval_does(serve: Serve, exchange: dict[str, Any]) -> None:
    status, said = serve()("POST", "/evaluate", exchange["body"])
    assert status == 422
    assert [part["loc"] for part in said["detail"]] == [part["loc"] for part in exchange["answer"]["detail"]]


@pytest.mark.parametrize(
    "body, status",
    [
        (b"{", 422),
        (b"[]", 422),
        (b'{"model": "hf", "tasks": ["t"], "limit": NaN}', 422),
        (b'{"model": "hf", "tasks": []}', 422),
        (b'{"model": "hf", "tasks": ["t"], "num_gpus": true}', 422),
        (b'{"model": "hf", "tasks": ["t"]}', 400),
        (b'{"model": "--help", "tasks": ["t"], "model_args": {"pretrained": "gpt2"}}', 400),
        (b'{"model": "hf", "tasks": ["../t.yaml"], "model_args": {"pretrained": "gpt2"}}', 400),
        (b'{"model": "hf", "tasks": ["t"], "model_args": {"pretrained": "gpt2", "a=b": 1}}', 400),
        (b'{"model": "hf", "tasks": ["t"], "model_args": {"pretrained": "/a\\u0000b"}}', 400),
        (b'{"model": "hf", "tasks": ["t"], "model_args": {"pretrained": "/\\ud800"}}', 400),
        (b'{"model": "hf", "tasks": ["t"], "model_args": {"pretrained": "/%s"}}' % (b"a" * 5000), 400),
        (b'{"model": "hf", "tasks": ["t"], "model_args": {"pretrained": "gpt2"}, "output_dir": "/\\ud800"}', 400),
        (b'{"model": "hf", "tasks": ["t"], "model_args": {"pretrained": "gpt2"}, "step": 1%s}' % (b"0" * 30), 422),
        (b'{"model": "hf", "tasks": ["t"], "model_args": {"pretrained": "gpt2"}, "step": -7}', 422),
        (b"[" * 100_000, 422),
        (b" " * (2 << 20), 413),
    ],
)
def test_hostile_bodies_are_refused(serve: Serve, body: bytes, status: int) -> None:
    assert serve()("POST", "/evaluate", body)[0] == status


def test_an_offset_that_is_none_is_refused(serve: Serve, whole: Path) -> None:
    client = serve()
    job_id = client.ended(client.evaluate(whole))["job_id"]
    for offset in ("%C2%B2", "-1", "9" * 5000):
        assert client("GET", f"/jobs/{job_id}/log?offset={offset}")[0] == 422


def test_a_merge_below_a_file_is_refused(serve: Serve, sharded: tuple[Path, dict[str, torch.Tensor]]) -> None:
    client, (path, _) = serve(), sharded
    (path / "file").touch()
    body = {"checkpoint_path": str(path), "output_path": str(path / "file" / "out")}
    assert client("POST", "/merge", body)[0] == 400


@pytest.mark.parametrize("results", ['{"acc": 1%s}' % ("0" * 400), r'{"\ud800": 1}'])
def test_results_beyond_measure_end_their_job_alone(serve: Serve, whole: Path, results: str) -> None:
    client = serve(f"""printf '%s' '{results}' > "$3" """)
    assert client.ended(client.evaluate(whole), 20)["status"] == "failed"
    assert client.ended(client.evaluate(whole), 20)["status"] == "failed"


def test_an_error_of_ours_ends_a_job_and_not_its_slot(
    serve: Serve, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("reshard.evaluate.serve.worker.write_results", fail)
    client = serve()
    for _ in range(2):
        assert "unforeseen" in client.ended(client.evaluate(whole), 20)["error"]


def test_the_watchers_client_understands_the_server(serve: Serve, whole: Path, tmp_path: Path) -> None:
    client = serve()
    output = tmp_path / "root" / "out"
    output.mkdir()
    config = EvalConfig(
        server_url=f"http://127.0.0.1:{client.port}", tasks=("t",), checkpoint_key="pretrained", model="hf"
    )
    backend, request = lmms_eval.make(config), Request(whole, 7, "regular", output, 1)
    job_id = backend.submit(request)
    while (status := backend.poll(request, job_id)).phase in (Phase.QUEUED, Phase.RUNNING):
        time.sleep(0.02)
    assert status.phase is Phase.COMPLETED
    assert [(m.name, m.value) for m in status.metrics] == [("t/acc", 0.7)]
    assert backend.recover(request).phase is Phase.COMPLETED


def test_results_come_over_http_where_no_file_system_is_shared(
    serve: Serve, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    output = tmp_path / "root" / "out"
    output.mkdir()
    url = f"http://127.0.0.1:{client.port}"
    config = EvalConfig(server_url=url, tasks=("t",), checkpoint_key="pretrained", model="hf")
    backend, request = lmms_eval.make(config), Request(whole, 7, "regular", output, 1)
    job_id = backend.submit(request)
    client.ended(job_id)
    own = output / "results.json"  # what the server has written beside it is not seen from here
    monkeypatch.setattr(lmms_results, "results_in", lambda output: [own] if own.exists() else [])
    status = backend.poll(request, job_id)
    assert (status.phase, status.files) == (Phase.COMPLETED, (own,))
    assert [(m.name, m.value) for m in status.metrics] == [("t/acc", 0.7)]


# ---------------------------------------------------------------------------------------------------- what is evaluated


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run with the shards of an FSDP checkpoint."""
    tensors = model()
    checkpoint = tmp_path / "root" / "run" / "checkpoint-10"
    write_dcp(checkpoint / "pytorch_model_fsdp_0", {f"model.{name}": t for name, t in tensors.items()})
    (checkpoint / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    return checkpoint, tensors


KEEP = 'cp "$1/model.safetensors" ../kept.safetensors; printf \'{"acc": 1}\' > "$3"'


@pytest.mark.parametrize("engine", [False, True], ids=["shards", "lmms_engine_kwargs"])
def test_shards_are_merged_first(
    serve: Serve, sharded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, engine: bool
) -> None:
    checkpoint, tensors = sharded
    client = serve(KEEP)
    kwargs = {"model_path": str(checkpoint), "checkpoint_type": "regular", "output_path": None}
    job_id = client.evaluate(checkpoint, **({"lmms_engine_kwargs": kwargs} if engine else {}))
    said = client.ended(job_id)
    assert said["status"] == "completed", said
    assert (said["step"], said["merged_from"]) == (10, str(checkpoint))
    kept = load_file(tmp_path / "root" / "state" / "jobs" / "kept.safetensors")
    assert kept.keys() == {f"model.{name}" for name in tensors}
    assert all(torch.equal(kept[f"model.{name}"], tensor) for name, tensor in tensors.items())
    assert list((tmp_path / "root" / "state" / "merged").iterdir()) == []


def test_averaged_weights_are_merged_where_they_are_asked_for(
    serve: Serve, sharded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    checkpoint, _ = sharded
    averaged = model(seed=7)
    write_dcp(checkpoint / "pytorch_ema_model_fsdp_0", {f"model.{name}": t for name, t in averaged.items()})
    client = serve(KEEP)
    said = client.ended(client.evaluate(checkpoint, checkpoint_type="ema"))
    assert said["status"] == "completed", said
    kept = load_file(tmp_path / "root" / "state" / "jobs" / "kept.safetensors")
    assert all(torch.equal(kept[f"model.{name}"], tensor) for name, tensor in averaged.items())


def test_a_whole_model_is_evaluated_where_it_is_whoever_asks_for_a_merge(serve: Serve, whole: Path) -> None:
    (whole / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    client = serve("echo model $1;" + SCORES)
    said = client.ended(client.evaluate(whole, lmms_engine_kwargs={"model_path": str(whole)}))
    assert (said["status"], said["merged_from"]) == ("completed", "")
    assert client("GET", f"/jobs/{said['job_id']}/log")[1] == f"model {whole}"
    averaged = client.ended(client.evaluate(whole, checkpoint_type="ema"))  # merged by whoever asks
    assert (averaged["status"], averaged["merged_from"]) == ("completed", "")


def test_shards_that_other_ranks_still_write_are_waited_for(
    serve: Serve, sharded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    checkpoint, _ = sharded
    shard = next(iter((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp")))
    shard.rename(tmp_path / "late")
    client = serve(KEEP)
    job_id = client.evaluate(checkpoint)
    time.sleep(0.3)
    assert client("GET", f"/jobs/{job_id}")[1]["status"] == "queued"
    (tmp_path / "late").rename(shard)
    assert client.ended(job_id)["status"] == "completed"


def test_a_merge_is_answered_when_it_is_done(serve: Serve, sharded: tuple[Path, dict[str, torch.Tensor]]) -> None:
    checkpoint, _ = sharded
    client = serve()
    status, said = client("POST", "/merge", {"checkpoint_path": str(checkpoint)})
    assert (status, said["success"]) == (200, True)
    assert (Path(said["merged_path"]) / "model.safetensors").is_file()
    next(iter((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))).unlink()
    assert client("POST", "/merge", {"checkpoint_path": str(checkpoint)})[0] == 404
    assert client("POST", "/merge", {"checkpoint_path": str(checkpoint.parent / "none")})[0] == 400
    assert client("POST", "/merge", {"checkpoint_path": "/etc"})[0] == 403
    assert client("POST", "/merge", {"checkpoint_path": "x", "checkpoint_type": "average"})[0] == 422


def test_nothing_outside_the_roots_is_touched(serve: Serve, whole: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = tmp_path / "root" / "link"
    link.symlink_to(outside)
    client = serve()
    sibling = tmp_path / "root-2"
    sibling.mkdir()
    for body in (
        asked("/etc"),
        asked(outside),
        asked(sibling),
        asked(link),
        asked(f"{tmp_path}/root/../outside"),
        asked("../outside"),
        asked(whole, output_dir=str(link / "out")),
        asked(whole, output_dir="/tmp/elsewhere"),
        asked(whole, model_args={"pretrained": str(whole), "peft": str(outside)}),
        asked(whole, model_args={"pretrained": str(whole), "extra": {"nested": ["/etc/passwd"]}}),
        asked(whole, model_args={"pretrained": str(whole), "url": "file:///etc/passwd"}),
        asked(whole, model_args={"pretrained": str(whole), "trust_remote_code": True}),
        asked(whole, lmms_engine_kwargs={"model_path": str(outside)}),
        asked(whole, lmms_engine_kwargs={"model_path": str(whole), "output_path": str(outside / "x")}),
    ):
        status, said = client("POST", "/evaluate", body)
        assert status == 403, (body, said)
    assert client("GET", "/queue")[1]["queue_size"] == 0
    assert list(outside.iterdir()) == []


def test_what_is_not_there_is_said_before_it_is_queued(serve: Serve, whole: Path) -> None:
    status, said = serve()("POST", "/evaluate", asked(whole.parent / "checkpoint-6"))
    assert status == 400
    assert "checkpoint-6: no such file" in said["detail"]


def test_a_task_that_the_harness_does_not_know_is_named_before_it_is_queued(
    serve: Serve, whole: Path, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'[["mmlu", "arc_easy"], ["hf", "vllm"]]\'\n')
    python.chmod(0o755)
    client = serve(backend="lm_eval", command=(), python=str(python))
    assert client("GET", "/tasks") == (200, {"tasks": ["arc_easy", "mmlu"]})
    assert client("GET", "/models") == (200, {"models": ["hf", "vllm"]})
    status, said = client("POST", "/evaluate", asked(whole, tasks=["mmlu", "mmul"]))
    assert (status, said["detail"]) == (400, "tasks: lm_eval knows no mmul; did you mean mmlu?")
    status, said = client("POST", "/evaluate", asked(whole, tasks=["mmlu"], model="vlm"))
    assert (status, said["detail"]) == (400, "model: lm_eval knows no 'vlm'; did you mean vllm?")


def from_the_trainer(checkpoint: Path, kind: str = "regular") -> dict[str, Any]:
    """What LMMs-Engine's trainer submits after a save, its defaults filled in."""
    engine = {"model_path": str(checkpoint), "checkpoint_type": kind, "output_path": None}
    model_args = {"tensor_parallel_size": 1, "disable_log_stats": True, "gpu_memory_utilization": 0.8}
    return {
        "model": "vllm", "tasks": ["t"], "model_args": {"model": str(checkpoint), **model_args}, "num_fewshot": 0,
        "batch_size": 1, "device": "cuda", "log_samples": True, "predict_only": False, "num_gpus": 1,
        "output_dir": str(checkpoint / "eval"), "lmms_engine_kwargs": engine,
    }  # fmt: skip


def test_what_lmms_engines_trainer_submits_and_reads_is_understood(
    serve: Serve, sharded: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    checkpoint, _ = sharded
    client = serve("sleep 0.2;" + SCORES)
    jobs = []
    for _ in range(2):  # it saves its last step twice, and submits that twice into one directory
        status, said = client("POST", "/evaluate", from_the_trainer(checkpoint))
        assert status == 200, said
        jobs.append(said["job_id"])
    for job in jobs:
        said = client.ended(job)
        assert said["status"] == "completed", said
        ((_, files),) = said["result"].items()  # the trainer opens the file itself
        assert Path(files["results"]).is_relative_to(checkpoint / "eval")
        results = json.loads(Path(files["results"]).read_text())["results"]
        assert results == {"t": {"alias": "t", "acc,none": 0.1}}


def test_a_checkpoint_that_is_removed_while_it_waits_is_not_made_again(
    serve: Serve, sharded: tuple[Path, dict[str, torch.Tensor]], whole: Path, tmp_path: Path
) -> None:
    checkpoint, _ = sharded
    client = serve(f"until [ -e {tmp_path}/go ]; do sleep 0.02; done;" + SCORES)
    first, second = client.evaluate(whole), client("POST", "/evaluate", from_the_trainer(checkpoint))[1]["job_id"]
    shutil.rmtree(checkpoint)
    (tmp_path / "go").touch()
    assert client.ended(first)["status"] == "completed"
    said = client.ended(second)
    assert (said["status"], "was removed before it was evaluated" in said["error"]) == ("failed", True)
    assert not checkpoint.exists()  # its trainer would count it among those that it keeps


# -------------------------------------------------------------------------------------------------------- who is let in


def test_only_who_has_the_token_is_let_in(serve: Serve, whole: Path) -> None:
    client = serve(token="t0k")
    assert client("GET", "/queue")[0] == 200
    basic = base64.b64encode(b"anybody:t0k").decode()
    for header, status in (
        ("Bearer t0k", 200), ("bearer t0k", 200), (f"Basic {basic}", 200), ("Bearer t0", 401), ("Bearer ", 401),
        ("Basic !", 401), ("Digest t0k", 401), ("", 401),
    ):  # fmt: skip
        assert client("GET", "/queue", headers={"Authorization": header})[0] == status, header
    stranger = Client(client.port)
    for method, path in (
        ("GET", "/"),
        ("GET", "/jobs/x"),
        ("POST", "/evaluate"),
        ("DELETE", "/jobs/x"),
        ("GET", "/tasks"),
    ):
        assert stranger(method, path)[0] == 401, path
    assert stranger("GET", "/health")[0] == 200


def test_clients_take_the_token_from_the_address(serve: Serve, whole: Path, tmp_path: Path) -> None:
    client = serve(token="t0k")
    url = f"http://:t0k@127.0.0.1:{client.port}"
    backend = lmms_eval.make(EvalConfig(server_url=url, tasks=("t",), checkpoint_key="pretrained", model="hf"))
    output = tmp_path / "root" / "out"
    output.mkdir()
    assert client.ended(backend.submit(Request(whole, 7, "regular", output, 1)))["status"] == "completed"
    with pytest.raises(Refused) as error:
        backend.submit(Request(Path("/etc"), 7, "regular", output, 1))
    assert "t0k" not in str(error.value)
    (whole / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    submitter = Submitter(url, ["t"], poll_interval=0.05)
    submitter.submit(whole, 5)
    assert submitter.drain(30) == []
    assert [result.metrics for result in submitter.results()] == [{"t/acc": 0.5}]


def test_without_a_token_only_this_machines_own_programs_are_answered(serve: Serve, whole: Path) -> None:
    client = serve()
    assert client("GET", "/queue", headers={"Host": "evil.example"})[0] == 403
    assert client("GET", "/queue", headers={"Host": "localhost:80"})[0] == 200
    form = {"Content-Type": "text/plain"}
    assert client("POST", "/evaluate", json.dumps(asked(whole)).encode(), headers=form)[0] == 415


def test_an_address_that_others_reach_wants_a_token(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wants a token"):
        ServeSettings(host="0.0.0.0", roots=(tmp_path,), state=tmp_path)
    ServeSettings(host="0.0.0.0", token="t0k", roots=(tmp_path,), state=tmp_path)


# ---------------------------------------------------------------------------------------------------------------- slots


def test_a_running_job_can_be_cancelled_with_all_that_it_started(serve: Serve, whole: Path, tmp_path: Path) -> None:
    client = serve(f"sleep 100 & echo $! > {tmp_path}/pid; sleep 100")
    job_id = client.evaluate(whole)
    wait_for(tmp_path / "pid")
    assert client("DELETE", f"/jobs/{job_id}")[0] == 200
    said = client.ended(job_id)
    assert (said["status"], said["error"]) == ("cancelled", "it was cancelled while it ran")
    pid = int((tmp_path / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rpartition(") ")[2][0] == "Z"


def test_a_cancellation_that_meets_a_job_at_its_very_end_is_kept(
    serve: Serve, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, write = list[Answer](), worker.write_results

    def cancelled(job: Job, *rest: Any) -> Path:
        answers.append(client("DELETE", f"/jobs/{job.fingerprint}"))
        return write(job, *rest)

    monkeypatch.setattr(worker, "write_results", cancelled)
    client = serve()
    job_id = client.evaluate(whole)
    said = client.ended(job_id)
    assert answers == [(200, {"message": f"Job {job_id} cancelled"})]
    assert (said["status"], said["error"], said["metrics"]) == ("cancelled", "it was cancelled as it ended", [])
    assert client("DELETE", f"/jobs/{job_id}")[0] == 400


def test_a_job_that_takes_too_long_is_ended(serve: Serve, whole: Path) -> None:
    client = serve("sleep 100", timeout_s=50)
    said = client.ended(client.evaluate(whole, timeout=0.3))
    assert (said["status"], said["error"]) == ("failed", "it took longer than 0.3 s")


def test_a_failure_says_the_last_lines(serve: Serve, whole: Path) -> None:
    client = serve("echo out of memory >&2; exit 3")
    job_id = client.evaluate(whole)
    assert client.ended(job_id)["error"] == "exit status 3: out of memory"
    assert client("GET", f"/jobs/{job_id}/log")[1] == "out of memory"
    assert client("GET", f"/jobs/{job_id}/log?offset=7")[1] == "memory\n"
    assert client("GET", f"/jobs/{job_id}/results")[0] == 409


def test_slots_have_their_own_devices(serve: Serve, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    client = serve('echo $CUDA_VISIBLE_DEVICES; sleep 0.4; printf \'{"a": 1}\' > "$3"', slots=2)
    jobs = [client.evaluate(whole) for _ in range(4)]
    seen = Counter(client("GET", f"/jobs/{client.ended(job)['job_id']}/log")[1] for job in jobs)
    assert seen == {"4,5": 2, "6,7": 2}
    assert client("POST", "/evaluate", asked(whole, num_gpus=3))[0] == 400


@pytest.mark.parametrize(
    "visible, slots, devices",
    [
        ("0,1,2,3", 4, ["0", "1", "2", "3"]),
        ("0,1", 3, ["0", "1", "0"]),
        ("0,1,2", 2, ["0", "1"]),
        ("", 2, [None, None]),
    ],
)
def test_devices_are_dealt_out(monkeypatch: pytest.MonkeyPatch, visible: str, slots: int, devices: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices_of_slots(slots) == devices


def test_a_server_that_is_stopped_begins_again_with_what_ran(serve: Serve, whole: Path, tmp_path: Path) -> None:
    script = f'echo x >> {tmp_path}/began; [ -e {tmp_path}/go ] || sleep 100; printf \'{{"a": 1}}\' > "$3"'
    program = [sys.executable, "-c", CHILD, str(tmp_path), json.dumps(shell(script))]
    first, client = started(program)
    job_id = client.evaluate(whole)
    wait_for(tmp_path / "began")
    first.terminate()
    first.communicate(timeout=30)
    (tmp_path / "go").touch()
    second, client = started(program)
    try:
        assert client.ended(job_id)["status"] == "completed"
    finally:
        second.kill()
        second.communicate()
    assert (tmp_path / "began").read_text() == "x\nx\n"
    assert [path.name for path in (tmp_path / "root" / "state" / "jobs").iterdir()] == [f"{job_id}-2"]


CHILD = """
import json, sys
from pathlib import Path
import uvicorn
from reshard.evaluate.serve.app import make_app
from reshard.evaluate.serve.settings import ServeSettings
root = Path(sys.argv[1]) / "root"
settings = ServeSettings(
    backend="command", command=tuple(json.loads(sys.argv[2])), roots=(root,), state=root / "state", slots=3
)
server = uvicorn.Server(uvicorn.Config(make_app(settings), port=0, log_level="error", ws="none"))
started = server.startup
async def startup(sockets=None):
    await started(sockets)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
server.startup = startup
server.run()
"""


def started(program: list[str]) -> tuple[subprocess.Popen[str], Client]:
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Client(int(process.stdout.readline()))


@pytest.mark.slow
def test_a_server_that_is_killed_at_any_moment_ends_every_job_once(whole: Path, tmp_path: Path) -> None:
    script = f'sleep 0.05; echo "$3" >> {tmp_path}/tally; printf \'{{"a": 1}}\' > "$3"'
    program = [sys.executable, "-c", CHILD, str(tmp_path), json.dumps(shell(script))]
    chance, jobs = random.Random(3), list[str]()
    for _ in range(50):
        process, client = started(program)
        jobs += [client.evaluate(whole) for _ in range(chance.randint(1, 6))]
        time.sleep(chance.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
    process, client = started(program)
    try:
        ends = [client.ended(job) for job in jobs]
    finally:
        process.kill()
        process.communicate()
    assert {end["status"] for end in ends} == {"completed"}
    began = Counter(Path(line).parent.name.rpartition("-")[0] for line in (tmp_path / "tally").read_text().split())
    assert began == Counter(jobs)


@pytest.mark.slow
def test_a_thousand_jobs_and_fifty_pollers(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = [sys.executable, "-c", CHILD, str(tmp_path), json.dumps(shell('printf \'{"a": 1}\' > "$3"'))]
    process, client = started(program)
    jobs, times, done = [client.evaluate(whole)], list[float](), threading.Event()

    def poll(seed: int) -> None:
        chance = random.Random(seed)
        while not done.is_set():
            began = time.perf_counter()
            assert client("GET", f"/jobs/{chance.choice(jobs)}")[0] == 200
            times.append(time.perf_counter() - began)
            time.sleep(chance.uniform(0.5, 1.5))

    pollers = [threading.Thread(target=poll, args=(seed,)) for seed in range(50)]
    for poller in pollers:
        poller.start()
    jobs += [client.evaluate(whole) for _ in range(999)]
    while (queue := client("GET", "/queue")[1])["queue_size"] or queue["running_jobs"]:
        time.sleep(0.5)
    done.set()
    for poller in pollers:
        poller.join()
    process.kill()
    process.communicate()
    assert queue["completed_jobs"] == 1000
    median, p99 = sorted(times)[len(times) // 2], sorted(times)[int(len(times) * 0.99)]
    with capsys.disabled():
        sys.stdout.write(f"\n{len(times)} polls, median {median * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms\n")
    assert len(times) > 50


# ---------------------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("when", ["queued", "begun", "ended"])
def test_a_queue_that_cannot_be_written_is_waited_for(
    serve: Serve, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    full = threading.Event()
    name = {"queued": "add", "begun": "begin_attempt", "ended": "end_attempt"}[when]
    real = getattr(Store, name)

    def write(store: Store, *arguments: Any, **columns: Any) -> Any:
        if full.is_set():
            write_too_much(store)
        return real(store, *arguments, **columns)

    monkeypatch.setattr(Store, name, write)
    monkeypatch.setattr(worker, "_IDLE_S", 0.05)
    client = serve(f"echo x >> {tmp_path}/tally;" + SCORES)
    full.set()
    if when == "queued":
        status, said = client("POST", "/evaluate", asked(whole))
        assert (status, "the disk is full" in said["detail"]) == (503, True)
        assert client("GET", "/queue")[1]["queue_size"] == 0
    else:
        job_id = client.evaluate(whole)
        time.sleep(0.5)
        assert client("GET", f"/jobs/{job_id}")[1]["status"] in ("queued", "running")
    assert client("GET", "/health")[0] == 200
    full.clear()
    assert client.ended(client.evaluate(whole) if when == "queued" else job_id)["status"] == "completed"
    assert (tmp_path / "tally").read_text() == "x\n"


def write_too_much(store: Store) -> None:
    """Have SQLite find that there is no room, in a transaction that it then ends itself."""
    with store.transaction() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        try:
            connection.execute("INSERT INTO meta VALUES ('much', zeroblob(10000000))")
        finally:
            connection.execute("PRAGMA max_page_count = 1000000")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """20 MB that can be filled, inside the root."""
    path = tmp_path / "root" / "disk"
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount, and not everywhere")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with (disk / "ballast").open("ab", buffering=0) as file, suppress(OSError):
        for nbytes in (1 << 16, 1 << 12):
            while file.write(bytes(nbytes)) == nbytes:
                pass


def test_a_server_outlives_a_full_disk(
    small_disk: Path, serve: Serve, sharded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Queue, outputs and logs are on it: whatever cannot be written, nothing is lost or taken for a success."""
    checkpoint, _ = sharded
    script = f"touch {tmp_path}/began; until [ -e {tmp_path}/go ]; do sleep 0.02; done;" + SCORES
    client = serve(script, state=small_disk / "state", slots=2)
    first = client.evaluate(checkpoint)
    wait_for(tmp_path / "began")
    fill(small_disk)
    (tmp_path / "go").touch()
    refused = client("POST", "/evaluate", asked(checkpoint))
    status, said = client("POST", "/merge", {"checkpoint_path": str(checkpoint)})
    assert status in (500, 503, 507), said
    time.sleep(1)
    assert client("GET", "/health")[0] == 200
    assert client("GET", f"/jobs/{first}")[1]["status"] != "completed"  # its results did not fit
    (small_disk / "ballast").unlink()
    if refused[0] == 200:  # there was room for one more row
        assert client.ended(refused[1]["job_id"])["status"] in ("completed", "failed")
    else:
        assert refused[0] == 503
    assert client.ended(first)["status"] == "failed"
    assert client.ended(client.evaluate(checkpoint))["status"] == "completed"


def test_a_merge_that_does_not_fit_ends_its_job_with_that_reason(
    small_disk: Path, serve: Serve, tmp_path: Path
) -> None:
    client = serve(state=small_disk / "state")
    for step, size in ((3, 6 << 20), (4, 1 << 10)):
        checkpoint = tmp_path / "root" / "run" / f"checkpoint-{step}"
        write_dcp(checkpoint / "pytorch_model_fsdp_0", {"model.weight": torch.zeros(size)})
        (checkpoint / "config.json").write_text('{"model_type": "llama"}')
        said = client.ended(client.evaluate(checkpoint))
        assert said["status"] == ("failed" if step == 3 else "completed"), said
        assert (said["error"] is None) or "bytes to write" in said["error"]


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_shows_plots_and_escapes_everything(serve: Serve, tmp_path: Path) -> None:
    evil = tmp_path / "root" / "<script>alert(1)<"
    for step in (5, 7):
        (evil / f"checkpoint-{step}").mkdir(parents=True)
    client = serve('echo "<img src=x onerror=alert(2)>";' + SCORES.replace('"t"', '"<b>t"'))
    for step in (5, 7):
        assert client.ended(client.evaluate(evil / f"checkpoint-{step}"))["status"] == "completed"
    status, html = client("GET", "/")
    assert status == 200
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "<b>t" not in html
    assert html.count("<circle") == 2
    assert "&lt;b&gt;t/acc" in html
    assert client("GET", "/?part=main")[1] in html


def test_the_page_of_very_many_jobs_is_made_from_few(
    serve: Serve, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(f"until [ -e {tmp_path}/go ]; do sleep 0.02; done;" + SCORES)
    payload = {
        "request": {"tasks": ["t"]}, "source": "", "model": "m", "output_dir": None,
        "metrics": [{"task": "t", "metric": "acc", "filter": "none", "value": 0.5}],
    }  # fmt: skip
    with Store(tmp_path / "root" / "state" / "queue.sqlite") as store, store.transaction():
        for number in range(2000):
            store.add(New(Key("run", number, "regular", f"id-{number}"), State.DONE, payload=payload))
    running = client.evaluate(whole)
    waiting = [client.evaluate(whole) for _ in range(2 * page.MOST_WAITING)]
    while client("GET", f"/jobs/{running}")[1]["status"] != "running":
        time.sleep(0.02)
    monkeypatch.setattr(Store, "jobs", None)  # which gives all of them
    html = client("GET", "/")[1]
    assert html.count("<circle") == page.MOST_MEASURED
    assert "2000 completed; the plots are of the newest 500" in html
    shown = re.findall(r'id="job-([^"]+)"', html)
    assert shown[0] == running
    assert shown[1 : page.MOST_WAITING + 1] == waiting[: page.MOST_WAITING - 1 : -1]
    ended = shown[page.MOST_WAITING + 1 :]
    while link := re.search(r'href="(\?before=[0-9]+)"', html):
        html = client("GET", f"/{link[1]}")[1]
        ended += re.findall(r'id="job-([^"]+)"', html)
    assert ended == [f"id-{number}" for number in reversed(range(2000))]
    assert client("GET", "/?before=x")[0] == 422
    (tmp_path / "go").touch()


def test_a_plot_leaves_out_what_is_no_number() -> None:
    drawn = plot("m", {"regular": [(1, 0.5), (2, float("nan")), (3, 0.7)]})
    assert drawn.count("<circle") == 2
    assert "nan" not in drawn
    assert "no numbers" in plot("m", {"regular": [(1, float("nan"))]})
    assert plot("m", {"regular": [(1, 2.0)]}).count("<circle") == 1


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page_and_it_follows_the_jobs(serve: Serve, whole: Path, tmp_path: Path) -> None:
    client = serve("echo working hard; sleep 3;" + SCORES)
    first = client.evaluate(whole)
    arguments = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--timeout=15000",
        f"--user-data-dir={tmp_path}/profile",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{client.port}/"
    dom = subprocess.run(
        [*arguments, "--virtual-time-budget=9000", "--dump-dom", url], capture_output=True, text=True, timeout=120
    ).stdout
    assert "working hard" in dom  # the page's own script ran: the policy lets it, and nothing else
    client.ended(first)
    shot = tmp_path / "page.png"
    subprocess.run([*arguments, f"--screenshot={shot}", url], capture_output=True, timeout=120, check=True)
    assert shot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert shot.stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_line_starts_it(whole: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "reshard", "serve", "--command", "true {model}", "--root", str(tmp_path / "root")]
    server = subprocess.Popen([*words, "--port", str(port)], stderr=subprocess.PIPE, text=True)
    assert server.stderr
    assert f"http://127.0.0.1:{port}/ evaluates with command" in server.stderr.readline()
    client, until = Client(port), time.monotonic() + 60
    while True:
        try:
            assert client("GET", "/health")[0] == 200
            break
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert (tmp_path / "root" / ".reshard-serve" / "queue.sqlite").is_file()
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) in (0, -signal.SIGTERM)
    server.stderr.close()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--host", "0.0.0.0"], "wants a token"),
        (["--root", "/no/such"], "no such directory"),
        (["--command", "x {modle}"], "{modle} is not known"),
        (["--backend", "command"], "go together"),
        (["--slots", "0"], "1 to 256"),
        (["--slots", "100000"], "1 to 256"),
    ],
)
def test_settings_that_cannot_be_are_told(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from reshard.cli.main import main

    assert main(["serve", *words]) == 1
    assert said in capsys.readouterr().err
