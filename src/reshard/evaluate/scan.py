"""What is new in a run: wanted checkpoints become jobs when they are whole, their shards held.

A step that is saved again in place is a job again, under its new fingerprint. One that is removed before it could be
held is lost, and said to be.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from reshard.errors import InputError, Mismatch, NotFound
from reshard.evaluate.config import Schedule
from reshard.evaluate.places import Places
from reshard.evaluate.protect import hold
from reshard.evaluate.ready import Look, NoSuchWeights, Whole, stamp_of, stamps, steps, whole
from reshard.evaluate.records import Job, Key, New, State
from reshard.evaluate.store import LeaseLost, Store

_NEWEST = 2
"""Checkpoints that are held against their fingerprints at every look; of the others a few at a time."""
_OTHERS = 4
_STILL = 2
"""Looks that must agree."""
_HELD = re.compile(r"step-(?P<step>\d+)-(?P<kind>regular|ema)-(?P<fingerprint>[0-9a-f]{12})")
Say = Callable[[str], None]


class Scanner:
    """Looks at a run again and again."""

    def __init__(
        self,
        places: Places,
        store: Store,
        schedule: Schedule,
        kinds: Sequence[str],
        base: str | None,
        run: str,
        say: Say,
    ) -> None:
        self._places, self._store, self._say = places, store, say
        self._schedule, self._kinds, self._base, self._run = schedule, kinds, base, run
        self._looks: dict[tuple[Path, str], Look] = {}
        self._turn = 0

    def look(self) -> None:
        """Look at every wanted checkpoint once."""
        found = [(step, path) for step, path in steps(self._places.run) if self._schedule.wants(step)]
        known = self._known()
        due = self._due(found, known)
        for step, path in found:
            for kind in self._kinds:
                jobs = known.get((step, kind), [])
                if not jobs or path in due or not jobs[-1].is_final:
                    with suppress(LeaseLost):  # another watcher has just done the same
                        self._look_at(step, kind, path, jobs)
        self._note_lost(known)

    def adopt(self) -> None:
        """Take up what is held and not noted: a watcher was killed in between, and the checkpoint may be gone."""
        known = self._known()
        folder = self._places.held_folder
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = _HELD.fullmatch(path.name)
            inner = [child for child in path.iterdir() if child.is_dir()] if match else []
            if match is None or len(inner) != 1:
                continue
            jobs = known.get((int(match["step"]), match["kind"]), [])
            if not any(job.fingerprint for job in jobs):
                with suppress(InputError, LeaseLost):  # what is not whole any more is cleared away later
                    self._adopt(int(match["step"]), match["kind"], match["fingerprint"], inner[0])

    def _adopt(self, step: int, kind: str, wanted: str, held: Path) -> None:
        found = whole(held, kind, self._base)
        source = next((path for number, path in steps(self._places.run) if number == step), None)
        if not found.fingerprint.startswith(wanted) or (source is not None and not _is_same(source, found)):
            return
        files = {name: list(stamp) for name, stamp in found.files.items()}
        key = Key(self._run, step, kind, found.fingerprint)
        seen = self._store.find(Key(self._run, step, kind))
        place = str(source or (seen.source if seen else self._places.run / held.name))
        with self._store.transaction():
            job, made = self._store.add(New(key, State.READY, place, "held before a watcher was killed", files))
            if made:
                self._store.change(job, held=str(held))
            if seen is not None:
                self._store.drop(seen)

    def is_settled(self) -> bool:
        """Whether another look will find nothing new unless the trainer writes.

        What an earlier watch was asked for, and this one is not, nobody looks at.
        """
        seen = [job for job in self._store.jobs([State.SEEN], run=self._run) if self._is_wanted(job)]
        return all(self._is_stuck(Path(job.source), job.kind) for job in seen)

    def _is_wanted(self, job: Job) -> bool:
        return job.kind in self._kinds and self._schedule.wants(job.step)

    def is_current(self, job: Job) -> bool:
        """Whether the checkpoint of a job is what it was, or is gone; not while it is being saved again."""
        path = Path(job.source)
        again = self._store.find(Key(job.run, job.step, job.kind))
        if again is not None and again.state == State.SEEN:
            return self._is_stuck(path, job.kind)
        return not _is_rewritten(path, job) or self._is_stuck(path, job.kind)

    def _is_stuck(self, path: Path, kind: str) -> bool:
        """Whether a checkpoint does not change any more, and is not whole."""
        look = self._looks.get((path, kind))
        return look is not None and look.times > _STILL and bool(look.problem)

    def _known(self) -> Mapping[tuple[int, str], list[Job]]:
        """All jobs of the run by step and kind, the oldest first; the one without fingerprint last."""
        known = defaultdict[tuple[int, str], list[Job]](list)
        for job in sorted(self._store.jobs(run=self._run), key=lambda job: (not job.fingerprint, job.id)):
            known[job.step, job.kind].append(job)
        return known

    def _due(self, found: Sequence[tuple[int, Path]], known: Mapping[tuple[int, str], Sequence[Job]]) -> set[Path]:
        """Which of the checkpoints that are done with deserve a look this time."""
        self._turn += 1
        paths = [path for _, path in found]
        older = paths[:-_NEWEST]
        start = self._turn * _OTHERS % len(older) if older else 0
        return {*paths[-_NEWEST:], *itertools.islice(itertools.cycle(older), start, start + min(_OTHERS, len(older)))}

    def _look_at(self, step: int, kind: str, path: Path, jobs: Sequence[Job]) -> None:
        seen = jobs[-1] if jobs and not jobs[-1].fingerprint else None
        saved = [job for job in jobs if job.fingerprint]
        if seen is None and saved and not _is_rewritten(path, saved[-1]):
            return
        stamp = stamp_of(path)
        if stamp is None:
            return
        look = self._looks.get((path, kind))
        look = self._looks[path, kind] = Look(stamp) if look is None else look.again(stamp)
        seen = self._seen(step, kind, path, seen, bool(saved))
        if look.times < _STILL or look.problem or seen.state != State.SEEN:
            return
        try:
            self._take(seen, whole(path, kind, self._base))
        except NoSuchWeights as error:
            self._store.change(seen, state=State.FAILED, reason=str(error))
            self._say(f"{called(seen)}: {error}")
        except (NotFound, Mismatch) as error:  # removed, or written again, while we looked
            look.problem = str(error) if stamp_of(path) == stamp else ""
            self._store.change(seen, reason=str(error))
        except (InputError, OSError, msgspec.MsgspecError) as error:
            look.problem = str(error)
            hint = getattr(error, "hint", None)
            reason = f"{error} ({hint})" if hint else str(error)
            if reason != seen.reason:
                self._store.change(seen, reason=reason)
                self._say(f"{called(seen)} is not whole yet: {reason}")

    def _seen(self, step: int, kind: str, path: Path, seen: Job | None, again: bool) -> Job:
        """The job of a checkpoint that is not known to be whole."""
        if seen is not None and seen.state == State.LOST:
            return self._store.change(seen, state=State.SEEN, source=str(path), reason="")
        if seen is not None:
            return seen
        reason = "saved again" if again else ""
        with self._store.transaction():
            now = [job for job in self._store.jobs(run=self._run, step=step) if job.kind == kind and job.fingerprint]
            if now and not again:
                raise LeaseLost(f"step {step}: another watcher has it by now")
            job, made = self._store.add(New(Key(self._run, step, kind), State.SEEN, str(path), reason))
        if made:
            self._say(f"{called(job)}: {reason or 'seen'}")
        return job

    def _take(self, seen: Job, found: Whole) -> None:
        """Hold a whole checkpoint, and have it evaluated."""
        key = Key(seen.run, seen.step, seen.kind, found.fingerprint)
        files = {name: list(stamp) for name, stamp in found.files.items()}
        old = self._store.find(key)
        if old is None:
            folder = self._places.held(seen.step, seen.kind, found.fingerprint)
            held = hold(found, folder)
            with self._store.transaction():
                job, made = self._store.add(New(key, State.READY, seen.source, f"held by {held}", files))
                if made:
                    self._store.change(job, held=str(held.path))
            if made:
                nbytes = f"{found.nbytes} bytes in {len(found.files)} files"
                self._say(f"{called(seen)} is whole ({found.writer}, {nbytes}), held by {held}")
        elif not old.files:  # known from evals.jsonl alone
            self._store.change(old, files=files, source=seen.source)
        with self._store.transaction():
            left = self._store.job(seen.id)
            if left is not None:
                self._store.drop(left)

    def _note_lost(self, known: Mapping[tuple[int, str], Sequence[Job]]) -> None:
        for jobs in known.values():
            seen = jobs[-1]
            if seen.state != State.SEEN or Path(seen.source).is_dir():
                continue
            with suppress(LeaseLost):
                reason = "the checkpoint was removed before its shards were whole and held"
                if len(jobs) > 1:
                    reason = "the step was saved again, and removed before that was held: its results are of the first"
                self._store.change(seen, state=State.LOST, reason=reason)
                self._say(f"{called(seen)} is lost: {reason}")


def _is_rewritten(path: Path, job: Job) -> bool:
    """Whether any shard of a job is another one by now; those that are gone say nothing."""
    if not job.files:
        return True
    return any(list(stamp) != job.files[name] for name, stamp in stamps(path, job.files).items())


def _is_same(path: Path, found: Whole) -> bool:
    """Whether a checkpoint in the run is the one that is held."""
    return stamps(path, found.files) == dict(found.files)


def called(job: Job) -> str:
    """How a job is called in messages."""
    return f"step {job.step}" if job.kind == "regular" else f"step {job.step} ({job.kind})"


def brief(reason: str) -> str:
    """The last line of a reason, which is where programs say what went wrong."""
    return next((line for line in reversed(reason.splitlines()) if line.strip()), "").strip()


def is_over(places: Places) -> bool:
    """Whether the trainer has said that no checkpoint will come any more.

    LMMs-Engine writes compute_summary.json last of all; the Trainer's notes in a checkpoint know the last step. Of a
    run that cannot be listed, or is being removed, nobody has said so.
    """
    try:
        return _is_over(places)
    except (InputError, OSError):
        return False


def _is_over(places: Places) -> bool:
    found = steps(places.run)
    if not found:
        return places.end.is_file()
    newest = found[-1][1]
    ends = [path for path in (places.end, places.run / "compute_summary.json") if path.is_file()]
    if any(path.stat().st_mtime >= newest.stat().st_mtime for path in ends if newest.is_dir()):
        return True
    try:
        notes = msgspec.json.decode((newest / "trainer_state.json").read_bytes(), type=_TrainerState)
    except (OSError, msgspec.MsgspecError):
        return False
    return 0 < notes.max_steps <= notes.global_step


class _TrainerState(msgspec.Struct):
    """What the Trainer notes in every checkpoint, of all that it notes."""

    global_step: int
    max_steps: int


__all__ = ["Scanner", "brief", "called", "is_over"]
