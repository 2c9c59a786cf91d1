"""Have checkpoints evaluated by a server while training goes on. The standard library is all it needs: copy this file.

    from reshard.integrations.submit import drain, results, submit

    submit("output/checkpoint-500", 500)        returns at once; a thread talks to the server
    for result in results(): ...                what has arrived since the last call: step, metrics, error
    drain(600)                                  at the end of training: wait for the rest, ten minutes at most

The server is `reshard serve`, or one of lmms-eval's for checkpoints that need no merging. Where it is and what it shall
evaluate comes from the environment, or from `configure(...)`:

    RESHARD_SERVER   http://127.0.0.1:8000          RESHARD_TOKEN   its token, if it has one
    RESHARD_TASKS    mmmu_val,textvqa_val           RESHARD_MODEL   hf, vllm, qwen2_5_vl, ...

Nothing here raises into the training and nothing waits for the network, `drain` excepted. A server that is away costs
one warning; what was submitted is sent when it is back. With several ranks only rank 0 submits.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

_LOG = logging.getLogger("reshard.submit")
_ANSWER_S = 20.0
_MOST_ATTEMPTS = 3
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0
_MODEL_KEYS = ("pretrained", "model")


@dataclass(frozen=True)
class Result:
    """How an evaluation ended."""

    step: int
    kind: str
    """`regular` or `ema`."""
    path: str
    rows: tuple[tuple[str, str, str, float], ...] = ()
    """(task, metric, filter, value); the filter `none` is none."""
    error: str = ""
    """Why there are no rows."""

    @property
    def metrics(self) -> dict[str, float]:
        """The values by `task/metric`, with `.filter` where there is one."""
        return {_name(task, metric, filter): value for task, metric, filter, value in self.rows}


@dataclass(frozen=True)
class Request:
    """One checkpoint on its way through the server."""

    path: str
    step: int
    kind: str
    job_id: str = ""
    attempts: int = 0


class Submitter:
    """Submits to one server, in a thread of its own that starts with the first checkpoint."""

    def __init__(
        self,
        server_url: str,
        tasks: list[str],
        model: str = "hf",
        model_args: dict[str, Any] | None = None,
        checkpoint_key: str = "pretrained",
        token: str | None = None,
        poll_interval: float = 10.0,
        **request: Any,
    ) -> None:
        """`request` are more fields of the request, such as `limit` or `batch_size`."""
        parts = urlsplit(server_url)  # which may have the token in it: http://:TOKEN@host:8000
        self._url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._token, self._poll_s = token or parts.password, poll_interval
        self._model_args, self._key = dict(model_args or {}), checkpoint_key
        self._request = {"model": model, "tasks": list(tasks), **request}
        json.dumps([self._request, self._model_args])  # what cannot be sent is said here, not in the thread
        self._lock = threading.Condition()
        self._waiting = deque[Request]()
        self._running: list[Request] = []
        self._arrived = deque[Result]()
        self._thread: threading.Thread | None = None
        self._is_away = False

    def submit(self, path: str | os.PathLike[str], step: int, kind: str = "regular") -> None:
        """Have a checkpoint evaluated. Returns at once, whatever the server does."""
        with self._lock:
            self._waiting.append(Request(os.path.abspath(path), int(step), kind))
            self._lock.notify_all()
            if self._thread is None or not self._thread.is_alive():  # a fork has no threads of its parent
                self._thread = threading.Thread(target=self._run, name="reshard-submit", daemon=True)
                self._thread.start()

    def results(self) -> list[Result]:
        """What has arrived since the last call, in the order of its arrival."""
        with self._lock:
            arrived = list(self._arrived)
            self._arrived.clear()
        return arrived

    @property
    def pending(self) -> list[Request]:
        """What has not ended yet."""
        with self._lock:
            return [*self._running, *self._waiting]

    def drain(self, timeout_s: float = 3600.0, away_s: float = 30.0) -> list[Request]:
        """Wait until everything has ended, this long at most; gives what has not.

        A server that does not answer is waited for `away_s` seconds.
        """
        began = answered = time.monotonic()
        with self._lock:
            while (self._waiting or self._running) and (now := time.monotonic()) < began + timeout_s:
                answered = answered if self._is_away else now
                if now > answered + away_s:
                    break
                self._lock.wait(0.1)
        left = self.pending
        if left:
            steps = ", ".join(str(request.step) for request in left)
            _LOG.warning("no results yet when the training ended: of the steps %s", steps)
        return left

    # ----------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            with self._lock:
                if not self._waiting and not self._running:
                    self._lock.wait(self._poll_s)
                    continue
            try:
                self._send_all()
                self._poll_all()
                self._back()
                pause, retry_s = self._poll_s, _FIRST_RETRY_S
            except Exception as error:  # whatever it is, training goes on
                self._away(error)
                pause, retry_s = retry_s, min(2 * retry_s, _LAST_RETRY_S)
            with self._lock:
                if not self._waiting or self._is_away:
                    self._lock.wait(pause)

    def _send_all(self) -> None:
        """Everything that waits, the oldest first; one that the server is not there for stays."""
        while self._waiting:
            request = self._waiting[0]
            status, said = self._ask("POST", "/evaluate", self._body(request))
            with self._lock:
                if status in (200, 201, 202) and isinstance(said, dict) and said.get("job_id"):
                    self._running.append(replace(request, job_id=str(said["job_id"]), attempts=request.attempts + 1))
                elif 400 <= status < 500 and status not in (408, 429):
                    self._end(Result(request.step, request.kind, request.path, error=f"refused: {_detail(said)}"))
                else:
                    raise ConnectionError(f"{status}: {_detail(said)}")
                self._waiting.popleft()
                self._lock.notify_all()

    def _poll_all(self) -> None:
        for request in list(self._running):
            status, said = self._ask("GET", f"/jobs/{request.job_id}")
            if status == 404 and request.attempts < _MOST_ATTEMPTS:  # a server that keeps no queue was started again
                self._leave(request)
                with self._lock:
                    self._waiting.append(request)
            elif status == 404:
                self._end(self._failed(request, "the server forgot it again and again"), request)
            elif status != 200 or not isinstance(said, dict):
                raise ConnectionError(f"{status}: {_detail(said)}")
            elif said.get("status") == "completed":
                self._end(self._completed(request, said), request)
            elif said.get("status") in ("failed", "cancelled"):
                self._end(self._failed(request, str(said.get("error") or said["status"])), request)

    def _body(self, request: Request) -> dict[str, Any]:
        engine = {"model_path": request.path, "checkpoint_type": request.kind, "output_path": None}
        is_sharded = _is_sharded(request.path) or request.kind != "regular"
        return {
            **self._request, "model_args": {**self._model_args, self._key: request.path}, "step": request.step,
            **({"lmms_engine_kwargs": engine} if is_sharded else {}),
        }  # fmt: skip

    def _completed(self, request: Request, said: dict[str, Any]) -> Result:
        rows = said.get("metrics")
        measured = _of_rows(rows) if isinstance(rows, list) else _of_files(said.get("result"))
        if not measured:
            return self._failed(request, "it completed, and its results cannot be read here")
        return Result(request.step, request.kind, request.path, tuple(measured))

    def _failed(self, request: Request, reason: str) -> Result:
        return Result(request.step, request.kind, request.path, error=reason)

    def _end(self, result: Result, request: Request | None = None) -> None:
        if result.error:
            _LOG.warning("the evaluation of step %d failed: %s", result.step, result.error[:500])
        with self._lock:
            self._arrived.append(result)
            if request is not None:
                self._running.remove(request)
            self._lock.notify_all()

    def _leave(self, request: Request) -> None:
        with self._lock:
            self._running.remove(request)

    def _away(self, error: Exception) -> None:
        if not self._is_away:
            _LOG.warning("the evaluation server %s cannot be reached (%s); it is tried again", self._url, error)
        self._is_away = True

    def _back(self) -> None:
        if self._is_away:
            _LOG.info("the evaluation server %s answers again", self._url)
        self._is_away = False

    def _ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        parts = urlsplit(self._url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=_ANSWER_S)
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        data = None if body is None else json.dumps(body)
        try:
            connection.request(
                method, parts.path.rstrip("/") + path, data, {**headers, "Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text[:500].decode(errors="replace")


def _is_sharded(path: str) -> bool:
    """Whether a checkpoint holds no whole model beside its shards."""
    try:
        names = os.listdir(path)
    except OSError:
        return True
    return not any(name.startswith(("model.safetensors", "pytorch_model.bin", "model-0", "adapter_")) for name in names)


def _of_rows(rows: list[Any]) -> list[tuple[str, str, str, float]]:
    """Metrics as `reshard serve` says them."""
    return [
        (row["task"], row["metric"], row["filter"], float("nan" if row["value"] is None else row["value"]))
        for row in rows
    ]


def _of_files(result: Any) -> list[tuple[str, str, str, float]]:
    """Metrics from the files that a server of lmms-eval's names, on a file system that both have."""
    rows = []
    for files in (result or {}).values():
        try:
            with open(files["results"], encoding="utf-8") as file:
                tasks = json.load(file)["results"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for task, values in tasks.items():
            for key, value in values.items():
                metric, comma, filter = key.partition(",")
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if comma and is_number and "_stderr" not in metric:
                    rows.append((task, metric, filter or "none", float(value)))
    return rows


def _name(task: str, metric: str, filter: str) -> str:
    return (f"{task}/" if task else "") + metric + ("" if filter in ("", "none") else f".{filter}")


def _detail(said: Any) -> str:
    return str(said.get("detail", said) if isinstance(said, dict) else said)[:1000]


# ---------------------------------------------------------------------------------------- one for the whole process

_submitter: Submitter | None = None


def configure(server_url: str | None = None, tasks: list[str] | None = None, **settings: Any) -> Submitter:
    """Where to submit from now on; what is not said comes from the environment. `settings` are those of Submitter."""
    global _submitter
    named = os.environ.get("RESHARD_TASKS", "").split(",")
    settings.setdefault("model", os.environ.get("RESHARD_MODEL", "hf"))
    settings.setdefault("token", os.environ.get("RESHARD_TOKEN") or None)
    url = server_url or os.environ.get("RESHARD_SERVER", "http://127.0.0.1:8000")
    _submitter = Submitter(url, tasks or [task.strip() for task in named if task.strip()], **settings)
    return _submitter


def submit(path: str | os.PathLike[str], step: int, kind: str = "regular") -> None:
    """Have a checkpoint evaluated. Returns at once; on ranks other than 0 it does nothing."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        (_submitter or configure()).submit(path, step, kind)
    except Exception as error:  # an address that is none, say: training goes on
        _LOG.warning("step %s is not submitted for evaluation: %s", step, error)


def results() -> list[Result]:
    """What has arrived since the last call."""
    return _submitter.results() if _submitter else []


def drain(timeout_s: float = 3600.0, away_s: float = 30.0) -> list[Request]:
    """Wait until everything has ended, this long at most; gives what has not."""
    return _submitter.drain(timeout_s, away_s) if _submitter else []


__all__ = ["Request", "Result", "Submitter", "configure", "drain", "results", "submit"]
