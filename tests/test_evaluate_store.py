"""What is known survives whoever is killed, and is changed by the one who holds it."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from reshard.errors import Corrupt, InputError, Unsupported
from reshard.evaluate.config import config_of
from reshard.evaluate.keep import best, kept, scores
from reshard.evaluate.lease import is_dead, new_owner
from reshard.evaluate.metrics import Metric, metrics_of
from reshard.evaluate.records import FINAL, Key, New, Result, State
from reshard.evaluate.store import LeaseLost, Store

READY = [State.READY]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "evals.sqlite")


def added(store: Store, step: int, state: State = State.READY):  # type: ignore[no-untyped-def]
    return store.add(New(Key("run", step, "regular", f"fingerprint {step}"), state))[0]


def test_a_key_has_one_job(store: Store) -> None:
    first, made = store.add(New(Key("run", 5), State.SEEN, "/checkpoint-5"))
    again, made_again = store.add(New(Key("run", 5), State.READY, "/elsewhere"))
    assert (made, made_again, again) == (True, False, first)


def test_a_job_is_held_by_one_at_a_time(store: Store) -> None:
    job = added(store, 5)
    assert [j.id for j in store.claim(READY, "a b c d")] == [job.id]
    assert store.claim(READY, "e f g h") == []
    store.release("a b c d")
    assert [j.id for j in store.claim(READY, "e f g h")] == [job.id]


def test_a_lease_that_expired_counts_for_nothing(store: Store) -> None:
    added(store, 5)
    store.claim(READY, "elsewhere 1 2 3", lease_s=-1)
    assert len(store.claim(READY, "me 1 2 3")) == 1


def test_who_lost_a_lease_changes_nothing(store: Store) -> None:
    added(store, 5)
    (job,) = store.claim(READY, "slow 1 2 3", lease_s=-1)
    store.claim(READY, "quick 1 2 3")
    with pytest.raises(LeaseLost):
        store.change(job, "slow 1 2 3", state=State.DONE)
    assert store.jobs()[0].state == State.READY


def test_the_lease_of_a_process_that_ended_is_free_at_once(store: Store) -> None:
    code = (
        "import sys; from pathlib import Path; from reshard.evaluate.store import Store\n"
        "from reshard.evaluate.records import State\n"
        "from reshard.evaluate.lease import new_owner\n"
        "s = Store(Path(sys.argv[1])); o = new_owner(); s.claim([State.READY], o); print(o, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    added(store, 5)
    died = subprocess.run([sys.executable, "-c", code, str(store.path)], capture_output=True, text=True)
    owner = died.stdout.strip()
    assert store.jobs()[0].owner == owner
    assert is_dead(owner)
    assert len(store.claim(READY, new_owner())) == 1


def test_of_other_machines_and_of_living_processes_nobody_is_dead() -> None:
    mine = new_owner()
    machine, pid, start, random = mine.split(" ")
    assert not is_dead(mine)
    assert not is_dead(f"elsewhere {pid} 1 {random}")
    assert is_dead(f"{machine} {pid} {int(start) - 1} {random}")
    assert not is_dead("nonsense")


def test_many_threads_claim_each_job_once(store: Store) -> None:
    for step in range(60):
        added(store, step)
    claimed: list[int] = []

    def work(name: str) -> None:
        while jobs := store.claim(READY, name):
            store.change(jobs[0], name, state=State.DONE)
            claimed.append(jobs[0].id)

    threads = [threading.Thread(target=work, args=(f"machine {i} 0 0",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == [job.id for job in store.jobs([State.DONE])]
    assert len(claimed) == 60


def test_an_attempt_is_known_before_it_is_sent_and_how_it_ended(store: Store) -> None:
    job = store.begin_attempt(added(store, 5), Path("/output"))
    assert (job.state, job.attempts, job.job_id) == (State.SUBMITTING, 1, "")
    job = store.sent(job, "id-7")
    job = store.end_attempt(job, State.FAILED, "no GPU", state=State.MERGED, failures=1)
    assert (job.state, job.reason) == (State.MERGED, "no GPU")
    (attempt,) = store.attempts(job)
    assert (attempt.job_id, attempt.state, attempt.reason, attempt.ended > 0) == ("id-7", "failed", "no GPU", True)


def test_a_step_has_one_result_for_a_metric(store: Store) -> None:
    job = added(store, 5)
    store.measured(job, [Metric("t", "acc", "none", 0.5), Metric("t", "acc", "strict", math.nan)])
    store.measured(job, [Metric("t", "acc", "none", 0.9)])
    first, second = store.results()
    assert (first.name, first.value) == ("t/acc", 0.5)
    assert (second.name, math.isnan(second.value)) == ("t/acc.strict", True)


def test_a_job_that_ended_is_held_by_nobody(store: Store) -> None:
    added(store, 5)
    (job,) = store.claim(READY, "a b c d")
    assert store.change(job, "a b c d", state=State.DONE).owner == ""
    assert State.DONE in FINAL


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    def fail() -> None:
        with store.transaction():
            added(store, 5)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert store.jobs() == []


def test_a_cursor_is_moved_by_its_holder(store: Store) -> None:
    assert store.claim_cursor("wandb", "a b c d") == 0
    assert store.claim_cursor("wandb", "e f g h") is None
    store.move_cursor("wandb", "a b c d", 77)
    with pytest.raises(LeaseLost):
        store.move_cursor("wandb", "e f g h", 99)
    assert store.cursor("wandb") == 77


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE things (a)")
    connection.close()
    with pytest.raises(InputError, match="something else"):
        Store(other)


def test_a_file_of_a_later_schema_is_refused(store: Store) -> None:
    store.close()
    connection = sqlite3.connect(store.path)
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(Unsupported, match="schema 9"):
        Store(store.path)


def test_a_damaged_file_is_named_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "evals.sqlite"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(Corrupt, match=r"evals\.sqlite") as caught:
        Store(path)
    assert "evals.jsonl" in str(caught.value.hint)


# ---------------------------------------------------------------------------------------------------------- metrics


def test_metrics_keep_task_metric_and_filter_and_nothing_else_is_one() -> None:
    harness = {
        "results": {
            "gsm8k": {
                "name": "gsm8k", "alias": "gsm8k", "sample_len": 8, "exact_match,none": 0.25,
                "exact_match,strict-match": 0.5, "exact_match_stderr,none": 0.1, "exact_match_stderr_clt,none": 0.1,
                "exact_match_stderr_clustered,none": "N/A", "words,none": [1, 2], "text,none": "x", "flag,none": True,
            }
        }
    }  # fmt: skip
    assert metrics_of(harness) == (
        Metric("gsm8k", "exact_match", "none", 0.25),
        Metric("gsm8k", "exact_match", "strict-match", 0.5),
    )


def test_a_command_may_write_flat_or_nested_metrics() -> None:
    found = metrics_of({"loss": 2, "note": "x", "task": {"acc": 0.5, "acc_stderr": 0.1, "f1,strict": 0.25}})
    assert [(m.name, m.value) for m in found] == [("loss", 2.0), ("task/acc", 0.5), ("task/f1.strict", 0.25)]


def result(step: int, value: float, metric: str = "acc", filter: str = "none") -> Result:
    return Result("run", step, "regular", "t", metric, filter, value, f"fingerprint {step}", step, 0.0, True)


def test_the_best_is_the_highest_or_the_lowest_and_never_nan() -> None:
    results = [result(1, 0.5), result(2, math.nan), result(3, 0.7), result(4, 0.7), result(4, 0.1, "loss")]
    assert [r.step for r in best(results, "t/acc")] == [4, 3, 1]
    assert best(results, "t/acc", "min")[0].step == 1
    assert list(scores(results, "t/loss")) == [(4, "regular")]


def test_an_ambiguous_metric_is_refused_with_its_names() -> None:
    results = [result(1, 0.5, filter="strict"), result(1, 0.6, filter="flexible")]
    with pytest.raises(InputError, match=r"t/acc\.flexible, t/acc\.strict"):
        scores(results, "t/acc")


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"keep_merged": "none"}, set()), ({"keep_merged": "all"}, {1, 2, 3}), ({"keep_merged": "last"}, {3}),
        ({"keep_best": 2, "best_metric": "t/acc"}, {2, 3}),
        ({"keep_best": 1, "best_metric": "t/acc", "best_mode": "min"}, {1}),
    ],
)  # fmt: skip
def test_whole_models_stay_as_the_settings_say(store: Store, settings: dict[str, object], wanted: set[int]) -> None:
    config = config_of({"backend": "command", "command": "x {model}", **settings})
    for step, value in ((10, 0.1), (20, 0.9), (30, 0.5)):
        job = added(store, step)
        store.measured(job, [Metric("t", "acc", "none", value)])
        store.change(job, state=State.DONE)
    assert kept(store.jobs(), store.results(), config) == wanted


def test_the_file_is_synchronised_before_anything_is_acted_on(store: Store) -> None:
    added(store, 5)
    journal = sqlite3.connect(store.path).execute("PRAGMA journal_mode").fetchone()[0]
    assert journal == "wal"
    assert os.path.exists(f"{store.path}-wal")
