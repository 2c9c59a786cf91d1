"""The routes. Handlers are plain functions in threads; only what reads a body waits for it.

Without a token the server answers nobody but programs of this machine that mean it: a name other than the loopback's in
`Host` is how a web page of somebody else's would come in.
"""

from __future__ import annotations

import base64
import binascii
import errno
import json
import math
import re
import secrets
import shutil
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from reshard.errors import Incomplete, InputError, NotFound, ReshardError
from reshard.evaluate.backends.catalogue import Catalogue
from reshard.evaluate.metrics import read_document
from reshard.evaluate.records import FINAL, Job, Key, New, State
from reshard.evaluate.said import last_lines, plain
from reshard.evaluate.serve import page
from reshard.evaluate.serve.admission import Admitted, NotAdmitted, admit, existing, harness_of, inside
from reshard.evaluate.serve.protocol import (
    EVALUATE,
    LIMIT_NBYTES,
    MERGE,
    OURS,
    STATUSES,
    Invalid,
    decoded,
    job_info,
    status_of,
)
from reshard.evaluate.serve.settings import LOOPBACK, QUEUE, ServeSettings
from reshard.evaluate.serve.worker import Worker, log_of
from reshard.evaluate.store import Store

_UNDER_WAY = frozenset({State.SUBMITTING, State.RUNNING})
_OPEN_TO_ALL = ("/health",)
_LOG_NBYTES = 256 << 10
_ANY = {"model": "hf", "tasks": ["x"], "model_args": {}, "log_samples": True, "predict_only": False, "num_gpus": 1}


class NumbersAsTheyAre(JSONResponse):
    """JSON in which NaN is null: the protocol's clients are not only Python's."""

    def render(self, content: Any) -> bytes:
        return json.dumps(_finite(content), separators=(",", ":")).encode()


def make_app(settings: ServeSettings) -> Starlette:
    """The server as an application, its queue open and its slots at work for as long as it lives."""
    store = Store(settings.state / QUEUE)
    served = _Served(settings, store, Worker(settings, store))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        served.start()
        try:
            yield
        finally:
            await run_in_threadpool(served.stop)

    routes = [
        Route("/", served.page, methods=["GET"]),
        Route("/health", _threaded(served.health), methods=["GET"]),
        Route("/evaluate", _with_body(served.evaluate), methods=["POST"]),
        Route("/jobs/{id}", _threaded(served.job), methods=["GET"]),
        Route("/jobs/{id}", _threaded(served.cancel), methods=["DELETE"]),
        Route("/jobs/{id}/results", _threaded(served.results), methods=["GET"]),
        Route("/jobs/{id}/log", _threaded(served.log), methods=["GET"]),
        Route("/queue", _threaded(served.queue), methods=["GET"]),
        Route("/tasks", _threaded(served.tasks), methods=["GET"]),
        Route("/models", _threaded(served.models), methods=["GET"]),
        Route("/merge", _with_body(served.merge), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refused, NotAdmitted: _not_admitted, Invalid: _invalid, Exception: _bug}
    handlers[ReshardError] = _unavailable
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.add_middleware(_Doorkeeper, settings=settings)
    return app


class _Served:
    """What the routes do."""

    def __init__(self, settings: ServeSettings, store: Store, worker: Worker) -> None:
        self._settings, self._store, self._worker = settings, store, worker
        self._catalogue: Catalogue | None = None
        self._catalogue_known = threading.Event()
        self._merging = threading.Semaphore(1)

    def start(self) -> None:
        self._worker.start()
        threading.Thread(target=self._ask, name="catalogue", daemon=True).start()

    def stop(self) -> None:
        self._worker.stop()
        self._store.close()

    def _ask(self) -> None:
        """What the harness knows takes as long as importing it; until then no task is refused."""
        try:
            values = dict.fromkeys(EVALUATE) | _ANY
            self._catalogue = harness_of(values, "pretrained", self._settings).catalogue
        finally:
            self._catalogue_known.set()

    # ---------------------------------------------------------------------------------------------------------- jobs

    def evaluate(self, request: HttpRequest, body: bytes) -> Response:
        values = decoded(body, EVALUATE | OURS)
        admitted = admit(values, self._settings, self._catalogue)
        id = str(uuid.uuid4())
        timeout_s = min(values["timeout"] or math.inf, self._settings.timeout_s)
        payload = _payload(values, admitted, timeout_s)
        key = Key(admitted.run, admitted.step, admitted.kind, id)
        job, _ = self._store.add(New(key, State.QUEUED, source=admitted.source or admitted.model, payload=payload))
        self._worker.wake()
        position = self._position(job)
        message = f"Job queued successfully. Position in queue: {position}"
        return _json({"job_id": id, "status": "queued", "position_in_queue": position, "message": message})

    def job(self, request: HttpRequest) -> Response:
        job = self._found(request)
        return _json(job_info(job, self._position(job)))

    def cancel(self, request: HttpRequest) -> Response:
        id = request.path_params["id"]
        cancelled = self._worker.cancel(id)
        if cancelled is None:
            raise HTTPException(404, f"Job {id} not found")
        if not cancelled:
            raise HTTPException(400, "Job already finished or cancelled")
        return _json({"message": f"Job {id} cancelled"})

    def results(self, request: HttpRequest) -> Response:
        job = self._found(request)
        result = job.payload.get("result")
        if not result:
            raise HTTPException(409, f"Job {job.fingerprint} has no results: it is {status_of(job)}")
        path = next(iter(result.values()))["results"]
        try:
            return _json(read_document(Path(path)))
        except InputError as error:
            raise HTTPException(410, str(error)) from error

    def log(self, request: HttpRequest) -> Response:
        """From a byte on, as it is; without one the end, for people."""
        job = self._found(request)
        log = log_of(job)
        offset = request.query_params.get("offset")
        if log is None or not log.is_file():
            return PlainTextResponse("")
        if offset is None:
            return PlainTextResponse(last_lines(log, 200))
        if not re.fullmatch(r"[0-9]{1,18}", offset):
            raise HTTPException(422, f"offset: {offset[:40]!r} is no number of bytes")
        with log.open("rb") as file:
            file.seek(min(int(offset), log.stat().st_size))
            data = file.read(_LOG_NBYTES)
        return Response(
            data, media_type="text/plain; charset=utf-8", headers={"X-Next-Offset": str(int(offset) + len(data))}
        )

    def _found(self, request: HttpRequest) -> Job:
        job = self._store.by_fingerprint(request.path_params["id"])
        if job is None:
            raise HTTPException(404, f"Job {request.path_params['id']} not found")
        return job

    def _position(self, job: Job) -> int:
        return self._store.count({State.QUEUED}, before=job.id) if job.state is State.QUEUED else 0

    # --------------------------------------------------------------------------------------------------- the server

    def health(self, request: HttpRequest) -> Response:
        size = self._store.count({State.QUEUED})
        return _json({"status": "healthy", "timestamp": datetime.now().isoformat(), "queue_size": size})

    def queue(self, request: HttpRequest) -> Response:
        queued, running = self._store.ids({State.QUEUED}), self._store.ids(_UNDER_WAY)
        failed = self._store.count({State.FAILED, State.TIMED_OUT})
        return _json({
            "queue_size": len(queued), "running_job": running[0] if running else None, "running_jobs": running,
            "queued_jobs": queued, "completed_jobs": self._store.count({State.DONE}), "failed_jobs": failed,
        })  # fmt: skip

    def tasks(self, request: HttpRequest) -> Response:
        self._catalogue_known.wait()
        return _json({"tasks": sorted(self._catalogue.tasks) if self._catalogue else []})

    def models(self, request: HttpRequest) -> Response:
        self._catalogue_known.wait()
        return _json({"models": sorted(self._catalogue.models) if self._catalogue else []})

    def merge(self, request: HttpRequest, body: bytes) -> Response:
        """Merge now, one at a time, while the request is held."""
        values = decoded(body, MERGE)
        source = existing(values["checkpoint_path"], self._settings)
        own = self._settings.merged / uuid.uuid4().hex / source.name
        output = inside(values["output_path"] or own, self._settings)
        from reshard.ops.merge import merge

        chosen: dict[str, Any] = (
            {"state_dict_dirname": "pytorch_ema_model_fsdp_0"} if values["checkpoint_type"] == "ema" else {}
        )
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with self._merging:
                merged = merge(source, output, base=self._settings.base, **chosen)
        except Incomplete as error:
            raise HTTPException(404, str(error)) from error
        except (InputError, NotFound) as error:
            raise HTTPException(400, str(error)) from error
        except (FileExistsError, NotADirectoryError) as error:
            raise HTTPException(400, f"output_path: {error.filename} is no directory") from error
        except (ReshardError, OSError) as error:
            shutil.rmtree(own.parent, ignore_errors=True)
            raise HTTPException(507 if _is_of_full_disk(error) else 500, f"Merge failed: {error}") from error
        return _json({
            "success": True, "message": "Checkpoint merged successfully", "merged_path": str(merged.output),
            "notices": merged.notices,
        })  # fmt: skip

    async def page(self, request: HttpRequest) -> Response:
        main = await run_in_threadpool(self._main, _before(request))
        if request.query_params.get("part") == "main":
            return HTMLResponse(main, headers={"Cache-Control": "no-store"})
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self';"
            " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page.page(main, self._settings.backend, nonce), headers=headers)

    def _main(self, before: int | None) -> str:
        """From as many jobs as are shown: there may be very many."""
        counts = {"running": 0, "queued": 0, "completed": 0, "failed": 0, "cancelled": 0}
        for state, number in self._store.counts().items():
            counts[STATUSES.get(state, "failed")] += number
        measured = [job for job in self._store.newest(page.MOST_MEASURED, {State.DONE}) if job.step >= 0]
        jobs = list[Job]()
        if before is None:
            jobs += self._store.newest(page.MOST_JOBS, _UNDER_WAY)
            jobs += self._store.newest(page.MOST_WAITING, {State.QUEUED})
        ended = self._store.newest(page.MOST_JOBS + 1, FINAL, before=before)
        earlier = ended[page.MOST_JOBS - 1].id if len(ended) > page.MOST_JOBS else None
        shown = [page.Shown(job, _end_of(job)) for job in (*jobs, *ended[: page.MOST_JOBS])]
        return page.main_part(counts, measured, shown, earlier)


# -------------------------------------------------------------------------------------------------------- the border


class _Doorkeeper:
    """Lets in who has the token; without one, who calls this machine by the loopback's name."""

    def __init__(self, app: Any, settings: ServeSettings) -> None:
        self._app, self._token = app, settings.token
        self._hosts = {*LOOPBACK, settings.host}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or (refused := self._refusal(HttpRequest(scope))) is None:
            await self._app(scope, receive, send)
        else:
            await refused(scope, receive, send)

    def _refusal(self, request: HttpRequest) -> Response | None:
        if self._token is None:
            if (request.url.hostname or "") in self._hosts:
                return None
            return _json({"detail": f"Host {request.url.hostname!r}: without a token only {LOOPBACK[0]} is"}, 403)
        if request.url.path in _OPEN_TO_ALL or _has_token(request.headers.get("authorization", ""), self._token):
            return None
        detail = "the token is missing or wrong: Authorization: Bearer TOKEN, or http://:TOKEN@host in a URL"
        return _json(
            {"detail": detail}, 401, headers={"WWW-Authenticate": 'Basic realm="reshard serve", charset="UTF-8"'}
        )


def _has_token(header: str, token: str) -> bool:
    """Whether a request has the token: as bearer's, or as the password that browsers and URLs can have."""
    scheme, _, value = header.partition(" ")
    given = value.strip()
    if scheme.lower() == "basic":
        with suppress(binascii.Error, ValueError):
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
    elif scheme.lower() != "bearer":
        return False
    return secrets.compare_digest(given.encode(), token.encode())


def _threaded(handler: Callable[[HttpRequest], Response]) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def endpoint(request: HttpRequest) -> Response:
        return await run_in_threadpool(handler, request)

    return endpoint


def _with_body(handler: Callable[[HttpRequest, bytes], Response]) -> Callable[[HttpRequest], Awaitable[Response]]:
    """With a body of JSON: a form is what a page of somebody else's can send."""

    async def endpoint(request: HttpRequest) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "Content-Type: application/json is expected")
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > LIMIT_NBYTES:
                raise HTTPException(413, f"a request of more than {LIMIT_NBYTES} bytes")
        return await run_in_threadpool(partial(handler, request, bytes(data)))

    return endpoint


async def _refused(request: HttpRequest, error: HTTPException) -> Response:
    return _json({"detail": error.detail}, error.status_code)


async def _not_admitted(request: HttpRequest, error: NotAdmitted) -> Response:
    detail = str(error) if error.hint is None else f"{error}; {error.hint}"
    return _json({"detail": detail}, error.status)


async def _invalid(request: HttpRequest, error: Invalid) -> Response:
    return _json({"detail": error.detail}, 422)


async def _unavailable(request: HttpRequest, error: ReshardError) -> Response:
    """The queue cannot be reached or written now."""
    return _json({"detail": str(error)}, 503)


async def _bug(request: HttpRequest, error: Exception) -> Response:
    return _json({"detail": f"this is a defect of reshard: {type(error).__name__}"}, 500)


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return NumbersAsTheyAre(content, status, headers=dict(headers or {}))


def _payload(values: Mapping[str, Any], admitted: Admitted, timeout_s: float) -> dict[str, Any]:
    """What the queue keeps of a request."""
    return {
        "request": {name: values[name] for name in EVALUATE}, "values": dict(values), "key": admitted.key,
        "model": admitted.model, "source": admitted.source, "merged_to": admitted.merged_to,
        "output_dir": values["output_dir"], "timeout": timeout_s, "queued": time.time(),
    }  # fmt: skip


def _before(request: HttpRequest) -> int | None:
    """The number of a job: a page shows those before it."""
    before = request.query_params.get("before")
    if before is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", before):
        raise HTTPException(422, f"before: {before[:40]!r} is no number of a job")
    return int(before)


def _is_of_full_disk(error: BaseException) -> bool:
    """Whether it is the disk that has to change, not the request."""
    errors = (error, error.__cause__)
    return any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in errors)


def _end_of(job: Job) -> str:
    log = log_of(job)
    return plain(last_lines(log, 14)) if log is not None else ""


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


__all__ = ["make_app"]
