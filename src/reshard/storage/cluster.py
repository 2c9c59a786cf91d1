"""A run on several ranks: each makes the same plan and brings its part of the tensors to their places.

    first rank                                    every other rank
    lock, join                                    join
    journal, files at their full size   READY ->
    its part                                      its part, noted in a journal of its own
                                     <- FILLED    flushed
    digests from the journals, seals
    commit                          COMMITTED ->
    clear up                         <- ENDED

A tensor is brought by one rank, because its digest is that of one sequence of bytes: the parts are cut between tensors
(segments of the plan), into contiguous runs of nearly the same number of bytes. Contiguous, because neighbours are
often made of the same bytes of the source.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import xxhash

from reshard.core.tensor import Extent, leaves
from reshard.errors import InputError, OutputError, listed
from reshard.storage.board import board_of, hostname
from reshard.storage.files import Ledger
from reshard.storage.fill import (
    Done,
    Job,
    carry,
    check_unchanged,
    flush,
    flush_names,
    layout,
    may_stand,
    opened,
    standing,
    write_constants,
    write_seals,
)
from reshard.storage.launch import Launch, Spread
from reshard.storage.move import Mover, default_threads, tasks
from reshard.storage.plan import Digest, Plan
from reshard.storage.ranks import Phase, Team
from reshard.storage.scratch import ScratchExtent
from reshard.storage.share import Share, share_of
from reshard.storage.staging import (
    Journal,
    JournalRead,
    PartJournal,
    check_destination,
    check_space,
    commit,
    explained,
    inode,
    journal_lines,
    part_journal,
    payload_of,
    staged,
    staging_of,
)
from reshard.version import __version__

_MAX_RUNS = 100_000
"""More are not worth telling: each rank then reads for itself what it lacks of a record to check it."""


def run_together(job: Job, launch: Launch, force: bool, spread: Spread, tell: Callable[[], Sequence[str]]) -> Done:
    """This rank's part of a job; returns when the destination is complete. Raises on every rank when any fails."""
    staging = staging_of(job.final)
    if not may_stand(job, staging):
        check_destination(job.destination, job.plan, force)
        check_space(job.destination, job.plan)
    team = Team(launch, job.progress)
    part = _Part(replace(job, threads=job.threads or _threads(launch), progress=team.done), spread, staging, team, tell)
    with ExitStack() as lock:
        refusal = _lock(lock, job.final) if launch.is_first else None
        try:
            team.join(board_of(launch, staging, team.process), _agreement(job, launch, spread), refusal)
            if refusal is not None:
                raise refusal
            return part.lead() if launch.is_first else part.follow()
        except BaseException as error:
            explained_error = explained(error, job.destination) if isinstance(error, OSError) else error
            raised = team.fail(explained_error, clears=isinstance(error, InputError))
            if raised is error:
                raise
            raise raised from error
        finally:
            team.leave(staging if launch.is_first and refusal is None else None)


def _lock(lock: ExitStack, final: Path) -> Exception | None:
    """Hold the staging directory as long as `lock` lasts; why that cannot be."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock.enter_context(staged(final))
    except (OutputError, OSError) as error:
        return error
    return None


def _threads(launch: Launch) -> int:
    return max(1, default_threads() // launch.local_size)


def _agreement(job: Job, launch: Launch, spread: Spread) -> dict[str, str]:
    """What all ranks must have in common, by what it is called. Inodes are not: file systems may number them anew on
    each host."""
    temporary = {leaf.path for leaf in _extents(job.plan) if isinstance(leaf, ScratchExtent)}
    source = [stamp[:3] for stamp in job.stamp if stamp[0] not in temporary]
    return {
        "version": __version__,
        "number of ranks": str(launch.world_size),
        "output": str(job.final),
        "source": _digest_of(source),
        "options": _digest_of((sorted(job.plan.facts.items(), key=str), spread)),
        "plan": layout(job.plan),
    }


def _digest_of(value: object) -> str:
    return xxhash.xxh3_128_hexdigest(repr(value).encode())


def _extents(plan: Plan) -> Iterator[Extent]:
    return (leaf.extent for *_, tensor in plan.tensors() for leaf in leaves(tensor))


class _Report(msgspec.Struct, frozen=True):
    """What one rank did, and at last all of them."""

    num_checked: int
    kept_nbytes: int
    told: tuple[str, ...]

    def __add__(self, other: _Report) -> _Report:
        return _Report(
            self.num_checked + other.num_checked, self.kept_nbytes + other.kept_nbytes, self.told + other.told
        )

    def checked(self, ledger: Ledger) -> _Report:
        """With the records that a ledger has confirmed at last."""
        return self + _Report(ledger.num_checked, 0, ())


class _Run(msgspec.Struct, frozen=True, array_like=True):
    """A part of a record of the source that a rank has read, for the first to put together: see `Ledger`."""

    path: str
    offset: int
    start: int
    stop: int
    crc: int
    name: str


@dataclass(frozen=True, slots=True)
class _Part:
    """What a rank has to do in a run, and with whom."""

    job: Job
    spread: Spread
    staging: Path
    team: Team
    tell: Callable[[], Sequence[str]]

    def lead(self) -> Done:
        """The part of the first rank, which begins and commits."""
        job, team = self.job, self.team
        stands = standing(job, self.staging) if may_stand(job, self.staging) else None
        if stands is not None:
            report = _Report(0, job.plan.nbytes, ())
            team.say(Phase.COMMITTED, msgspec.to_builtins(report))
            return _done(stands, report)
        journal = Journal(self.staging, job.fingerprint)
        try:
            folder = self.staging / "files"
            if journal.committing is not None and journal.committing != inode(payload_of(job.plan, folder)):
                shutil.rmtree(folder, ignore_errors=True)
            digests, report = self._lead_filling(journal, folder)
            team.say(Phase.COMMITTING)
            team.check()
            journal.note_commit(inode(payload_of(job.plan, folder)))
        finally:
            journal.close()
        commit(job.plan, folder, job.final)
        team.say(Phase.COMMITTED, msgspec.to_builtins(report))
        return _done(digests, report)

    def _lead_filling(self, journal: Journal, folder: Path) -> tuple[dict[tuple[str, int], Digest], _Report]:
        job, team, mover = self.job, self.team, self._mover()
        share = share_of(job.plan, journal.known, team.launch, self.spread)
        with opened(job.plan.files, folder) as fds:
            (self.staging / "run").write_text(team.process)
            team.say(Phase.READY)
            digests, report = self._fill(share, fds, mover)
            for rank, facts in team.wait_for_all(Phase.FILLED).items():
                report += msgspec.convert(facts, _Report)
                digests |= JournalRead(journal_lines(part_journal(self.staging, rank))).known
                self._take_runs(rank, mover.ledger)
            _check_all_are_done(job.plan, digests)
            mover.ledger.settle(mover.files)
            journal.note_all(digests)
            mine = {path: fd for path, fd in fds.items() if share.owners.get(path, 0) == 0}
            write_constants(job.plan.files, mine, digests)
            write_seals(job.plan, fds, digests)
            flush(fds)
        flush_names(job.plan, folder)
        check_unchanged(job)
        return digests, report.checked(mover.ledger)

    def follow(self) -> Done:
        """The part of any other rank."""
        job, team = self.job, self.team
        digests: dict[tuple[str, int], Digest] = {}
        phase, _ = team.wait_for_first(Phase.READY)
        if phase < Phase.COMMITTED:
            self._check_shared()
            known = JournalRead(journal_lines(self.staging / "journal")).known
            share = share_of(job.plan, known, team.launch, self.spread)
            mover = self._mover()
            with opened(share.files, self.staging / "files", _reopened) as fds:
                digests, report = self._fill(share, fds, mover)
                mine = [file for file in share.files if share.owners.get(file.path, 0) == team.launch.rank]
                write_constants(mine, fds, {})
                flush(fds)
            check_unchanged(job)
            self._give_runs(mover)
            team.say(Phase.FILLED, msgspec.to_builtins(report.checked(mover.ledger)))
        _, facts = team.wait_for_first(Phase.COMMITTED)
        return _done(digests, msgspec.convert(facts, _Report))

    def _mover(self) -> Mover:
        return Mover(self.job.progress, self.job.block_nbytes)

    def _fill(
        self, share: Share, fds: Mapping[str, int], mover: Mover
    ) -> tuple[dict[tuple[str, int], Digest], _Report]:
        """Bring the tensors of this rank to their places, and note them in its own journal."""
        journal = PartJournal(self.staging, self.job.fingerprint, self.team.launch.rank)
        try:
            digests, kept = carry(self.job, share.tasks, fds, journal.known, journal.note, mover)
            if kept:
                journal.note_all(digests)
        finally:
            journal.close()
        return digests, _Report(0, kept, tuple(self.tell()))

    def _give_runs(self, mover: Mover) -> None:
        """Leave to the first rank what others have read of the same records; what nobody else can see stays here."""
        given = mover.ledger.give()
        if len(given) > _MAX_RUNS:
            kept, given = given, []
        else:
            kept = [run for run in given if isinstance(run[0], ScratchExtent)]
        for run in kept:
            mover.ledger.take(*run)
        mover.ledger.settle(mover.files)
        runs = [
            _Run(extent.path, extent.offset, start, stop, crc, name)
            for extent, start, stop, crc, name in given
            if not isinstance(extent, ScratchExtent)
        ]
        self.team.put("runs", msgspec.json.encode(runs))

    def _take_runs(self, rank: int, ledger: Ledger) -> None:
        note = self.team.get("runs", rank)
        runs = [] if note is None else msgspec.json.decode(note, type=list[_Run])
        if not runs:
            return
        extents = {(e.path, e.offset): e for e in _extents(self.job.plan) if e.crc32 is not None}
        for run in runs:
            ledger.take(extents[run.path, run.offset], run.start, run.stop, run.crc, run.name)

    def _check_shared(self) -> None:
        """Raise OutputError unless this rank sees the staging directory that the first one made."""
        until = time.monotonic() + self.team.launch.silence_timeout_s
        while True:
            try:
                if (self.staging / "run").read_text() == self.team.run:
                    return
                os.listdir(self.staging)  # has a network file system look again
            except OSError:
                pass
            self.team.check()
            if time.monotonic() > until:
                raise OutputError(
                    f"{self.staging} on {hostname()} is not what rank 0 made there",
                    hint="the output must be on a file system that all ranks share",
                )
            time.sleep(0.1)


def _done(digests: dict[tuple[str, int], Digest], report: _Report) -> Done:
    return Done(digests, report.num_checked, report.kept_nbytes, report.told)


def _reopened(path: Path, nbytes: int) -> int:
    """A file that the first rank has made. Nothing is allocated here: some file systems write zeros for that."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    if os.fstat(fd).st_size != nbytes:
        os.close(fd)
        raise OutputError(f"{path} on {hostname()} has not the {nbytes} bytes that rank 0 gave it")
    return fd


def _check_all_are_done(plan: Plan, digests: Mapping[tuple[str, int], Digest]) -> None:
    missing = [f"{task.name or task.file.path}" for task in tasks(plan) if (task.file.path, task.index) not in digests]
    if missing:
        raise AssertionError(f"no rank has noted {listed(missing)}")
