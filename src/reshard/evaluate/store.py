"""What is known, in one SQLite file: jobs, their attempts, their results, who holds what and how far each logger is.

    jobs       (run, step, kind, fingerprint) unique   state, reason, attempts, job id, output, lease: owner, expires
    attempts   (job, number)                           output, job id, state, reason, when
    results    (run, step, kind, task, metric, filter) unique   value, whether it is in evals.jsonl
    cursors    name                                    how far a logger has read, and who holds it

A job is changed by the owner of its lease alone: whoever lost it, because the process slept too long, gets LeaseLost
and changes nothing. The watcher keeps such a file in the run directory, the server has one as its queue.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from reshard.errors import ReshardError
from reshard.evaluate.database import Database
from reshard.evaluate.lease import LEASE_S, is_dead
from reshard.evaluate.metrics import Metric
from reshard.evaluate.records import FINAL, Attempt, Job, Key, New, Result, State

_JOB = ", ".join(f.name for f in fields(Job))
_ATTEMPT = ", ".join(f.name for f in fields(Attempt))
_RESULT = ", ".join(f.name for f in fields(Result))
_CHANGEABLE = {f.name for f in fields(Job)} - {"id", "run", "step", "kind", "created", "changed", "owner", "expires"}


class LeaseLost(ReshardError):
    """Somebody else holds the job by now; nothing was changed."""


class Store(Database):
    """What is known, in a file that is open. It may be used from any thread."""

    # -------------------------------------------------------------------------------------------------------- jobs

    def add(self, new: New) -> tuple[Job, bool]:
        """The job of a key, and whether it was made now; one that is there stays as it is."""
        key, now = new.key, time.time()
        row = (key.run, key.step, key.kind, key.fingerprint, new.state, new.reason, new.source,
               json.dumps(dict(new.files)), json.dumps(dict(new.payload)), now, now)  # fmt: skip
        with self.transaction() as connection:
            made = connection.execute(
                "INSERT OR IGNORE INTO jobs (run, step, kind, fingerprint, state, reason, source, files, payload,"
                " created, changed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            ).rowcount
            job = self.find(key)
        assert job is not None
        return job, bool(made)

    def find(self, key: Key) -> Job | None:
        """The job of a key."""
        found = self._jobs(
            "run = ? AND step = ? AND kind = ? AND fingerprint = ?", key.run, key.step, key.kind, key.fingerprint
        )
        return found[0] if found else None

    def job(self, id: int) -> Job | None:
        """The job with this number."""
        found = self._jobs("id = ?", id)
        return found[0] if found else None

    def by_fingerprint(self, fingerprint: str) -> Job | None:
        """The job of the server with this id."""
        found = self._jobs("fingerprint = ?", fingerprint)
        return found[0] if found else None

    def jobs(
        self, states: Iterable[State] | None = None, *, run: str | None = None, step: int | None = None
    ) -> list[Job]:
        """All jobs, or those in some states, of a run, of a step; oldest first."""
        where, values = ["1"], list[Any]()
        if states is not None:
            chosen = sorted(states)
            where.append(f"state IN ({', '.join('?' * len(chosen))})")
            values += chosen
        for column, value in (("run", run), ("step", step)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        return self._jobs(" AND ".join(where), *values)

    def with_models(self, run: str) -> list[Job]:
        """The jobs of a run whose whole models are there, or are being made."""
        return self._jobs("run = ? AND merged != ''", run)

    def newest(self, limit: int, states: Iterable[State] | None = None, *, before: int | None = None) -> list[Job]:
        """The newest jobs, or those in some states, of those older than the one with the number `before`."""
        where, values = ["1"], list[Any]()
        if states is not None:
            values += sorted(states)
            where.append(f"state IN ({', '.join('?' * len(values))})")
        if before is not None:
            where.append("id < ?")
            values.append(before)
        rows = self._all(
            f"SELECT {_JOB} FROM jobs WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?", *values, limit
        )
        return [_job(row) for row in rows]

    def ids(self, states: Iterable[State]) -> list[str]:
        """The server's ids of its jobs in some states, oldest first."""
        chosen = sorted(states)
        marks = ", ".join("?" * len(chosen))
        rows = self._all(f"SELECT fingerprint FROM jobs WHERE state IN ({marks}) ORDER BY id", *chosen)
        return [str(row[0]) for row in rows]

    def counts(self) -> dict[State, int]:
        """How many jobs there are in each state that has any."""
        return {State(row[0]): int(row[1]) for row in self._all("SELECT state, count(*) FROM jobs GROUP BY state")}

    def count(self, states: Iterable[State], *, before: int | None = None) -> int:
        """How many jobs are in some states; of those that are older than the one with the number `before`."""
        chosen = sorted(states)
        where = f"state IN ({', '.join('?' * len(chosen))})" + ("" if before is None else " AND id < ?")
        values = chosen if before is None else [*chosen, before]
        return int(self._all(f"SELECT count(*) FROM jobs WHERE {where}", *values)[0][0])

    def version(self) -> int:
        """A number that is another one after any other connection has changed anything."""
        return int(self._all("PRAGMA data_version")[0][0])

    def _jobs(self, where: str, *values: Any) -> list[Job]:
        return [_job(row) for row in self._all(f"SELECT {_JOB} FROM jobs WHERE {where} ORDER BY id", *values)]

    # ------------------------------------------------------------------------------------------------------ leases

    def claim(
        self, states: Iterable[State], owner: str, *, limit: int = 1, run: str | None = None, lease_s: float = LEASE_S
    ) -> list[Job]:
        """Jobs in some states that nobody holds, the oldest first, held by `owner` from now on.

        A lease that expired, and one whose owner is a process of this machine that ended, count for nothing.
        """
        chosen, now = sorted(states), time.time()
        marks = ", ".join("?" * len(chosen))
        of_run = "" if run is None else "AND run = ?"
        values = [*chosen, now, *([] if run is None else [run])]
        with self.transaction() as connection:
            free, alive = list[int](), dict[str, bool]()
            for id, holder, expires in connection.execute(
                f"SELECT id, owner, expires FROM jobs WHERE state IN ({marks}) AND not_before <= ? {of_run}"
                " ORDER BY id",
                values,
            ):
                if len(free) == limit:
                    break
                if holder == owner:
                    continue
                if holder and expires > now and not alive.setdefault(holder, is_dead(holder)):
                    continue
                free.append(id)
            connection.executemany(
                "UPDATE jobs SET owner = ?, expires = ? WHERE id = ?", [(owner, now + lease_s, id) for id in free]
            )
            return [job for id in free if (job := self.job(id)) is not None]

    def take(self, job: Job, owner: str, lease_s: float = LEASE_S) -> bool:
        """Whether `owner` holds this very job from now on, because nobody else does."""
        with self.transaction() as connection:
            now = self.job(job.id)
            if now is None or now.state != job.state:
                return False
            if now.owner not in ("", owner) and now.expires > time.time() and not is_dead(now.owner):
                return False
            connection.execute(
                "UPDATE jobs SET owner = ?, expires = ? WHERE id = ?", (owner, time.time() + lease_s, job.id)
            )
        return True

    def let_go(self, job: Job, owner: str) -> None:
        """Hold a job no longer."""
        with self.transaction() as connection:
            connection.execute("UPDATE jobs SET owner = '', expires = 0 WHERE id = ? AND owner = ?", (job.id, owner))

    def held_by(self, owner: str) -> list[Job]:
        """The jobs that an owner holds, oldest first."""
        return self._jobs("owner = ?", owner)

    def renew(self, owner: str, lease_s: float = LEASE_S) -> None:
        """Prolong everything that an owner holds."""
        with self.transaction() as connection:
            for table in ("jobs", "cursors"):
                connection.execute(f"UPDATE {table} SET expires = ? WHERE owner = ?", (time.time() + lease_s, owner))

    def release(self, owner: str) -> None:
        """Let go of everything that an owner holds."""
        with self.transaction() as connection:
            for table in ("jobs", "cursors"):
                connection.execute(f"UPDATE {table} SET owner = '', expires = 0 WHERE owner = ?", (owner,))

    def change(self, job: Job, owner: str | None = None, **columns: Any) -> Job:
        """The job with other values, the lease given up when the state is final.

        With an owner, raises LeaseLost unless the owner holds it.
        """
        with self.transaction():
            return self._change(job, owner, columns)

    def _change(self, job: Job, owner: str | None, columns: dict[str, Any]) -> Job:
        """The same, inside a transaction."""
        unknown = set(columns) - _CHANGEABLE
        if unknown:
            raise ValueError(f"no columns of a job: {unknown}")
        for name in ("files", "payload"):
            if name in columns:
                columns[name] = json.dumps(dict(columns[name]))
        columns["changed"] = time.time()
        if columns.get("state") in FINAL:
            columns |= {"owner": "", "expires": 0.0}
        assignments = ", ".join(f"{name} = ?" for name in columns)
        held = "" if owner is None else " AND owner = ?"
        values = (*columns.values(), job.id, *(() if owner is None else (owner,)))
        if self._connection().execute(f"UPDATE jobs SET {assignments} WHERE id = ?{held}", values).rowcount != 1:
            raise LeaseLost(f"step {job.step}: another process holds it")
        changed = self.job(job.id)
        assert changed is not None
        return changed

    def drop(self, job: Job, owner: str | None = None) -> None:
        """Forget a job that came to nothing."""
        with self.transaction() as connection:
            self._change(job, owner, {"reason": job.reason})
            connection.execute("DELETE FROM attempts WHERE job = ?", (job.id,))
            connection.execute("DELETE FROM jobs WHERE id = ?", (job.id,))

    # ---------------------------------------------------------------------------------------------------- attempts

    def begin_attempt(self, job: Job, output: Path, owner: str | None = None) -> Job:
        """The job with one more attempt, about to be sent: this is known before anything is sent."""
        number, now = job.attempts + 1, time.time()
        with self.transaction() as connection:
            columns = {"attempts": number, "output": str(output), "job_id": "", "began": now, "reason": ""}
            changed = self._change(job, owner, {"state": State.SUBMITTING, **columns})
            connection.execute(
                "INSERT INTO attempts (job, number, output, state, began) VALUES (?, ?, ?, ?, ?)",
                (job.id, number, str(output), State.SUBMITTING, now),
            )
        return changed

    def sent(self, job: Job, job_id: str, owner: str | None = None) -> Job:
        """The job with the id that the backend gave it."""
        with self.transaction() as connection:
            changed = self._change(job, owner, {"state": State.RUNNING, "job_id": job_id, "reason": ""})
            connection.execute(
                "UPDATE attempts SET job_id = ?, state = ? WHERE job = ? AND number = ?",
                (job_id, State.RUNNING, job.id, job.attempts),
            )
        return changed

    def end_attempt(self, job: Job, ended: str, reason: str, owner: str | None = None, **columns: Any) -> Job:
        """The job with its last attempt ended like this, and with other values."""
        with self.transaction() as connection:
            changed = self._change(job, owner, {"reason": reason, **columns})
            connection.execute(
                "UPDATE attempts SET state = ?, reason = ?, ended = ? WHERE job = ? AND number = ? AND ended = 0",
                (ended, reason, time.time(), job.id, job.attempts),
            )
        return changed

    def attempts(self, job: Job) -> list[Attempt]:
        """All attempts of a job, the first first."""
        rows = self._all(f"SELECT {_ATTEMPT} FROM attempts WHERE job = ? ORDER BY number", job.id)
        return [Attempt(*row) for row in rows]

    def spent_attempts(self, run: str) -> list[Attempt]:
        """Of the jobs of a run that ended, the attempts that do not count and whose outputs may be there."""
        ended, displaced = sorted(FINAL), sorted((State.SUPERSEDED, State.SAME, State.REWRITTEN))
        columns = ", ".join(f"attempts.{name}" for name in _ATTEMPT.split(", "))
        rows = self._all(
            f"SELECT {columns} FROM attempts JOIN jobs ON jobs.id = attempts.job WHERE jobs.run = ?"
            f" AND jobs.state IN ({', '.join('?' * len(ended))}) AND attempts.output != ''"
            f" AND (attempts.number != jobs.attempts OR jobs.state IN ({', '.join('?' * len(displaced))}))"
            " ORDER BY attempts.job, attempts.number",
            run, *ended, *displaced,
        )  # fmt: skip
        return [Attempt(*row) for row in rows]

    def output_removed(self, attempt: Attempt) -> None:
        """The output directory of an attempt is gone."""
        with self.transaction() as connection:
            where = (attempt.job, attempt.number)
            connection.execute("UPDATE attempts SET output = '' WHERE job = ? AND number = ?", where)
            connection.execute("UPDATE jobs SET output = '' WHERE id = ? AND attempts = ?", where)

    # ----------------------------------------------------------------------------------------------------- results

    def measured(self, job: Job, metrics: Sequence[Metric], owner: str | None = None) -> Job:
        """The job with its results, those that the step has already left as they are."""
        now = time.time()
        rows = [
            (job.run, job.step, job.kind, m.task, m.metric, m.filter, m.value, job.fingerprint, job.id, now)
            for m in metrics
        ]
        with self.transaction() as connection:
            changed = self.end_attempt(job, State.DONE, "", owner, state=State.MEASURED)
            connection.executemany(
                "INSERT OR IGNORE INTO results (run, step, kind, task, metric, filter, value, fingerprint, job, time)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
        return changed

    def restore(self, results: Iterable[Result]) -> int:
        """Take over results that are logged and not here, as after the loss of this file; gives their number."""
        count = 0
        with self.transaction() as connection:
            for r in results:
                row = (*r.key, r.value, r.fingerprint, r.job, r.time, 1)
                count += connection.execute(
                    f"INSERT OR IGNORE INTO results ({_RESULT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row
                ).rowcount
        return count

    def results(self, *, run: str | None = None, step: int | None = None) -> list[Result]:
        """All results, or those of a run, of a step; by step and name."""
        where, values = ["1"], list[Any]()
        for column, value in (("run", run), ("step", step)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        return self._results(" AND ".join(where), *values)

    def unlogged(self) -> list[Result]:
        """Results that may not be in evals.jsonl yet."""
        return self._results("logged = 0")

    def mark_logged(self, results: Iterable[Result]) -> None:
        """These are in evals.jsonl."""
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE results SET logged = 1 WHERE run = ? AND step = ? AND kind = ? AND task = ? AND metric = ?"
                " AND filter = ?",
                [r.key for r in results],
            )

    def _results(self, where: str, *values: Any) -> list[Result]:
        rows = self._all(
            f"SELECT {_RESULT} FROM results WHERE {where} ORDER BY step, kind, task, metric, filter", *values
        )
        return [_result(row) for row in rows]

    # ------------------------------------------------------------------------------------------------ cursors, meta

    def claim_cursor(self, name: str, owner: str, lease_s: float = LEASE_S) -> int | None:
        """How far a logger has read, held by `owner` from now on; None while somebody else holds it."""
        now = time.time()
        with self.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO cursors (name) VALUES (?)", (name,))
            offset, holder, expires = connection.execute(
                "SELECT offset, owner, expires FROM cursors WHERE name = ?", (name,)
            ).fetchone()
            if holder not in ("", owner) and expires > now and not is_dead(holder):
                return None
            connection.execute("UPDATE cursors SET owner = ?, expires = ? WHERE name = ?", (owner, now + lease_s, name))
            return int(offset)

    def cursor(self, name: str) -> int:
        """How far a logger has read."""
        found = self._all("SELECT offset FROM cursors WHERE name = ?", name)
        return int(found[0][0]) if found else 0

    def move_cursor(self, name: str, owner: str, offset: int) -> None:
        """A logger has read this far. Raises LeaseLost unless the owner holds it."""
        with self.transaction() as connection:
            moved = connection.execute(
                "UPDATE cursors SET offset = ?, reason = '' WHERE name = ? AND owner = ?", (offset, name, owner)
            ).rowcount
            if not moved:
                raise LeaseLost(f"logger {name}: another process holds it")

    def meta(self, key: str, default: str = "") -> str:
        """A fact about the file; the default is written where there is none, so all get the same."""
        found = self._all("SELECT value FROM meta WHERE key = ?", key)
        if not found:
            with self.transaction() as connection:
                connection.execute("INSERT OR IGNORE INTO meta (key, value) VALUES (?, ?)", (key, default))
            found = self._all("SELECT value FROM meta WHERE key = ?", key)
        return str(found[0][0])


def _job(row: Sequence[Any]) -> Job:
    values = dict(zip((f.name for f in fields(Job)), row, strict=True))
    return Job(
        **values | {
            "state": State(values["state"]),
            "files": json.loads(values["files"]),
            "payload": json.loads(values["payload"]),
        }
    )  # fmt: skip


def _result(row: Sequence[Any]) -> Result:
    values = dict(zip((f.name for f in fields(Result)), row, strict=True))
    value = math.nan if values["value"] is None else values["value"]
    return Result(**values | {"value": value, "logged": bool(values["logged"])})


__all__ = ["LeaseLost", "Store"]
