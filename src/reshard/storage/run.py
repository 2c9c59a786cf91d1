"""The engine: carry a plan out so that the destination is absent, the old one, or complete.

    staging   .NAME.reshard beside the destination holds the files, a lock and a journal: see `staging.py`
    move      a few threads take one tensor after another: read a block, check it, digest it, write it: `move.py`
    seal      constant bytes, then what depends on digests, the manifest last
    commit    flush, rename, flush the parent

The journal notes each finished segment with its digest, and at last the inode that is about to become the destination.
When the same plan is run again after it was interrupted, segments whose bytes still have that digest are kept, and a
destination that is complete already is left as it is. What the journal says is never trusted without reading the bytes.

Where several ranks were launched each does a part of this: see `cluster.py`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reshard.errors import InputError
from reshard.storage.fill import (
    Done,
    Job,
    carry,
    check_unchanged,
    fingerprint,
    flush,
    flush_names,
    may_stand,
    opened,
    source_stamp,
    standing,
    write_constants,
    write_seals,
)
from reshard.storage.launch import Spread, current
from reshard.storage.move import BLOCK_NBYTES, Mover, Progress, default_threads, digest, in_threads, tasks
from reshard.storage.plan import Digest, Plan
from reshard.storage.staging import (
    Journal,
    check_destination,
    check_space,
    clear,
    commit,
    explained,
    inode,
    payload_of,
    resolved,
    staged,
    staging_of,
)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did."""

    destination: Path
    nbytes: int
    """Of all files written."""
    num_tensors: int
    num_checked: int
    """Source records whose CRC-32 was confirmed."""
    kept_nbytes: int
    """Taken over from an interrupted run."""
    seconds: float
    digests: Mapping[tuple[str, int], Digest] = field(repr=False, default_factory=dict)
    """Of all segments; of those that it wrote itself on any but the first rank."""
    told: tuple[str, ...] = ()
    """What `tell` said, on all ranks."""
    is_first: bool = True
    """Whether this rank does what is done once."""


def run(
    plan: Plan,
    destination: Path,
    *,
    threads: int | None = None,
    block_nbytes: int = BLOCK_NBYTES,
    force: bool = False,
    progress: Progress | None = None,
    spread: Spread | None = None,
    tell: Callable[[], Sequence[str]] | None = None,
) -> Result:
    """Write the plan's files. See the module's docstring for what holds when this is interrupted.

    `tell` is asked, when all is read, what this process has to say of it. Raises OutputError for the destination's
    sake, InputError (naming file and FQN) for the source's. After an InputError nothing is left; after an interruption
    or a full disk the staging directory stays, and a second run goes on from it.
    """
    began = time.monotonic()
    stamp = source_stamp(plan)
    job = Job(
        plan, destination, resolved(destination), stamp, fingerprint(plan, stamp), threads, block_nbytes, progress
    )
    launch = current()
    tell = tell or tuple
    try:
        if launch.world_size > 1:
            from reshard.storage.cluster import run_together

            done = run_together(job, launch, force, spread or Spread(), tell)
        else:
            done = _run_alone(job, force, tell)
    except OSError as error:
        raise explained(error, destination) from error
    return Result(
        destination,
        plan.nbytes,
        sum(bool(name) for *_, name, _ in plan.tensors()),
        done.num_checked,
        done.kept_nbytes,
        time.monotonic() - began,
        done.digests,
        done.told,
        launch.is_first,
    )


def _run_alone(job: Job, force: bool, tell: Callable[[], Sequence[str]]) -> Done:
    if may_stand(job, staging_of(job.final)):
        with staged(job.final) as staging:
            digests = standing(job, staging)
            if digests is not None:
                clear(staging)
                return Done(digests, 0, job.plan.nbytes)
    check_destination(job.destination, job.plan, force)
    check_space(job.destination, job.plan)
    job.final.parent.mkdir(parents=True, exist_ok=True)
    with staged(job.final) as staging:
        try:
            done = _fill(job, staging, tell)
        except InputError:
            clear(staging)
            raise
        commit(job.plan, staging / "files", job.final)
        clear(staging)
    return done


def _fill(job: Job, staging: Path, tell: Callable[[], Sequence[str]]) -> Done:
    """Everything up to the commit, which may follow when this returns."""
    plan, folder = job.plan, staging / "files"
    journal = Journal(staging, job.fingerprint)
    try:
        if journal.committing is not None and journal.committing != inode(payload_of(plan, folder)):
            shutil.rmtree(folder, ignore_errors=True)  # what was replaced, not what was written
        mover = Mover(job.progress, job.block_nbytes)
        with opened(plan.files, folder) as fds:
            digests, kept = carry(job, tasks(plan), fds, journal.known, journal.note, mover)
            mover.ledger.settle(mover.files)
            write_constants(plan.files, fds, digests)
            write_seals(plan, fds, digests)
            flush(fds)
        flush_names(plan, folder)
        check_unchanged(job)
        journal.note_commit(inode(payload_of(plan, folder)))
        return Done(digests, mover.ledger.num_checked, kept, tuple(tell()))
    finally:
        journal.close()


__all__ = [
    "BLOCK_NBYTES",
    "Progress",
    "Result",
    "Spread",
    "default_threads",
    "digest",
    "in_threads",
    "run",
]
