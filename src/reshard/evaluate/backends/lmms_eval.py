"""A server of lmms-eval's protocol: lmms-eval's own, as it really behaves, or `reshard serve`.

    POST /evaluate -> job_id;   GET /jobs/ID -> queued, running, completed, failed, cancelled;   DELETE /jobs/ID

What its answers are worth, with lmms-eval 0.7.3:

* it keeps its jobs in memory: after a restart all are 404, while the process of one may go on and leave results
* `completed` says that there is a results file, not that it is of this job: see `lmms_results.py`
* `device` of a request is not looked at, a comma in a path ends it: see `harness.py`
* a job that runs cannot be cancelled
* results are paths on the server's file system; `reshard serve` gives their contents too
* listing its tasks takes it 20 s, in which it answers nobody
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

from reshard.errors import InputError
from reshard.evaluate.backend import Phase, Refused, Request, Status, Unavailable
from reshard.evaluate.backends.harness import lmms_model_args, model_named_in, settled
from reshard.evaluate.backends.http import Answer, Server, server_at, token_of
from reshard.evaluate.backends.lmms_results import Expected, Found, found_in
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.metrics import read_document
from reshard.evaluate.said import plain

_ASK_S = 20.0
_TASKS_S = 60.0
_ORPHAN_S = 900.0
"""How long the log of a process that nobody knows has to be quiet before it counts as ended."""
_SENT = "request.json"
_RESULTS = "results.json"
_PHASES = {"queued": Phase.QUEUED, "running": Phase.RUNNING}


def make(config: EvalConfig) -> LmmsServer:
    """The backend of `backend: lmms_eval`."""
    return LmmsServer(settled(config), server_at(config.server_url, token_of(config.server_token)))


class LmmsServer:
    """A client of an evaluation server."""

    def __init__(self, config: EvalConfig, server: Server, *, ask_s: float = _ASK_S, tasks_s: float = _TASKS_S) -> None:
        self._config = config
        self._server = server
        self._ask_s = ask_s
        self._tasks_s = tasks_s

    def check(self, tasks: Sequence[str]) -> Sequence[str]:
        self._ask("GET", "/health")
        try:
            answer = self._server.ask("GET", "/tasks", timeout_s=self._tasks_s)
        except Unavailable:  # alive, and too slow to tell
            return ()
        known = answer.document.get("tasks") if isinstance(answer.document, Mapping) else None
        if answer.status != 200 or not isinstance(known, list) or not known:
            return ()
        return [task for task in tasks if not any(fnmatchcase(str(name), task) for name in known)]

    # -------------------------------------------------------------------------------------------------------- a job

    def submit(self, request: Request) -> str:
        body = self._body(request)
        sent = {"sent_at": time.time(), "url": self._server.url, "body": body}
        (request.output / _SENT).write_text(json.dumps(sent, indent=2))
        answer = self._ask("POST", "/evaluate", body)
        job_id = answer.document.get("job_id") if isinstance(answer.document, Mapping) else None
        if answer.status in (200, 201, 202) and isinstance(job_id, str) and job_id:
            return job_id
        if answer.status in (408, 425, 429) or answer.status >= 500:
            raise Unavailable(f"{self._server.url}: {answer.status}: {answer.detail}")
        raise Refused(f"{self._server.url} refuses it: {answer.status}: {answer.detail}", hint=_hint(answer.status))

    def poll(self, request: Request, job_id: str) -> Status:
        try:
            answer = self._ask("GET", f"/jobs/{quote(job_id, safe='')}")
        except Unavailable as error:
            return Status(Phase.UNKNOWN, str(error))
        if answer.status == 404:
            return Status(Phase.MISSING, f"{self._server.url} does not know it any more")
        if answer.status != 200 or not isinstance(answer.document, Mapping):
            return Status(Phase.UNKNOWN, f"{self._server.url}: {answer.status}: {answer.detail}")
        if not _is_of(answer.document, request):
            return Status(Phase.MISSING, f"{self._server.url} has another request under this id")
        return self._status(request, job_id, answer.document)

    def cancel(self, request: Request, job_id: str) -> None:
        self._ask("DELETE", f"/jobs/{quote(job_id, safe='')}")

    def recover(self, request: Request) -> Status:
        try:
            return _completed(found_in(request.output, self._expected(request)))
        except InputError:
            pass
        try:
            under_way = self._under_way(request)
        except Unavailable as error:
            return Status(Phase.UNKNOWN, str(error))
        if under_way is not None:
            return under_way
        quiet_s = _quiet_s(request.output)
        if quiet_s < _ORPHAN_S:
            return Status(Phase.UNKNOWN, f"the server forgot it, its process wrote something {quiet_s:.0f} s ago")
        return Status(Phase.MISSING, "the server does not know it, and there are no results")

    # ------------------------------------------------------------------------------------------------------ requests

    def _body(self, request: Request) -> dict[str, Any]:
        config = self._config
        body = {
            "model": config.model, "tasks": list(config.tasks),
            "model_args": lmms_model_args(config, str(request.model)), "num_fewshot": config.num_fewshot,
            "batch_size": config.batch_size, "device": config.device, "limit": config.limit,
            "gen_kwargs": config.gen_kwargs, "log_samples": config.log_samples, "predict_only": config.predict_only,
            "num_gpus": config.num_gpus, "output_dir": str(request.output), "step": request.step,
            "checkpoint_type": request.kind,
        }  # fmt: skip
        return {name: value for name, value in (body | dict(config.extra_kwargs)).items() if value is not None}

    def _expected(self, request: Request) -> Expected:
        """What results have to be of; since when says the request as it was sent."""
        model = model_named_in({**self._config.model_args, self._config.checkpoint_key: str(request.model)})
        try:
            since = float(read_document(request.output / _SENT)["sent_at"])
        except (InputError, KeyError, TypeError, ValueError):
            since = 0.0
        return Expected(model or str(request.model), self._config.limit, since, self._config.predict_only)

    def _ask(self, method: str, path: str, body: Any = None) -> Answer:
        return self._server.ask(method, path, body, timeout_s=self._ask_s)

    # ------------------------------------------------------------------------------------------------------- answers

    def _status(self, request: Request, job_id: str, said: Mapping[str, Any]) -> Status:
        match said.get("status"):
            case "queued" | "running" as phase:
                return Status(_PHASES[phase], job_id=job_id)
            case "failed":
                return Status(Phase.FAILED, plain(str(said.get("error") or "it says no reason"), 12))
            case "cancelled":
                return Status(Phase.CANCELLED, str(said.get("error") or "it was cancelled at the server"))
            case "completed":
                return self._results(request, job_id)
        return Status(Phase.UNKNOWN, f"the server says {said.get('status')!r}")

    def _results(self, request: Request, job_id: str) -> Status:
        """Of a job that completed: what is in the output directory, or what the server shows."""
        expected = self._expected(request)
        try:
            return _completed(found_in(request.output, expected))
        except InputError as error:
            reason = f"the server says completed; {error}"
        try:
            answer = self._ask("GET", f"/jobs/{quote(job_id, safe='')}/results")
        except Unavailable as error:
            return Status(Phase.UNKNOWN, str(error))
        if answer.status != 200 or not isinstance(answer.document, Mapping):
            return Status(Phase.FAILED, reason)
        (request.output / _RESULTS).write_text(json.dumps(answer.document))
        try:
            return _completed(found_in(request.output, expected))
        except InputError as error:
            return Status(Phase.FAILED, f"the server says completed; {error}")

    def _under_way(self, request: Request) -> Status | None:
        """The job with this request's output directory, if the server has it in its queue."""
        queue = self._ask("GET", "/queue").document
        if not isinstance(queue, Mapping):
            raise Unavailable(f"{self._server.url}/queue: {queue!r:.200}")
        running = queue.get("running_jobs") or [queue.get("running_job")]
        for job_id in [*running, *(queue.get("queued_jobs") or ())]:
            if not isinstance(job_id, str):
                continue
            answer = self._ask("GET", f"/jobs/{quote(job_id, safe='')}")
            if answer.status == 200 and isinstance(answer.document, Mapping) and _is_of(answer.document, request):
                return self._status(request, job_id, answer.document)
        return None


def _is_of(said: Mapping[str, Any], request: Request) -> bool:
    asked = said.get("request")
    return isinstance(asked, Mapping) and asked.get("output_dir") == str(request.output)


def _completed(found: Found) -> Status:
    return Status(Phase.COMPLETED, metrics=found.metrics, files=found.files)


def _quiet_s(output: Path) -> float:
    """For how long a process of lmms-eval's, whose log is in the directory, has said nothing."""
    written = [log.stat().st_mtime for log in output.glob("eval-*.log")]
    return time.time() - max(written) if written else float("inf")


def _hint(status: int) -> str | None:
    match status:
        case 401 | 403:
            return "server_token: $NAME names the variable with the server's token"
        case 404 | 405:
            return "is this an evaluation server? `reshard serve` is one, `python -m lmms_eval.launch_server` another"
    return None
