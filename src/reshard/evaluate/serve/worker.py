"""The slots: each takes the oldest job, merges and evaluates it in one process group, and writes down how it ended.

A job is in the file before anything is done for it, and its process says in its output directory that it began and how
it ended. So whoever starts after a kill finds what runs, waits for it in the same slot, and begins the rest.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from reshard.errors import InputError, ReshardError
from reshard.evaluate import process
from reshard.evaluate.backend import Phase, Refused, Request, Status, Unavailable
from reshard.evaluate.backends.program import Program
from reshard.evaluate.lease import RENEW_S, new_owner
from reshard.evaluate.metrics import NO_FILTER, Metric, as_text
from reshard.evaluate.ready import NoSuchWeights, whole
from reshard.evaluate.records import Job, State
from reshard.evaluate.serve.admission import harness_of
from reshard.evaluate.serve.settings import ServeSettings, devices_of_slots
from reshard.evaluate.store import LeaseLost, Store

_MOST_ATTEMPTS = 3
"""Of a job whose process is killed by others, or with the machine."""
_IDLE_S = 2.0
_SAVE_S = 60.0
"""How long a checkpoint may stay incomplete after it was submitted."""
_FIRST_LOOK_S, _LAST_LOOK_S = 0.02, 0.5
_REASON_CHARS = 4000


class Worker:
    """The slots of a server, as threads."""

    def __init__(self, settings: ServeSettings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._owner = new_owner()
        self._devices = devices_of_slots(settings.slots)
        self._work = threading.Condition()
        self._num_added = 0
        self._stopping = threading.Event()
        self._adopting, self._is_begun = threading.Lock(), False
        self._orphans = [deque[Job]() for _ in range(settings.slots)]
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"slot-{slot}", daemon=True)
            for slot in range(settings.slots)
        ]
        self._renewing = threading.Thread(target=self._renew, name="leases", daemon=True)

    def start(self) -> None:
        """Begin, with what a server before us left under way."""
        for thread in (*self._threads, self._renewing):
            thread.start()

    def stop(self) -> None:
        """End what runs, so that it is begun again by the next server."""
        self._stopping.set()
        self.wake()
        for thread in self._threads:
            thread.join()
        with suppress(ReshardError):  # a full disk: whoever comes next sees that our process ended
            self._store.release(self._owner)

    def wake(self) -> None:
        """There is a new job, or one to be cancelled."""
        with self._work:
            self._num_added += 1
            self._work.notify_all()

    def cancel(self, id: str) -> bool | None:
        """Cancel a job: at once when it is queued, else its slot does. False when it ended, None when there is none."""
        with self._store.transaction():
            job = self._store.by_fingerprint(id)
            if job is None or job.is_final:
                return None if job is None else False
            if job.state is State.QUEUED:
                self._store.change(job, state=State.CANCELLED, reason="it was cancelled before it began")
            else:
                self._store.change(job, payload={**job.payload, "cancel": True})
        self.wake()
        return True

    # -------------------------------------------------------------------------------------------------------- threads

    def _renew(self) -> None:
        while not self._stopping.wait(RENEW_S):
            with suppress(ReshardError):
                self._store.renew(self._owner)

    def _serve(self, slot: int) -> None:
        """The life of a slot."""
        while not self._stopping.is_set():
            seen, job = self._num_added, None
            try:
                job = self._next(slot)
                if job is None:
                    self._wait(seen, _IDLE_S)
                else:
                    self._carry_out(job, slot)
            except LeaseLost:  # it was cancelled in between, or another server has it
                continue
            except (ReshardError, OSError):  # the disk is full, or the queue out of reach: what is done is in the file
                self._stopping.wait(_IDLE_S)
                with suppress(ReshardError):
                    self._take_up_again(job, slot)
            except Exception as error:  # what nobody foresaw ends a job, not its slot
                with suppress(ReshardError, OSError):
                    self._defect(job, error)

    def _defect(self, job: Job | None, error: Exception) -> None:
        """End a job over an error of ours."""
        now = None if job is None else self._store.job(job.id)
        if now is None or now.owner != self._owner or now.is_final:
            return
        if now.output:
            process.kill(Path(now.output))
        self._finish(now, Status(Phase.FAILED, f"this is a defect of reshard: {type(error).__name__}: {error}"))

    def _take_up_again(self, job: Job | None, slot: int) -> None:
        """A job that an error interrupted, from where the file says that it is."""
        now = None if job is None else self._store.job(job.id)
        if now is None or now.owner != self._owner:
            return
        if now.state is State.QUEUED:
            self._store.let_go(now, self._owner)
        else:
            self._orphans[slot].append(now)

    def _wait(self, seen: int, seconds: float) -> None:
        """Until somebody wakes us."""
        with self._work:
            if self._num_added == seen:
                self._work.wait(seconds)

    def _next(self, slot: int) -> Job | None:
        self._adopt()
        if self._orphans[slot]:
            return self._orphans[slot].popleft()
        return next(iter(self._store.claim({State.QUEUED}, self._owner)), None)

    def _adopt(self) -> None:
        """Take over what a server before us left under way, once: each job in its slot."""
        with self._adopting:
            if self._is_begun:
                return
            for job in self._store.claim({State.SUBMITTING, State.RUNNING}, self._owner, limit=1 << 30):
                slot = job.payload.get("slot", 0)
                self._orphans[slot % len(self._orphans)].append(job)
            self._is_begun = True

    # ---------------------------------------------------------------------------------------------------------- a job

    def _carry_out(self, job: Job, slot: int) -> None:
        """One attempt at a job, or the rest of one that was under way."""
        if job.state is State.QUEUED:
            if self._is_being_saved(job):
                later = self._store.change(job, self._owner, not_before=time.time() + _IDLE_S)
                return self._store.let_go(later, self._owner)
            job = self._begun(job, slot)
            backend = self._backend(job)
            status = self._submit(backend, job, slot)
        else:
            backend = self._backend(job)
            status = backend.recover(self._request(job, slot))
        if status.phase is Phase.RUNNING:
            if job.state is State.SUBMITTING:
                job = self._store.sent(job, status.job_id or "-", self._owner)
            status = self._follow(backend, job, slot)
        return self._finish(job, status)

    def _is_being_saved(self, job: Job) -> bool:
        """Whether other ranks of the trainer still write: rank 0, which asks, does not wait for them."""
        source = Path(job.payload["source"])
        if not job.payload["source"] or time.time() - job.created > _SAVE_S or not source.is_dir():
            return False
        try:
            whole(source, job.kind, self._settings.base)
        except NoSuchWeights:
            return False
        except InputError:
            return True
        return False

    def _begun(self, job: Job, slot: int) -> Job:
        """A job with one more attempt, in a directory of its own."""
        payload = {**job.payload, "slot": slot, "started": job.payload.get("started") or time.time()}
        job = self._store.change(job, self._owner, payload=payload)
        return self._store.begin_attempt(job, self._output(job, job.attempts + 1), self._owner)

    def _backend(self, job: Job) -> Program:
        """The program of a job: its merge first, where it has one."""
        values = job.payload["values"]
        return Program(harness_of(values, job.payload["key"], self._settings), self._merge_of(job))

    def _merge_of(self, job: Job) -> list[list[str]]:
        source = job.payload["source"]
        if not source:
            return []
        words = [sys.executable, "-m", "reshard", "merge", source, str(self._model_of(job)), "--quiet"]
        words += ["--checkpoint-type", "ema"] if job.kind == "ema" else []
        words += ["--base", self._settings.base] if self._settings.base else []
        return [[*words, "--force"] if job.attempts > 1 else words]

    def _model_of(self, job: Job) -> Path:
        """What is evaluated: a merged model has a directory of its attempt alone, or where the request wants it."""
        payload = job.payload
        if not payload["source"]:
            return Path(payload["model"])
        if payload["merged_to"]:
            return Path(payload["merged_to"])
        return self._own_merged(job) / Path(payload["source"]).name

    def _own_merged(self, job: Job) -> Path:
        return self._settings.merged / f"{job.fingerprint}-{job.attempts}"

    def _request(self, job: Job, slot: int) -> Request:
        devices = self._devices[slot]
        environment = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
        return Request(self._model_of(job), job.step, job.kind, Path(job.output), job.attempts, environment)

    def _submit(self, backend: Program, job: Job, slot: int) -> Status:
        request = self._request(job, slot)
        place = Path(job.payload["source"] or job.payload["model"])
        if place.is_absolute() and not place.exists():  # else an output below it would be a checkpoint for its trainer
            return Status(Phase.FAILED, f"{place} was removed before it was evaluated")
        try:
            request.output.mkdir(parents=True)
            if job.payload["source"] and not job.payload["merged_to"]:
                request.model.parent.mkdir(parents=True)
            return Status(Phase.RUNNING, job_id=backend.submit(request))
        except (Refused, Unavailable, OSError) as error:
            return Status(Phase.FAILED, str(error))

    def _follow(self, backend: Program, job: Job, slot: int) -> Status:
        """Wait for the end of a process, or make it."""
        request, pause = self._request(job, slot), _FIRST_LOOK_S
        deadline = job.began + float(job.payload["timeout"])
        while (status := backend.poll(request, job.job_id)).phase is Phase.RUNNING:
            seen = self._num_added
            if self._stopping.is_set():
                return self._ended(backend, request, job, Phase.MISSING, "the server was stopped")
            if self._is_cancelled(job):
                return self._ended(backend, request, job, Phase.CANCELLED, "it was cancelled while it ran")
            if time.time() > deadline:
                reason = f"it took longer than {job.payload['timeout']:g} s"
                return self._ended(backend, request, job, Phase.UNKNOWN, reason)
            self._wait(seen, pause)
            pause = min(pause * 1.5, _LAST_LOOK_S)
        return status

    def _is_cancelled(self, job: Job) -> bool:
        now = self._store.job(job.id)
        return now is not None and bool(now.payload.get("cancel"))

    def _ended(self, backend: Program, request: Request, job: Job, phase: Phase, reason: str) -> Status:
        """How it is when we ended it: it may have completed just before."""
        backend.cancel(request, job.job_id)
        status = backend.poll(request, job.job_id)
        return status if status.phase is Phase.COMPLETED else Status(phase, reason)

    def _finish(self, job: Job, status: Status) -> None:
        """Write down how it ended, once."""
        if job.payload["source"] and not job.payload["merged_to"]:  # first: of a job that ended nobody looks for it
            shutil.rmtree(self._own_merged(job), ignore_errors=True)
        done = dict[str, Any]()
        if status.phase is Phase.COMPLETED:
            done = self._results(job, status)
            for number in range(1, job.attempts):  # which were killed, or stopped with their server
                shutil.rmtree(self._output(job, number), ignore_errors=True)
        with self._store.transaction():
            now = self._store.job(job.id) or job
            columns, reason = self._ending(now, status, done)
            changed = self._store.end_attempt(job, columns["state"], reason[:_REASON_CHARS], self._owner, **columns)
            self._store.let_go(changed, self._owner)

    def _output(self, job: Job, number: int) -> Path:
        """The directory of one attempt; the id in its name is nobody else's."""
        return Path(job.payload["output_dir"] or self._settings.jobs) / f"{job.fingerprint}-{number}"

    def _ending(self, job: Job, status: Status, done: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """What is written down, and why. A cancellation that was acknowledged holds, whatever the job did meanwhile."""
        if job.payload.get("cancel"):
            is_ours = status.phase is Phase.CANCELLED
            return {"state": State.CANCELLED}, status.reason if is_ours else "it was cancelled as it ended"
        columns: dict[str, Any] = {"state": State.FAILED}
        match status.phase:
            case Phase.COMPLETED:
                columns = {"state": State.DONE, "payload": {**job.payload, **done}}
            case Phase.MISSING if self._stopping.is_set():
                columns = {"state": State.QUEUED}
            case Phase.MISSING if job.failures + 1 < _MOST_ATTEMPTS:
                columns = {"state": State.QUEUED, "failures": job.failures + 1}
            case Phase.UNKNOWN:
                columns = {"state": State.TIMED_OUT}
        return columns, status.reason

    def _results(self, job: Job, status: Status) -> dict[str, Any]:
        """What is kept of a job that completed: its metrics, and where a client finds the rest."""
        results = status.files[0] if status.files else Path(job.output)
        if self._settings.backend == "command":
            results = write_results(job, self._model_of(job), status.metrics)
        name = results.parent.name
        samples = [str(path) for path in status.files[1:] if path.suffix == ".jsonl"]
        metrics = [
            {"task": m.task, "metric": m.metric, "filter": m.filter, "value": as_text(m.value)} for m in status.metrics
        ]
        return {"result": {name: {"results": str(results), "samples": samples}}, "metrics": metrics}


def write_results(job: Job, model: Path, metrics: tuple[Metric, ...]) -> Path:
    """The metrics of a command, as lmms-eval writes its own: what reads those, reads these."""
    values = job.payload["values"]
    results: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        task = metric.task or (values["tasks"][0] if len(values["tasks"]) == 1 else "command")
        results.setdefault(task, {"alias": task})[f"{metric.metric},{metric.filter or NO_FILTER}"] = metric.value
    document = {
        "results": results, "model_name": str(model), "date": time.time(), "step": job.step,
        "config": {"model": values["model"], "model_args": values["model_args"], "limit": values["limit"]},
    }  # fmt: skip
    place = Path(job.output) / "__".join(model.parts[-2:])
    place.mkdir(exist_ok=True)
    path = place / f"{time.strftime('%Y%m%d_%H%M%S', time.localtime(job.began))}_results.json"
    making = place / f".{path.name}"
    try:
        making.write_text(json.dumps(document, indent=2))
        making.rename(path)
    finally:
        making.unlink(missing_ok=True)
    return path


def log_of(job: Job) -> Path | None:
    """Where a job says what it does."""
    return Path(job.output) / ".process" / "log" if job.output else None
