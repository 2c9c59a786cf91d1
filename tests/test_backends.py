"""What evaluates: a server as lmms-eval's really answers, lm_eval for real, and any command.

`data/lmms/server.jsonl` are exchanges with lmms-eval 0.7.3 servers, as they were recorded; `results.json` is a file
that one of them left.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from reshard.errors import InputError
from reshard.evaluate import process
from reshard.evaluate.backend import Phase, Refused, Request, Status, Unavailable
from reshard.evaluate.backends import command, lm_eval, lmms_eval
from reshard.evaluate.backends.catalogue import Catalogue
from reshard.evaluate.backends.http import Server
from reshard.evaluate.backends.lmms_program import LmmsEval
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.said import plain

DATA = Path(__file__).parent / "data" / "lmms"
EXCHANGES = [json.loads(line) for line in (DATA / "server.jsonl").read_text().splitlines()]


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    model = tmp_path / "models" / "qwen2_5_vl_bf16"
    model.mkdir(parents=True)
    output = tmp_path / "out"
    output.mkdir()
    return Request(model, 500, "regular", output, 1)


# ------------------------------------------------------------------------------------------ a server as it was recorded


class Replayed(ThreadingHTTPServer):
    """A server that answers what was recorded, about the request's own paths."""

    daemon_threads = True

    def __init__(self, exchanges: list[dict[str, Any]], output: Path, model: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.waiting = list(exchanges)
        self.asked: list[tuple[str, str, Any]] = []
        sent = next((e["body"] for e in exchanges if e["method"] == "POST" and "model_args" in (e["body"] or {})), {})
        self.ours = {sent.get("output_dir", "\0"): str(output)}
        self.ours[sent.get("model_args", {}).get("pretrained", "\0")] = str(model)
        self.queue: dict[str, Any] = {"queue_size": 0, "running_job": None, "queued_jobs": []}
        self.hangs_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, path: str) -> tuple[int, Any]:
        """The next that was recorded of this route; the last one again and again."""
        same = [e for e in self.waiting if (e["method"], e["path"]) == (method, path)]
        if not same:
            return {"/queue": (200, self.queue), "/health": (200, {"status": "healthy"})}.get(
                path, (404, {"detail": "?"})
            )
        if len(same) > 1:
            self.waiting.remove(same[0])
        text = json.dumps(same[0]["answer"])
        for recorded, ours in self.ours.items():
            text = text.replace(json.dumps(recorded)[1:-1], ours)
        return same[0]["status"], json.loads(text)


class Answers(BaseHTTPRequestHandler):
    server: Replayed

    def do_GET(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.asked.append((self.command, self.path, body))
        time.sleep(self.server.hangs_s)
        status, document = self.server.answer(self.command, self.path)
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # whoever asked has lost patience
            self.close_connection = True


@contextmanager
def replayed(scenario: str, request: Request) -> Iterator[Replayed]:
    with Replayed([e for e in EXCHANGES if e["scenario"] == scenario], request.output, request.model) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def client(url: str, tasks_s: float = 60.0, **settings: Any) -> lmms_eval.LmmsServer:
    chosen = {"limit": 4, "model": "qwen2_5_vl", **settings}
    config = EvalConfig(server_url=url, tasks=("tiny_add",), checkpoint_key="pretrained", **chosen)
    return lmms_eval.LmmsServer(config, Server(url), ask_s=60.0, tasks_s=tasks_s)


def leave_results(request: Request, **changed: Any) -> Path:
    """The results file that a server left, of this request's model, made now."""
    now = (datetime.now(UTC) + timedelta(hours=8)).strftime("%Y%m%d_%H%M%S")
    document = json.loads((DATA / "results.json").read_text())
    limit = changed.pop("limit", 4.0)
    document |= {"model_name": str(request.model), "date": now, **changed}
    document["config"]["limit"] = limit
    path = request.output / "base__qwen2_5_vl_bf16" / "20261120_124308_results.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def followed(backend: lmms_eval.LmmsServer, request: Request) -> Status:
    job_id = backend.submit(request)
    while (status := backend.poll(request, job_id)).phase in (Phase.QUEUED, Phase.RUNNING):
        pass
    return status


def test_a_job_that_completes_gives_its_metrics(request_: Request) -> None:
    with replayed("completed", request_) as server:
        backend = client(server.url)
        job_id = backend.submit(request_)
        assert backend.poll(request_, job_id).phase is Phase.RUNNING
        results = leave_results(request_)
        status = backend.poll(request_, job_id)
    assert status.phase is Phase.COMPLETED
    assert [(m.name, m.value) for m in status.metrics] == [("tiny_add/tiny_acc", 0.0)]
    assert status.files == (results,)


def test_the_request_has_what_the_server_takes(request_: Request) -> None:
    with replayed("completed", request_) as server:
        client(server.url, device="cpu", model_args={"num_gpus": 8, "batch_size": 256, "min_pixels": 784}).submit(
            request_
        )
        method, path, body = server.asked[0]
    assert (method, path) == ("POST", "/evaluate")
    assert body["model_args"] == {"min_pixels": 784, "pretrained": str(request_.model), "device": "cpu"} | {
        "num_gpus": 8, "batch_size": 256,
    }  # fmt: skip
    assert body["output_dir"] == str(request_.output)


def test_settings_of_the_request_that_stand_among_the_models_are_moved(request_: Request) -> None:
    with replayed("completed", request_) as server:
        config = EvalConfig(
            server_url=server.url,
            tasks=("t",),
            checkpoint_key="pretrained",
            model_args={"num_gpus": 8, "batch_size": 256},
        )
        lmms_eval.make(config).submit(request_)
        body = server.asked[0][2]
    assert (body["num_gpus"], body["batch_size"]) == (8, 256)
    assert body["model_args"] == {"pretrained": str(request_.model)}


def test_an_older_file_behind_completed_is_no_result(request_: Request) -> None:
    leave_results(request_, model_name="/models/of/another/request")
    with replayed("stale", request_) as server:
        status = followed(client(server.url), request_)
    assert status.phase is Phase.FAILED
    assert "it is of /models/of/another/request" in status.reason


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"date": "20200101_000000"}, "results of earlier"),
        ({"limit": 8.0}, "its limit is 8.0, 4 was asked for"),
        ({"results": {}}, "no metric"),
        ({"model_name": None}, "it is of None"),
    ],
)
def test_results_of_another_request_are_refused(request_: Request, changed: dict[str, Any], said: str) -> None:
    with replayed("completed", request_) as server:
        backend = client(server.url)
        backend.submit(request_)
        leave_results(request_, **changed)
        status = followed(backend, request_)
    assert status.phase is Phase.FAILED
    assert said in status.reason


def test_completed_without_a_file_is_a_failure(request_: Request) -> None:
    with replayed("completed", request_) as server:
        status = followed(client(server.url), request_)
    assert status.phase is Phase.FAILED
    assert "holds no results" in status.reason


def test_a_failure_is_told_without_colours(request_: Request) -> None:
    with replayed("failed", request_) as server:
        status = followed(client(server.url), request_)
    assert status.phase is Phase.FAILED
    assert "\x1b" not in status.reason
    assert "produced no parsed results" in status.reason or "Traceback" in status.reason


def test_a_job_that_the_server_cancelled_ends_as_that(request_: Request) -> None:
    with replayed("cancelled", request_) as server:
        assert followed(client(server.url), request_).phase is Phase.CANCELLED


def test_a_running_job_that_the_server_cannot_cancel_is_left(request_: Request) -> None:
    with replayed("failed", request_) as server:
        backend = client(server.url)
        job_id = backend.submit(request_)
        backend.cancel(request_, job_id)
        assert server.asked[-1][:2] == ("DELETE", f"/jobs/{job_id}")


def test_a_job_that_a_restart_forgot_may_be_sent_again(request_: Request) -> None:
    with replayed("restart", request_) as server:
        backend = client(server.url)
        assert followed(backend, request_).phase is Phase.MISSING
        assert backend.recover(request_).phase is Phase.MISSING


def test_the_results_of_a_forgotten_job_are_found(request_: Request) -> None:
    with replayed("killed", request_) as server:
        backend = client(server.url)
        assert followed(backend, request_).phase is Phase.MISSING
        (request_.output / "eval-20261120-044143.log").write_text("loading")
        assert backend.recover(request_).phase is Phase.UNKNOWN  # its process may have outlived the server
        leave_results(request_)
        assert backend.recover(request_).phase is Phase.COMPLETED


def test_a_request_that_was_sent_and_not_answered_is_found_in_the_queue(request_: Request) -> None:
    with replayed("completed", request_) as server:
        backend = client(server.url)
        job_id = backend.submit(request_)
        server.queue["running_job"] = job_id
        status = backend.recover(request_)
    assert (status.phase, status.job_id) == (Phase.RUNNING, job_id)


def test_a_request_that_is_ill_formed_is_refused_with_the_servers_words(request_: Request) -> None:
    with replayed("422", request_) as server, pytest.raises(Refused, match=r"body\.model: Field required"):
        client(server.url).submit(request_)


def test_nobody_at_the_address_is_no_failure_of_the_job(request_: Request) -> None:
    with replayed("health", request_) as server:
        url = server.url
    backend = client(url)
    with pytest.raises(Unavailable, match="refused"):
        backend.submit(request_)
    assert backend.poll(request_, "id").phase is Phase.UNKNOWN
    assert backend.recover(request_).phase is Phase.UNKNOWN


def test_a_server_that_hangs_is_given_up_in_time(request_: Request) -> None:
    with replayed("completed", request_) as server:
        server.hangs_s = 3.0
        backend = lmms_eval.LmmsServer(EvalConfig(server_url=server.url, tasks=("t",)), Server(server.url), ask_s=0.2)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="no answer within"):
            backend.submit(request_)
        assert backend.poll(request_, "id").phase is Phase.UNKNOWN
        assert time.monotonic() - began < 3.0


def test_tasks_are_checked_where_the_server_lists_them_in_time(request_: Request) -> None:
    with replayed("tasks", request_) as server:
        assert client(server.url).check(["tiny_add", "tiny_ad"]) == ["tiny_ad"]


def test_a_server_that_is_slow_to_list_its_tasks_cannot_tell(request_: Request) -> None:
    with replayed("tasks", request_) as server:
        backend = client(server.url, tasks_s=0.2)
        server.hangs_s = 0.5
        assert backend.check(["no_such_task"]) == ()


def test_the_token_goes_along(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVAL_TOKEN", "t0k")
    from reshard.evaluate.backends.http import token_of

    assert token_of("$EVAL_TOKEN") == "t0k"
    with pytest.raises(InputError, match="no variable NOT_THERE"):
        token_of("$NOT_THERE")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"model_args": {"dtype": "float32,peft=/x"}}, "comma"),
        ({"model_args": {"extra": [1, 2]}}, "comma"),
        ({"limit": 0}, "no limit"),
    ],
)
def test_what_lmms_eval_would_misunderstand_is_refused(request_: Request, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        client("http://127.0.0.1:9", **settings).submit(request_)


def test_a_path_with_a_comma_is_refused_before_lmms_eval_cuts_it(tmp_path: Path) -> None:
    request = Request(tmp_path / "a,b", 1, "regular", tmp_path, 1)
    with pytest.raises(Refused, match="a,b"):
        client("http://127.0.0.1:9").submit(request)


def test_a_key_in_which_lmms_eval_finds_no_model_is_refused(request_: Request) -> None:
    config = EvalConfig(tasks=("t",), checkpoint_key="weights")
    with pytest.raises(Refused, match="no model in weights"):
        lmms_eval.make(config).submit(request_)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://host:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="no address"):
        lmms_eval.make(EvalConfig(server_url=url, tasks=("t",)))


def test_the_program_gets_the_options_that_the_server_gives_it(request_: Request) -> None:
    config = EvalConfig(
        tasks=("a", "b"),
        model="qwen2_5_vl",
        checkpoint_key="pretrained",
        limit=4,
        device="cpu",
        num_gpus=2,
        batch_size=1,
    )
    words = LmmsEval(config, python="python").command(request_)
    assert words == [
        "python", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2",
        "-m", "lmms_eval", "--model=qwen2_5_vl", f"--model_args=pretrained={request_.model},device=cpu", "--tasks=a,b",
        f"--output_path={request_.output}", "--batch_size=1", "--limit=4", "--log_samples",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- any command


def ended(backend: command.Program, request: Request, within_s: float = 60.0) -> Status:
    job_id = backend.submit(request)
    until = time.monotonic() + within_s
    while (status := backend.poll(request, job_id)).phase is Phase.RUNNING:
        assert time.monotonic() < until, process.look(request.output)
        time.sleep(0.01)
    return status


def shell(script: str, *words: str) -> command.Program:
    return command.make(EvalConfig(backend="command", command=("/bin/sh", "-c", script, "eval", *words), tasks=("t",)))


def test_a_script_is_found_though_the_command_runs_elsewhere(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_eval.py").write_text("import sys; open(sys.argv[2], 'w').write('{\"acc\": 1}'); print(sys.argv[1])")
    (tmp_path / "gsm8k").mkdir()
    program = command.make(EvalConfig(backend="command", command=f"{sys.executable} my_eval.py gsm8k {{output}}"))
    status = ended(program, request_)
    assert (status.phase, [m.value for m in status.metrics]) == (Phase.COMPLETED, [1.0])
    assert (request_.output / ".process" / "log").read_text() == "gsm8k\n"


def test_a_disk_without_room_for_a_process_is_no_fault_of_the_request(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    program = shell("true {model}")
    with pytest.raises(Unavailable, match="No space left"):
        program.submit(request_)
    assert program.recover(request_).phase is Phase.MISSING


def test_a_command_leaves_metrics_in_the_file_that_it_is_told(request_: Request) -> None:
    status = ended(shell('echo "{\\"acc\\": 0.$2}" > "$1"', "{output}", "{step}"), request_)
    assert status.phase is Phase.COMPLETED
    assert [(m.name, m.value) for m in status.metrics] == [("acc", 0.5)]
    assert status.files[0] == request_.output / "results.json"


@pytest.mark.parametrize(
    "script", ['echo "{\\"a\\": 1}" > "$1/results.json"', 'touch "$1/other"; echo "{\\"a\\": 1}" > "$2"']
)
def test_a_path_below_output_is_beside_the_results(request_: Request, script: str) -> None:
    words = ("{output}/.", "{output}")
    assert ended(shell(script, *words), request_).phase is Phase.COMPLETED


def test_no_shell_looks_at_paths(tmp_path: Path) -> None:
    model = tmp_path / "$(touch pwned); 'x' \"y\""
    request = Request(model, 1, "regular", tmp_path / "out", 1)
    request.output.mkdir()
    program = shlex.join(
        [sys.executable, "-c", "import sys,json; json.dump({'n': len(sys.argv)}, open(sys.argv[2], 'w'))"]
    )
    backend = command.make(EvalConfig(backend="command", command=program + " {model} {output}"))
    assert ended(backend, request).metrics[0].value == 3
    assert not list(tmp_path.rglob("pwned"))


def test_an_exit_status_is_a_failure_with_the_last_lines(request_: Request) -> None:
    status = ended(shell('printf "\\033[31mno such\\033[0m task\\n" >&2; exit 3'), request_)
    assert status.phase is Phase.FAILED
    assert status.reason == "exit status 3: no such task"


@pytest.mark.parametrize(
    "script, said", [("true", "no such file"), ('echo "{" > "$1"', "not JSON"), ('echo "{}" > "$1"', "no metric")]
)
def test_success_without_metrics_is_a_failure(request_: Request, script: str, said: str) -> None:
    status = ended(shell(script, "{output}"), request_)
    assert status.phase is Phase.FAILED
    assert said in status.reason


def test_a_program_that_is_not_there_will_never_be(request_: Request) -> None:
    status = ended(command.make(EvalConfig(backend="command", command="/no/such/program {model}")), request_)
    assert (status.phase, status.permanent) == (Phase.FAILED, True)


@pytest.mark.parametrize("text, said", [("e {modle}", "modle"), ("e '", "quot"), ("", "a command")])
def test_a_command_that_cannot_be_filled_in_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        command.make(EvalConfig(backend="command", command=text))


def test_cancelling_ends_everything_that_was_started(request_: Request) -> None:
    script = f'echo $$ > {request_.output}/one; setsid sh -c "echo \\$\\$ > {request_.output}/two; sleep 60" & sleep 60'
    backend = shell(script)
    job_id = backend.submit(request_)
    until = time.monotonic() + 60
    while not ((request_.output / "two").is_file() and (request_.output / "two").read_text().strip()):
        assert time.monotonic() < until
        time.sleep(0.01)
    backend.cancel(request_, job_id)
    assert backend.poll(request_, job_id).phase is Phase.MISSING
    for name in ("one", "two"):
        assert not is_alive(int((request_.output / name).read_text())), name


def is_alive(pid: int) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX":
                return False
        except OSError:
            return False
        time.sleep(0.02)
    return True


def test_a_process_outlives_whoever_started_it_and_is_found_again(request_: Request) -> None:
    script = 'while ! [ -e go ]; do sleep 0.02; done; echo "{\\"a\\": 1}" > "$1"'
    code = f"""
import os
from pathlib import Path
from reshard.evaluate.backend import Request
from reshard.evaluate.backends import command
from reshard.evaluate.config import EvalConfig
words = ("/bin/sh", "-c", {script!r}, "eval", "{{output}}")
backend = command.make(EvalConfig(backend="command", command=words))
backend.submit(Request(Path("m"), 1, "regular", Path({str(request_.output)!r}), 1))
os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == -signal.SIGKILL
    backend = shell("false")
    assert backend.recover(request_).phase is Phase.RUNNING
    (request_.output / "go").touch()
    until = time.monotonic() + 60
    while (status := backend.recover(request_)).phase is Phase.RUNNING:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert status.phase is Phase.COMPLETED


def test_ranks_of_the_trainer_are_not_handed_on(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "MASTER_ADDR"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("HF_HOME", "/cache")
    assert ended(shell('env > env; echo "{\\"a\\": 1}" > "$1"', "{output}"), request_).phase is Phase.COMPLETED
    names = {line.partition("=")[0] for line in (request_.output / "env").read_text().splitlines()}
    assert "HF_HOME" in names
    assert names.isdisjoint({"RANK", "WORLD_SIZE", "SLURM_PROCID", "MASTER_ADDR"})


def test_a_log_is_told_as_a_terminal_shows_it() -> None:
    assert plain("a\x1b[32mb\x1b[0m\n\n  0%| |\r 50%|x|\r100%|xx|\nend\x07\n") == "ab\n100%|xx|\nend"


# ------------------------------------------------------------------------------------------------------------- lm_eval


def test_lm_eval_gets_paths_that_no_comma_ends(tmp_path: Path) -> None:
    request = Request(tmp_path / "a,b=c", 1, "regular", tmp_path / "out", 1)
    config = EvalConfig(
        backend="lm_eval", tasks=("x", "y"), model="hf", model_args={"dtype": "float32"}, include_path=str(tmp_path),
        device="cpu", limit=2, extra_kwargs={"apply_chat_template": True, "seed": 3},
    )  # fmt: skip
    words = lm_eval.LmEval(config, python="python").command(request)
    assert words == [
        "python", "-m", "lm_eval", "run", "--model=hf",
        "--model_args=" + json.dumps({"dtype": "float32", "pretrained": str(request.model)}), "--tasks=x,y",
        f"--output_path={request.output}", "--device=cpu", "--limit=2", f"--include_path={tmp_path}", "--log_samples",
        "--apply_chat_template", "--seed=3",
    ]  # fmt: skip


def test_a_path_too_long_for_lm_evals_results_is_refused_before_it_evaluates(tmp_path: Path) -> None:
    request = Request(Path("/" + "/".join(["directory"] * 30)), 1, "regular", tmp_path, 1)
    with pytest.raises(Refused, match="too many"):
        lm_eval.make(EvalConfig(backend="lm_eval", tasks=("t",))).submit(request)


def test_unknown_tasks_are_told_where_the_harness_says_what_it_knows() -> None:
    assert Catalogue(frozenset({"mmlu", "arc_easy"})).unknown(["mmlu", "arc_*", "mmul"]) == ["mmul"]
    assert Catalogue().unknown(["anything"]) == []


def test_a_directory_of_tasks_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no such directory"):
        lm_eval.make(EvalConfig(backend="lm_eval", tasks=("t",), include_path="/no/such"))


def test_lm_eval_results_of_another_model_are_refused(request_: Request) -> None:
    place = request_.output / "__models__x"
    place.mkdir()
    (place / "results_2026-11-21T16-34-18.json").write_text(
        json.dumps({"results": {"t": {"acc,none": 0.5}}, "model_name": "/models/x"})
    )
    harness = lm_eval.LmEval(EvalConfig(backend="lm_eval", tasks=("t",)))
    with pytest.raises(InputError, match="it is of /models/x"):
        harness.collect(request_)
