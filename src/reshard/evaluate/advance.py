"""From a whole checkpoint to its results, one short step at a time.

    READY -> merge -> MERGED -> SUBMITTING -> RUNNING -> MEASURED -> DONE

Each step is written down before it is taken where it has an effect outside: an attempt before it is sent, the place of
a whole model before it is made. Merging goes on in a thread; everything else returns within seconds.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from reshard.errors import InputError, OutputError, ReshardError
from reshard.evaluate import model
from reshard.evaluate.backend import Backend, Phase, Refused, Request, Status, Unavailable
from reshard.evaluate.config import EvalConfig
from reshard.evaluate.database import StoreBusy
from reshard.evaluate.places import Places
from reshard.evaluate.protect import is_intact, release
from reshard.evaluate.records import OPEN, Job, State
from reshard.evaluate.scan import Scanner, brief, called
from reshard.evaluate.store import LeaseLost, Store

_WORK = (State.READY, State.MERGED, State.SUBMITTING, State.RUNNING)
_COUNTS = OPEN - {State.SEEN}
"""States in which a later save of a step displaces an earlier one."""
_MOST_ATTEMPTS = 20
"""However they ended: those that were lost are no failures."""
_SILENCE_S = (2.0, 60.0)
_ENDED = {State.FAILED: "failed", State.TIMED_OUT: "timed out", State.CANCELLED: "was cancelled"}
Say = Callable[[str], None]


class Advancer:
    """Takes the jobs of a run forward, those that this watcher holds."""

    def __init__(
        self,
        places: Places,
        store: Store,
        backend: Backend,
        config: EvalConfig,
        scanner: Scanner,
        run: str,
        owner: str,
        say: Say,
    ) -> None:
        self._places, self._store, self._backend, self._config = places, store, backend, config
        self._scanner, self._run, self._owner, self._say = scanner, run, owner, say
        self._merger = ThreadPoolExecutor(1, "merge")
        self._merging: Future[Callable[[], None]] | None = None
        self._quiet_until, self._silence_s = 0.0, _SILENCE_S[0]
        self.ending = False
        """Whether no more checkpoints are expected: what may pass is then tried as often as what fails."""
        self.answers = True
        """Whether the backend answered when it was asked last."""
        self.changed = threading.Event()
        """Set when there is something to do before the next poll."""

    def tick(self, *, claim: bool = True) -> None:
        """Claim what may be claimed, and take every job that is held one step further."""
        self._finish_merge()
        held = self._store.held_by(self._owner)
        if claim:
            room = self._config.most_running - len(held)
            held += self._store.claim(_WORK, self._owner, limit=max(0, room), run=self._run)
            held += self._claim_again()
        for job in held:
            try:
                self._advance(job)
            except LeaseLost:
                continue
            except Unavailable as error:
                self._fall_silent(error)
            except StoreBusy:
                raise
            except Exception as error:
                self._defect(job, error)

    def stop(self, *, at_once: bool) -> None:
        """Let go of everything; before, unless `at_once`, wait for a merge that is under way."""
        if self._merging is not None and not at_once:
            self._merging.exception()
            self._finish_merge()
        self._merger.shutdown(wait=not at_once, cancel_futures=True)
        self._store.release(self._owner)

    def _advance(self, job: Job) -> None:
        if job.state in _WORK and self._is_displaced(job):
            self._supersede(job)
            return
        match job.state:
            case State.READY:
                self._begin_merge(job)
            case State.MERGED if job.not_before <= time.time():
                self._submit(job)
            case State.SUBMITTING if self._may_ask():
                self._recover(job)
            case State.RUNNING if self._may_ask():
                self._poll(job)

    # ------------------------------------------------------------------------------------------- saved again

    def _claim_again(self) -> list[Job]:
        """Later saves of steps that are being evaluated: what becomes of those depends on their weights."""
        ready = self._store.jobs([State.READY], run=self._run)
        again = [
            job for job in ready if job.owner != self._owner and any(o.id < job.id for o in self._open_siblings(job))
        ]
        return [job for job in again if self._store.take(job, self._owner)]

    def _siblings(self, job: Job) -> list[Job]:
        """Other saves of the same step that were whole."""
        jobs = self._store.jobs(run=job.run, step=job.step)
        return [other for other in jobs if other.kind == job.kind and other.fingerprint and other.id != job.id]

    def _open_siblings(self, job: Job) -> list[Job]:
        return [other for other in self._siblings(job) if other.state in _COUNTS]

    def _newer(self, job: Job) -> list[Job]:
        return [other for other in self._open_siblings(job) if other.id > job.id]

    def _is_displaced(self, job: Job) -> bool:
        """Whether a later save counts instead: one with other weights, or any, before these are merged."""
        return any(not job.digest or other.digest not in ("", job.digest) for other in self._newer(job))

    def _outlived(self, job: Job) -> bool:
        """Whether a later save of the step came to nothing."""
        return any(o.id > job.id and o.is_final for o in self._siblings(job))

    def _supersede(self, job: Job) -> None:
        """A later save of the step is whole: nothing of this one was logged, and nothing will be."""
        if self._merging is not None and job.state == State.READY:
            return  # its thread will find that out
        if job.state in (State.RUNNING, State.SUBMITTING):
            self._cancel(job)
        reason = "the step was saved again before its results were logged"
        self._end(job, State.SUPERSEDED, reason)
        self._say(f"{called(job)}: {reason}; the last save is evaluated")

    def _cancel(self, job: Job) -> None:
        try:
            self._backend.cancel(self._request(job), job.job_id)
        except (Unavailable, Refused) as error:
            self._say(f"{called(job)}: could not be cancelled: {error}")

    def _settled_by_sibling(self, job: Job) -> bool:
        """Whether an earlier save of the step decides what becomes of this one, which is merged."""
        for other in self._siblings(job):
            is_logged = other.state in (State.DONE, State.MEASURED)
            is_earlier = other.state in _COUNTS and other.id < job.id
            if (is_logged or is_earlier) and other.digest == job.digest:
                self._end_again(job, State.SAME, "the same weights")
                return True
            if is_logged:
                self._end_again(job, State.REWRITTEN, "other weights after its results had been logged, which stand")
                return True
            if is_earlier:
                self._displace(other)
                return True  # for now
        return False

    def _end_again(self, job: Job, state: State, what: str) -> None:
        self._end(job, state, f"the step was saved again with {what}")
        self._say(f"{called(job)} was saved again with {what}")

    def _displace(self, job: Job) -> None:
        """End an earlier save, unless another watcher holds it, who will do so."""
        if self._store.take(job, self._owner):
            self._supersede(job)

    # ------------------------------------------------------------------------------------------------- merge

    def _begin_merge(self, job: Job) -> None:
        if self._merging is None and job.not_before <= time.time():
            self._merging = self._merger.submit(self._merge, job)
            self._merging.add_done_callback(lambda _: self.changed.set())

    def _finish_merge(self) -> None:
        if self._merging is None or not self._merging.done():
            return
        future, self._merging = self._merging, None
        with suppress(LeaseLost):
            future.result()()

    def _merge(self, job: Job) -> Callable[[], None]:
        """In the thread: make the whole model. What follows from how that went is done by the caller."""
        began = time.monotonic()
        output = self._places.model(job)
        source = Path(job.held) if job.held and Path(job.held).is_dir() else Path(job.source)
        try:
            if not model.is_there(output):
                if not is_intact(source, job.files, job.fingerprint):
                    return lambda: self._gone(job, source)
                prepared = model.prepare(model.Source(source, job.kind, self._config.base, self._config.dtype), output)
                waits = self._reserve(job, output, prepared.plan.nbytes)
                if waits is not None:
                    return waits
                model.write(prepared, output)
                if not is_intact(source, job.files, job.fingerprint):
                    shutil.rmtree(output, ignore_errors=True)
                    return lambda: self._gone(job, source)
            digest = model.digest(output)
        except (ReshardError, OSError, MemoryError) as error:
            problem = error
            return lambda: self._not_merged(job, source, problem)
        except Exception as error:
            defect = error
            return lambda: self._defect(job, defect)
        return lambda: self._merged(job, output, digest, time.monotonic() - began)

    def _reserve(self, job: Job, output: Path, nbytes: int) -> Callable[[], None] | None:
        """Take room for a whole model; what to do instead, where there is none."""
        limit = self._config.max_merged_nbytes
        with self._store.transaction():
            others = [other for other in self._store.with_models(self._run) if other.id != job.id]
            used = sum(int(j.payload.get("merged_nbytes", 0)) for j in others)
            if limit is None or used + nbytes <= limit:
                payload = {**job.payload, "merged_nbytes": nbytes}
                self._store.change(job, self._owner, merged=str(output), payload=payload)
                return None
        reason = f"{nbytes} bytes to merge, {max(0, limit - used)} of max_merged_size are left"
        earlier = [other for other in self._open_siblings(job) if other.id < job.id]
        if earlier:  # which has the room, and waits to hear of these weights
            return lambda: self._displace(earlier[0])
        if not any(other.state in _WORK for other in others):
            return lambda: self._fail(job, State.FAILED, reason, permanent=True)
        return lambda: self._wait(job, reason)

    def _merged(self, job: Job, output: Path, digest: str, seconds: float) -> None:
        self._let_go_of_shards(job)
        self._store.change(
            job, self._owner, state=State.MERGED, merged=str(output), digest=digest, held="", reason="", not_before=0.0
        )
        self._say(f"{called(job)}: merged in {seconds:.1f} s")
        self.changed.set()

    def _gone(self, job: Job, source: Path) -> None:
        """The shards are no longer what was found."""
        if source.is_dir() and any((source / name).exists() for name in job.files):
            self._end(job, State.SUPERSEDED, "the step was saved again while it was being merged")
            self._say(f"{called(job)} was saved again while it was being merged; the last save is evaluated")
        else:
            self._end(job, State.LOST, "the shards were removed before they were merged")
            self._say(f"{called(job)} is lost: its shards were removed before they were merged")

    def _not_merged(self, job: Job, source: Path, error: Exception) -> None:
        if not is_intact(source, job.files, job.fingerprint):
            self._gone(job, source)
        elif isinstance(error, OutputError | OSError | MemoryError | StoreBusy) and not self.ending:
            self._wait(job, f"merge: {error}", self._config.retry_wait)  # a full disk, or another process: may pass
        else:
            permanent = isinstance(error, InputError)
            self._fail(job, State.FAILED, f"merge: {error}", permanent=permanent, state=State.READY)

    # --------------------------------------------------------------------------------------------- evaluation

    def _request(self, job: Job) -> Request:
        return Request(Path(job.merged), job.step, job.kind, Path(job.output), job.attempts)

    def _may_ask(self) -> bool:
        return time.monotonic() >= self._quiet_until

    def _fall_silent(self, error: Unavailable) -> None:
        self.answers = False
        if self._may_ask():
            self._say(f"the backend does not answer: {error}; asked again in {self._silence_s:.0f} s")
            self._quiet_until = time.monotonic() + self._silence_s
            self._silence_s = min(2 * self._silence_s, _SILENCE_S[1])

    def _submit(self, job: Job) -> None:
        if self._settled_by_sibling(job) or not self._may_ask():
            return
        if not model.is_there(Path(job.merged)):
            self._lost_model(job)
            return
        try:
            output = self._places.output(job)
        except OSError as error:
            self._wait(job, f"no directory for its output: {error}")
            return
        job = self._store.begin_attempt(job, output, self._owner)
        try:
            job_id = self._backend.submit(self._request(job))
        except Refused as error:
            self._fail(job, State.FAILED, str(error), permanent=True)
            return
        self._sent(job, job_id)

    def _sent(self, job: Job, job_id: str) -> None:
        self._store.sent(job, job_id, self._owner)
        self._silence_s, self.answers = _SILENCE_S[0], True
        self._say(f"{called(job)}: attempt {job.attempts} submitted as {job_id}")

    def _lost_model(self, job: Job) -> None:
        """Somebody removed the whole model: make it again where the shards are left."""
        if is_intact(Path(job.source), job.files, job.fingerprint):
            self._store.change(job, self._owner, state=State.READY, merged="", held="")
        else:
            self._end(job, State.LOST, f"{job.merged} was removed, and so were the shards")

    def _recover(self, job: Job) -> None:
        """It may have been sent: find out."""
        status = self._backend.recover(self._request(job))
        if status.phase in (Phase.RUNNING, Phase.QUEUED) and status.job_id is not None:
            self._sent(job, status.job_id)
        else:
            self._take(job, status)

    def _poll(self, job: Job) -> None:
        status = self._backend.poll(self._request(job), job.job_id)
        self._silence_s = _SILENCE_S[0]
        if status.phase == Phase.MISSING:
            status = self._backend.recover(self._request(job))
            if status.phase in (Phase.RUNNING, Phase.QUEUED) and status.job_id not in (None, job.job_id):
                self._sent(job, str(status.job_id))
                return
        self._take(job, status)

    def _take(self, job: Job, status: Status) -> None:
        """Do what follows from how far an evaluation is."""
        self.answers = status.phase != Phase.UNKNOWN
        match status.phase:
            case Phase.COMPLETED if self._scanner.is_current(job) or self._outlived(job):
                self._measured(job, status)
            case Phase.FAILED:
                self._fail(job, State.FAILED, status.reason, permanent=status.permanent)
            case Phase.CANCELLED:
                self._fail(job, State.CANCELLED, status.reason or "cancelled at the backend")
            case Phase.MISSING:
                self._send_again(job, status.reason)
            case Phase.RUNNING | Phase.QUEUED | Phase.UNKNOWN:
                if time.time() - job.began > self._config.timeout:
                    self._cancel(job)
                    self._fail(job, State.TIMED_OUT, f"no result after {self._config.timeout:.0f} s")

    def _measured(self, job: Job, status: Status) -> None:
        with self._store.transaction():
            if self._newer(job):
                return
            self._store.measured(job, status.metrics, self._owner)
        shown = ", ".join(f"{m.name} {m.value:.6g}" for m in status.metrics[:4])
        more = f" and {len(status.metrics) - 4} more" if len(status.metrics) > 4 else ""
        self._say(f"{called(job)}: {shown}{more}")

    def _send_again(self, job: Job, reason: str) -> None:
        reason = reason or "the backend knows nothing of it, and there are no results"
        if job.attempts >= _MOST_ATTEMPTS:
            self._fail(job, State.FAILED, reason, permanent=True)
            return
        self._store.end_attempt(job, "lost", reason, self._owner, state=State.MERGED)
        self._say(f"{called(job)}: attempt {job.attempts} was lost: {brief(reason)}; it is sent again")
        self.changed.set()

    # ---------------------------------------------------------------------------------------------- the ends

    def _fail(
        self, job: Job, ended: State, reason: str, *, permanent: bool = False, state: State = State.MERGED
    ) -> None:
        """An attempt ended badly: try again where the policy says so, else leave it at that."""
        failures = job.failures + 1
        if permanent or ended not in self._config.retry_on or failures > self._config.retries:
            self._end(job, ended, reason, failures=failures)
            self._say(f"{called(job)} {_ENDED[ended]}: {brief(reason)}")
            return
        wait = self._config.retry_wait * 2 ** (failures - 1)
        job = self._store.end_attempt(
            job, ended, reason, self._owner, state=state, failures=failures, not_before=time.time() + wait
        )
        self._store.let_go(job, self._owner)
        self._say(f"{called(job)} {_ENDED[ended]}: {brief(reason)}; tried again in {wait:.0f} s")

    def _wait(self, job: Job, reason: str, wait_s: float | None = None) -> None:
        """Nothing is wrong with it, and it cannot go on now."""
        if job.reason != reason:
            self._say(f"{called(job)} waits: {reason}")
        wait_s = self._config.poll_interval if wait_s is None else wait_s
        job = self._store.change(job, self._owner, reason=reason, not_before=time.time() + wait_s)
        self._store.let_go(job, self._owner)

    def _end(self, job: Job, state: State, reason: str, **columns: Any) -> None:
        self._let_go_of_shards(job)
        self._store.end_attempt(job, state, reason, self._owner, state=state, held="", **columns)

    def _let_go_of_shards(self, job: Job) -> None:
        """Before it is noted that nothing is held: nobody would look for it afterwards. Raises LeaseLost."""
        if job.held:
            self._store.change(job, self._owner)
            release(Path(job.held).parent)

    def _defect(self, job: Job, error: Exception) -> None:
        """Something that nobody foresaw must not stop the others."""
        try:
            self._fail(job, State.FAILED, f"{type(error).__name__}: {error}", permanent=isinstance(error, ReshardError))
        except LeaseLost:
            return


__all__ = ["Advancer"]
