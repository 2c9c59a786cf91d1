"""The ranks of one run: how they find each other, wait for each other, and learn that one of them failed.

    join      each rank puts its name on the board; the first gives it a seat; it takes it
    phases    every rank says how far it is; the first waits for all, all others wait for the first
    failure   whoever fails says so at once; the first tells all; who says nothing for long counts as dead

A seat names the process that it was given to, and whoever takes one names the process that gave it, so what an
earlier run left on the board is never taken for an answer. Each key of the board has one writer. No clock is compared
with another's: a rank is alive while the number in its word goes up.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec

from reshard import errors
from reshard.errors import OutputError, RankFailed, ReshardError, listed
from reshard.storage.board import Board, hostname
from reshard.storage.launch import Launch
from reshard.storage.move import Progress
from reshard.storage.staging import clear

_BEAT_S = 0.5
_MAX_PAUSE_S = 0.2
_LINGER_S = 20.0
"""How long a run that failed is kept together, so that all ranks hear why and stop writing."""
_REFUSAL_S = 5.0
"""How long a run that never began waits for ranks to tell them."""

_DEAD = "its process ended without a word"
_GONE = "run the same command again: what is done is kept"


class Phase(IntEnum):
    """How far a rank is."""

    JOINING = 0
    JOINED = 1
    READY = 2
    """The first rank: the staging directory is as all others need it."""
    FILLED = 3
    """What this rank has to write is written and flushed."""
    COMMITTING = 4
    """The first rank: all is ready, and what happens to others matters no more."""
    COMMITTED = 5
    """The first rank: the destination is complete."""
    ENDED = 6


class Failure(msgspec.Struct, frozen=True):
    """Why a run ends without a result."""

    rank: int
    host: str
    kind: str
    """Name of the exception."""
    message: str
    hint: str | None
    clears: bool
    """Whether nothing may be left in the staging directory."""

    def error(self) -> ReshardError:
        """What all other ranks raise."""
        known = getattr(errors, self.kind, None)
        if isinstance(known, type) and issubclass(known, ReshardError):
            return known(self.message, hint=self.hint)
        return RankFailed(f"rank {self.rank} on {self.host}: {self.message}", hint=self.hint)


class Word(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one rank says on the board."""

    process: str
    """A name that no other process ever had."""
    host: str
    machine: str
    """See `Board.machine`."""
    beat: int
    phase: int
    run: str = ""
    """The process of the first rank, once this one has its seat."""
    done_nbytes: int = 0
    facts: dict[str, Any] = {}
    failure: Failure | None = None
    seats: dict[str, str] = {}
    """The first rank: the process that has the seat, by rank."""


class _Heard:
    """The last word of a rank, and when it came."""

    def __init__(self, word: Word) -> None:
        self.word, self.at = word, time.monotonic()

    def hear(self, word: Word) -> None:
        if word.beat != self.word.beat or word.phase != self.word.phase:
            self.word, self.at = word, time.monotonic()


class Team:
    """This rank among the others of a run.

    The methods are for one thread, but for `check` and `done`, which any may call.
    """

    def __init__(self, launch: Launch, progress: Progress | None) -> None:
        self.launch = launch
        self.process = secrets.token_hex(8)
        self._progress = progress
        self._board: Board | None = None
        self._machine = ""
        self._lock, self._count_lock = threading.RLock(), threading.Lock()
        self._beat, self._phase, self._facts = 0, Phase.JOINING, dict[str, Any]()
        self._done_nbytes = 0
        self._run = self.process if launch.is_first else ""
        self._seats: dict[int, str] = {}
        self._heard: dict[int, _Heard] = {}
        """Of the ranks that this one listens to: the first listens to all, all others to the first."""
        self._seen_alive: set[str] = set()
        """Processes that were there before they had a seat."""
        self._failure: Failure | None = None
        self._refuses = False
        """Whether this is the first rank of a run that cannot begin, and tells all that come."""
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._live, name="reshard ranks", daemon=True)

    @property
    def run(self) -> str:
        """The name of the run: the process of its first rank."""
        return self._run

    # ------------------------------------------------------------------------------------------------ to begin with

    def join(self, board: Board, agreement: Mapping[str, str], refusal: BaseException | None = None) -> None:
        """Find all others. Raises Mismatch when a rank has another plan, RankFailed when one does not come.

        The first rank may come with a `refusal`: then all that come are told of it.
        """
        self._board, self._machine = board, board.machine()
        self._refuses, self._facts = refusal is not None, {"agreement": dict(agreement)}
        with self._lock:
            self._failure = None if refusal is None else self._failure_of(refusal)
            self._put()
        self._heart.start()
        if not self.launch.is_first:
            self._take_seat()
        elif refusal is None:
            self._wait(lambda: len(self._heard) == self.launch.world_size - 1, self.launch.join_timeout_s)
            self._check_agreement(agreement)
            self.say(Phase.JOINED)

    def _take_seat(self) -> None:
        self._wait(lambda: bool(self._run), self.launch.join_timeout_s)
        self.say(Phase.JOINED, self._facts)
        self._wait(lambda: self._heard[0].word.phase >= Phase.JOINED)
        if self._heard[0].word.seats.get(str(self.launch.rank)) != self.process:
            raise OutputError(f"another process is {self.launch} of the same run", hint="start each rank once")

    def _check_agreement(self, agreement: Mapping[str, str]) -> None:
        for rank, heard in sorted(self._heard.items()):
            theirs = heard.word.facts.get("agreement", {})
            differ = [what for what, ours in agreement.items() if theirs.get(what) != ours]
            if differ:
                raise errors.Mismatch(
                    f"rank {rank} on {heard.word.host} is about to do something else than rank 0 on {hostname()}:"
                    f" they differ in {listed(differ)}",
                    hint="start all ranks with one command line and one version, on file systems that show them the"
                    " same files",
                )

    # --------------------------------------------------------------------------------------------------- meanwhile

    def say(self, phase: Phase, facts: Mapping[str, Any] | None = None) -> None:
        """Tell the others how far this rank is."""
        with self._lock:
            self._phase, self._facts = phase, dict(facts or {})
            self._put()

    def wait_for_first(self, phase: Phase) -> tuple[Phase, Mapping[str, Any]]:
        """Wait until the first rank is this far, or further: how far, and what it says."""
        self._wait(lambda: self._heard[0].word.phase >= phase)
        word = self._heard[0].word
        return Phase(word.phase), word.facts

    def wait_for_all(self, phase: Phase) -> dict[int, Mapping[str, Any]]:
        """The first rank: wait until all others are this far; what they say."""
        self._wait(lambda: all(heard.word.phase >= phase for heard in self._heard.values()))
        return {rank: heard.word.facts for rank, heard in sorted(self._heard.items())}

    def check(self) -> None:
        """Raise what ended the run, if anything did."""
        if self._failure is not None:
            raise self._failure.error()

    def done(self, nbytes: int, name: str) -> None:
        """Note progress. Raises what ended the run, if anything did: so threads stop between two blocks."""
        self.check()
        with self._count_lock:
            self._done_nbytes += nbytes
        if self._progress is not None:
            self._progress(nbytes, name)

    def put(self, key: str, note: bytes) -> None:
        """A note of this rank for the first one."""
        assert self._board is not None
        self._board.put(f"{key}.{self.launch.rank}", note)

    def get(self, key: str, rank: int) -> bytes | None:
        """A note of another rank."""
        assert self._board is not None
        return self._board.get(f"{key}.{rank}")

    # -------------------------------------------------------------------------------------------------- at the end

    def fail(self, error: BaseException, clears: bool) -> BaseException:
        """Tell the others why this rank cannot go on, unless the run has failed already: what is to be raised.

        `clears` says whether nothing may be left, as far as this rank has begun.
        """
        if self._board is None:
            return error
        with self._lock:
            if self._failure is None:
                self._failure = self._failure_of(error, clears and self._phase > Phase.JOINING)
            self._put_soon()
            told = self._failure
        return error if told.rank == self.launch.rank or not isinstance(error, Exception) else told.error()

    def leave(self, staging: Path | None) -> None:
        """Part: the first rank clears up `staging`, if it holds it, when nobody writes there any more.

        A launcher ends all ranks as soon as one has failed, so after a failure nobody goes before that.
        """
        if self._board is None:
            return
        if self.launch.is_first:
            self._gather_ends()
        self._stop.set()
        if self._heart.is_alive():
            self._heart.join()
        if staging is not None:
            self._clear_up(staging)
        with self._lock:
            self._phase = Phase.ENDED
            self._put_soon()
        if self._failure and staging is None and (self.launch.is_first or not self._run):
            self._board.retire(f"rank.{self.launch.rank}")
        elif self._failure and not self.launch.is_first:
            self._await_first()

    def _gather_ends(self) -> None:
        """Wait until no other rank writes any more, or it is dead."""
        limit_s = self.launch.silence_timeout_s if self._failure is None else _LINGER_S
        if self._refuses and len(self._heard) < self.launch.world_size - 1:
            limit_s = _REFUSAL_S
        until = time.monotonic() + limit_s
        while time.monotonic() < until and not self._all_ended():
            with self._lock:
                self._listen()
            time.sleep(0.02)

    def _clear_up(self, staging: Path) -> None:
        """Leave what a second run can go on from, if there is any."""
        assert self._board is not None
        if self._failure is None or self._failure.clears or not (staging / "journal").exists():
            clear(staging)
        else:
            self._board.remove()

    def _await_first(self) -> None:
        until = time.monotonic() + _LINGER_S + _REFUSAL_S
        while time.monotonic() < until and not self._first_ended():
            time.sleep(0.02)

    def _first_ended(self) -> bool:
        assert self._board is not None
        heard = self._heard.get(0)
        if heard is None or self._is_lost(heard):
            return True
        try:
            word = self._read(0)
        except ConnectionError:
            return True
        return word is None or word.process != self._run or word.phase == Phase.ENDED

    def _all_ended(self) -> bool:
        if self._refuses and len(self._heard) < self.launch.world_size - 1:
            return False
        return all(heard.word.phase == Phase.ENDED or self._is_lost(heard) for heard in self._heard.values())

    # ------------------------------------------------------------------------------------------------------- inside

    def _live(self) -> None:
        """The second thread: say that this rank lives, and hear the others."""
        while not self._stop.wait(_BEAT_S):
            with self._lock:
                try:
                    self._put()
                    self._listen()
                except OSError:
                    continue  # the next time, or silence will tell
                except Exception as error:  # of the caller's progress: the main thread raises it
                    self._failure = self._failure or self._failure_of(error)

    def _wait(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        pause, began = 0.005, time.monotonic()
        while True:
            with self._lock:
                self._listen()
            self.check()
            if condition():
                return
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise self._lonely(timeout_s)
            if timeout_s is not None and self._progress is not None:
                self._progress(0, "waiting for other ranks")
            time.sleep(pause)
            pause = min(pause * 1.5, _MAX_PAUSE_S + self.launch.world_size / 1000)

    def _lonely(self, timeout_s: float) -> ReshardError:
        others = range(1, self.launch.world_size) if self.launch.is_first else [0]
        missing = listed(str(rank) for rank in others if rank not in self._heard)
        return RankFailed(
            f"{self.launch} on {hostname()} waited {timeout_s:g} s for rank {missing}",
            hint="all ranks have to run the same command and see the directory of the output; to run alone, take RANK"
            " and WORLD_SIZE out of the environment",
        )

    def _put(self) -> None:
        assert self._board is not None
        self._beat += 1
        seats = {str(rank): process for rank, process in self._seats.items()}
        word = Word(
            self.process, hostname(), self._machine, self._beat, self._phase, self._run, self._done_nbytes,
            self._facts, self._failure, seats,
        )  # fmt: skip
        self._board.put(f"rank.{self.launch.rank}", msgspec.json.encode(word))

    def _put_soon(self) -> None:
        """As `_put`, where nothing can be done about it when it does not succeed."""
        for _ in range(5):
            try:
                return self._put()
            except FileNotFoundError:
                return None  # the first rank has cleared up
            except OSError:
                time.sleep(0.2)
        return None

    def _read(self, rank: int) -> Word | None:
        assert self._board is not None
        note = self._board.get(f"rank.{rank}")
        try:
            return None if note is None else msgspec.json.decode(note, type=Word)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def _listen(self) -> None:
        """Hear what is new, and whom there is nothing to hear of."""
        try:
            if self.launch.is_first:
                self._listen_to_all()
            else:
                self._listen_to_first()
        except ConnectionError as error:
            self._failure = self._failure or self._failure_of(error)

    def _listen_to_all(self) -> None:
        told = self._failure
        for rank in range(1, self.launch.world_size):
            heard = self._heard.get(rank)
            is_dead = heard is not None and self._is_dead(heard.word)  # before its word: the last may say that it ended
            word = self._read(rank)
            if heard is None:
                self._seat(rank, word)
            elif word is not None and word.process == heard.word.process:
                self._progressed(word.done_nbytes - heard.word.done_nbytes)
                heard.hear(word)
            self._judge(rank, is_dead)
        if self._failure is not told:
            self._put()

    def _progressed(self, nbytes: int) -> None:
        if nbytes > 0 and self._progress is not None and self._failure is None:
            self._progress(nbytes, "")

    def _seat(self, rank: int, word: Word | None) -> None:
        """Give a seat to a process that asks for it; take the rank in when it sits."""
        if word is None:
            return
        if word.run == self.process and word.process == self._seats.get(rank):
            self._heard[rank] = _Heard(word)
        elif not word.run and not self._was_left(rank, word) and self._seats.get(rank) != word.process:
            self._seats[rank] = word.process
            self._put()

    def _was_left(self, rank: int, word: Word) -> bool:
        """Whether a word was left by an earlier run. Who was seen alive and is dead now has failed."""
        if not self._is_dead(word):
            self._seen_alive.add(word.process)
            return False
        if word.process in self._seen_alive and word.phase != Phase.ENDED and self._failure is None:
            self._failure = self._death(rank, word, _DEAD)
        return True

    def _listen_to_first(self) -> None:
        assert self._board is not None
        heard = self._heard.get(0)
        is_dead = heard is not None and self._is_dead(heard.word)
        word = self._read(0)
        if not self._run:
            self._ask(word)
            return
        if word is not None and word.process == self._run and heard is not None:
            heard.hear(word)
            self._failure = self._failure or word.failure
        self._judge(0, is_dead)

    def _ask(self, word: Word | None) -> None:
        """See whether the first rank has a seat for this process."""
        assert self._board is not None
        self._board.come_back()
        if word is None:
            return
        if word.seats.get(str(self.launch.rank)) == self.process:
            self._run = word.process
            self._heard[0] = _Heard(word)
            self._failure = word.failure
            self._put()
        elif word.phase > Phase.JOINING:
            self._notice_another_run(word)
        else:
            self._was_left(0, word)

    def _notice_another_run(self, word: Word) -> None:
        """A run that goes on without this process is not ours; one that stands still was killed."""
        other = self._heard.setdefault(-1, _Heard(word))
        if other.word.process == word.process and word.beat > other.word.beat + 1 and word.phase < Phase.ENDED:
            self._failure = self._failure_of(
                OutputError(f"the output is being written by another run, on {word.host} (rank 0)")
            )
        elif other.word.process != word.process:
            self._heard[-1] = _Heard(word)

    def _is_dead(self, word: Word) -> bool:
        """Whether the process of a word is known to have ended: of this machine alone that can be known at once."""
        assert self._board is not None
        return bool(self._machine) and word.machine == self._machine and self._board.is_dead(word.process)

    def _judge(self, rank: int, is_dead: bool) -> None:
        """Whether a rank has failed."""
        heard = self._heard.get(rank)
        if heard is None or self._failure is not None or self._phase >= Phase.COMMITTING:
            return
        if heard.word.failure is not None:
            self._failure = heard.word.failure
        elif heard.word.phase != Phase.ENDED:
            if is_dead:
                self._failure = self._death(rank, heard.word, _DEAD)
            elif self._is_silent(heard):
                self._failure = self._death(
                    rank, heard.word, f"not a word for {self.launch.silence_timeout_s:g} s", "does its machine run? "
                )

    def _death(self, rank: int, word: Word, why: str, question: str = "was there enough memory? ") -> Failure:
        return Failure(rank, word.host, "died", why, question + _GONE, clears=False)

    def _is_silent(self, heard: _Heard) -> bool:
        return time.monotonic() - heard.at > self.launch.silence_timeout_s

    def _is_lost(self, heard: _Heard) -> bool:
        """Whether nothing more is to be expected of a rank."""
        return self._is_dead(heard.word) or self._is_silent(heard)

    def _failure_of(self, error: BaseException, clears: bool = False) -> Failure:
        kind, message, hint = type(error).__name__, str(error), getattr(error, "hint", None)
        if isinstance(error, KeyboardInterrupt):
            message, hint = "interrupted", _GONE
        elif not isinstance(error, ReshardError):
            message = f"{kind}: {message}"
        return Failure(self.launch.rank, hostname(), kind, message, hint, clears)
