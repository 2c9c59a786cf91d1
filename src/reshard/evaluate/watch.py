"""watch: look, advance, log, and again, until there is nothing left to do or somebody says so."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from reshard.errors import InputError, NotFound, ReshardError, listed
from reshard.evaluate.advance import Advancer
from reshard.evaluate.backend import Backend, Unavailable, make_backend
from reshard.evaluate.config import EvalConfig, Settings
from reshard.evaluate.database import StoreBusy
from reshard.evaluate.lease import RENEW_S, new_owner
from reshard.evaluate.log import Delivery, Journal
from reshard.evaluate.loggers import require
from reshard.evaluate.places import Places, sweep
from reshard.evaluate.prune import Pruner
from reshard.evaluate.records import OPEN, Job, Key, New, State
from reshard.evaluate.scan import Scanner, is_over
from reshard.evaluate.store import Store

_ONCE_S = 1.0
"""The longest between two looks when nothing is expected to change."""
_DELIVER_S = 60.0
"""How long the loggers may take at the end."""
_CHECK_S = 60.0
_AGAIN = (State.FAILED, State.CANCELLED, State.TIMED_OUT, State.LOST)
_DISPLACED = (State.SAME, State.SUPERSEDED)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Watched:
    """How a watch ended."""

    jobs: tuple[Job, ...]
    """All that are known of the run."""
    undelivered: tuple[str, ...]
    """What loggers have not got yet, a sentence each."""
    is_interrupted: bool = False
    """Whether it was asked to stop at once."""

    @property
    def left(self) -> int:
        """Steps that the next watch goes on with."""
        return sum(not job.is_final and job.state != State.SEEN for job in self.jobs)

    @property
    def problems(self) -> tuple[Job, ...]:
        """Steps without results, with nothing that could still bring them."""
        return tuple(job for job in self.jobs if job.state in (*_AGAIN, State.SEEN))


def watch(
    settings: Settings,
    places: Places,
    *,
    once: bool = False,
    again: bool = False,
    say: Say = lambda _: None,
    backend: Backend | None = None,
) -> Watched:
    """Evaluate the checkpoints of a run until its training ends, or, `once`, those that are there.

    A run that is not there yet is waited for, unless `once`, and so is one whose directory is removed meanwhile. With
    `again` what failed or was lost before is tried once more. Raises InputError for what the backend or a logger will
    never take; everything later is a state of a job.
    """
    config = settings.evaluation
    for name, options in config.loggers.items():
        require(name, options)
    backend = backend or make_backend(config)
    tasks = _Tasks(backend, config, say)
    with _interrupts(say) as asked:
        while True:
            if once and not places.run.is_dir():
                raise NotFound(f"{places.run}: no such directory", hint="without --once it is waited for")
            if not once:
                _wait_for(places, tasks, config.poll_interval, asked, say)
                if asked.to_finish:
                    return Watched((), (), asked.at_once)
            watched = _watch_there(settings, places, once, again, say, backend, tasks, asked)
            if watched is not None:
                return watched
            say(f"{places.store} was removed: beginning anew")


def _watch_there(
    settings: Settings, places: Places, once: bool, again: bool, say: Say, backend: Backend, tasks: _Tasks,
    asked: _Asked,
) -> Watched | None:  # fmt: skip
    """The same, of a run that is there; None when somebody removed what is known of it."""
    try:
        places.folder.mkdir(parents=places.folder.parent != places.run, exist_ok=True)
    except FileNotFoundError:  # it has just been removed, and is not ours to make
        return None
    with Store(places.store) as store:
        watcher = _Watcher(settings, places, store, backend, tasks, say)
        watcher.begin(again)
        with _heart(store, watcher.owner), _deliveries(settings, places, store) as deliveries:
            watcher.run(once, asked, deliveries)
            if not store.is_in_place and not asked.to_finish:
                return None
            undelivered = tuple(_finish(deliveries, asked))
        return Watched(tuple(store.jobs(run=watcher.run_name)), undelivered, asked.at_once)


def _wait_for(places: Places, tasks: _Tasks, interval_s: float, asked: _Asked, say: Say) -> None:
    """Until there is a run to look at, or until asked to stop. Nothing is made there meanwhile."""
    asked.wake, told = threading.Event(), ""
    while not places.has_begun and not asked.to_finish:
        if places.end.is_file():
            raise NotFound(f"{places.run}: no such directory, though {places.end} says that training has ended")
        text = (
            f"{places.run} is {'empty' if places.run.is_dir() else 'not there yet'}: waiting for the training to begin"
        )
        if text != told:
            say(text)
        told = text
        tasks.check()
        asked.wake.wait(interval_s)


class _Watcher:
    """The parts, and the order in which they take their turns."""

    def __init__(
        self, settings: Settings, places: Places, store: Store, backend: Backend, tasks: _Tasks, say: Say
    ) -> None:
        self.owner = new_owner()
        self.run_name = store.meta("run", str(places.run))
        config = settings.evaluation
        self._config, self._places, self._store, self._tasks, self._say = config, places, store, tasks, say
        self._journal = Journal(places.journal, store)
        self._scanner = Scanner(places, store, settings.schedule, config.kinds, config.base, self.run_name, say)
        self._advancer = Advancer(places, store, backend, config, self._scanner, self.run_name, self.owner, say)
        self._pruner = Pruner(places, store, config, self.run_name, say)

    def begin(self, again: bool) -> None:
        """Take over what stands, and clear what an earlier watcher was killed over."""
        if self._journal.restore():
            self._adopt()
        self._scanner.adopt()
        jobs = self._store.jobs(run=self.run_name)
        sweep(self._places.held_folder, {Path(job.held).parent.name for job in jobs if job.held})
        if again:
            jobs = self._store.jobs([*_AGAIN, *_DISPLACED], run=self.run_name)
            steps = {(job.step, job.kind) for job in jobs if job.state in _AGAIN}
            for job in jobs:
                if (job.step, job.kind) in steps:
                    self._pruner.forget(job)

    def _adopt(self) -> None:
        """Jobs for results that only evals.jsonl knew."""
        known = {job.key for job in self._store.jobs(run=self.run_name)}
        for result in self._store.results(run=self.run_name):
            key = Key(result.run, result.step, result.kind, result.fingerprint)
            if key not in known:
                self._store.add(New(key, State.DONE, reason="known from evals.jsonl"))
                known.add(key)

    def run(self, once: bool, asked: _Asked, deliveries: Sequence[Delivery]) -> None:
        """Take turns until all is done, until asked twice to stop, or until the store is removed."""
        told = dict[str, str]()
        try:
            while not asked.at_once and self._store.is_in_place:
                ending = self._advancer.ending = once or is_over(self._places)
                self._turn(asked.to_finish)
                self._tell(deliveries, told)
                if self._is_done(ending, asked.to_finish):
                    break
                self._rest(ending, asked)
        finally:
            with suppress(ReshardError):  # of a process that ended no lease counts
                self._advancer.stop(at_once=asked.at_once)
            with suppress(OSError, StoreBusy):
                self._log()

    def _turn(self, finishing: bool) -> None:
        try:
            self._tasks.check()
            self._look()
            self._advancer.tick(claim=not finishing)
            self._log()
        except (OSError, StoreBusy) as error:  # a full disk, a file system that is away: both may pass
            self._say(f"waiting: {error}")
        except ReshardError:
            if self._store.is_in_place:
                raise

    def _look(self) -> None:
        """When finishing too: it holds what comes, and sees what is saved again."""
        try:
            self._scanner.look()
        except InputError as error:  # the run cannot be listed
            self._say(f"waiting: {error}")

    def _log(self) -> None:
        self._journal.write()
        self._journal.settle()
        self._pruner.prune()

    def _is_done(self, ending: bool, finishing: bool) -> bool:
        if finishing:  # what nobody tells the end of is left to the next watch
            return not self._advancer.answers or not self._store.held_by(self.owner)
        if not ending or not self._scanner.is_settled():
            return False
        return not self._store.count(OPEN - {State.SEEN})

    def _rest(self, ending: bool, asked: _Asked) -> None:
        interval = min(self._config.poll_interval, _ONCE_S) if ending else self._config.poll_interval
        asked.wake = self._advancer.changed
        if not asked.at_once:
            self._advancer.changed.wait(interval)
        self._advancer.changed.clear()

    def _tell(self, deliveries: Sequence[Delivery], told: dict[str, str]) -> None:
        for delivery in deliveries:
            if delivery.problem and told.get(delivery.name) != delivery.problem:
                self._say(f"logger {delivery.name}: {delivery.problem}; tried again later")
            told[delivery.name] = delivery.problem


class _Tasks:
    """Whether the backend knows the tasks: it is asked until it answers."""

    def __init__(self, backend: Backend, config: EvalConfig, say: Say) -> None:
        self._backend, self._config, self._say = backend, config, say
        self._checked, self._check_at = False, 0.0

    def check(self) -> None:
        """Raise InputError for tasks that the backend does not know, as soon as it answers."""
        if self._checked or time.monotonic() < self._check_at:
            return
        try:
            unknown = self._backend.check(self._config.tasks)
        except Unavailable as error:
            self._say(f"the tasks are not checked yet: {error}")
            self._check_at = time.monotonic() + _CHECK_S
            return
        self._checked = True
        if unknown:
            raise InputError(f"tasks: {listed(unknown)}: the backend {self._config.backend} does not know them")


@contextmanager
def _heart(store: Store, owner: str) -> Iterator[None]:
    """Renew the leases meanwhile, whatever the rest waits for."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(RENEW_S):
            with suppress(ReshardError):  # the next beat comes before the leases expire
                if store.held_by(owner):
                    store.renew(owner)

    thread = threading.Thread(target=beat, name="leases", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _deliveries(settings: Settings, places: Places, store: Store) -> Iterator[list[Delivery]]:
    deliveries = [
        Delivery(name, places.journal, store, places.run, dict(options), places.folder)
        for name, options in settings.evaluation.loggers.items()
    ]
    for delivery in deliveries:
        delivery.start()
    try:
        yield deliveries
    finally:
        for delivery in deliveries:
            delivery.finish(1.0)


def _finish(deliveries: Sequence[Delivery], asked: _Asked) -> Iterator[str]:
    for delivery in deliveries:
        left = delivery.finish(1.0 if asked.at_once else _DELIVER_S)
        if left:
            said = f": {delivery.problem}" if delivery.problem else ""
            yield f"{delivery.name} lacks {left} of the points in evals.jsonl{said}; the next watch delivers them"


@dataclass(slots=True)
class _Asked:
    """What signals asked for."""

    to_finish: bool = False
    at_once: bool = False
    wake: threading.Event | None = None


@contextmanager
def _interrupts(say: Say) -> Iterator[_Asked]:
    """The first SIGTERM or SIGINT finishes what is under way, the second stops at once; both lose nothing."""
    asked = _Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, _: FrameType | None) -> None:
        asked.at_once, asked.to_finish = asked.to_finish, True
        if asked.wake is not None:
            asked.wake.set()
        if not asked.at_once:
            say(f"{signal.Signals(number).name}: finishing what is under way; once more stops at once, losing nothing")

    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, handle))
        yield asked


def open_store(places: Places) -> Store:
    """What is known of a run. Raises InputError when nothing is."""
    if not places.run.is_dir():
        raise NotFound(f"{places.run}: no such directory")
    if not places.store.is_file():
        raise InputError(f"{places.run} was not watched yet: there is no {places.store}", hint="reshard watch RUN_DIR")
    return Store(Path(places.store))


__all__ = ["Watched", "open_store", "watch"]
