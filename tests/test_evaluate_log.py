"""`evals.jsonl` has every metric once, whatever happens to whoever writes it; loggers derive from it."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reshard.errors import InputError
from reshard.evaluate.log import Delivery, Journal, read
from reshard.evaluate.loggers import Point, open_logger, require
from reshard.evaluate.metrics import Metric
from reshard.evaluate.records import Key, New, State
from reshard.evaluate.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "evals.sqlite")


def measured(store: Store, step: int, value: float = 0.5) -> None:
    job, _ = store.add(New(Key("run", step, "regular", str(step)), State.RUNNING))
    store.measured(job, [Metric("t", "acc", "none", value), Metric("t", "acc", "strict", value)])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_step_task_metric_and_filter(store: Store, tmp_path: Path) -> None:
    measured(store, 500)
    journal = Journal(tmp_path / "evals.jsonl", store)
    journal.write()
    journal.settle()
    first, second = rows(journal.path)
    assert (first["step"], first["task"], first["metric"], first["filter"]) == (500, "t", "acc", "none")
    assert (first["name"], second["name"]) == ("eval/t/acc", "eval/t/acc.strict")
    assert store.jobs()[0].state == State.DONE


def test_results_come_in_any_order_each_at_its_step(store: Store, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "evals.jsonl", store)
    for step in (300, 100, 200):
        measured(store, step)
        journal.write()
    assert [row["step"] for row in rows(journal.path)] == [300, 300, 100, 100, 200, 200]


def test_a_line_that_was_cut_short_is_written_again(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "evals.jsonl"
    measured(store, 100)
    Journal(path, store).write()
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[1]), 9):
        path.write_bytes(whole[:-cut])
        with store.transaction() as connection:
            connection.execute("UPDATE results SET logged = 0")
        Journal(path, store).write()
        assert path.read_bytes() == whole


def test_what_the_file_has_is_not_written_again_though_the_store_does_not_know(store: Store, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "evals.jsonl", store)
    measured(store, 100)
    journal.write()
    with store.transaction() as connection:
        connection.execute("UPDATE results SET logged = 0")
    assert Journal(journal.path, store).write() == []
    assert len(rows(journal.path)) == 2


def test_two_writers_write_each_result_once(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "evals.jsonl"
    one, two = Journal(path, store), Journal(path, Store(store.path))
    for step in range(1, 11):
        measured(store, step)
        (one if step % 2 else two).write()
        (two if step % 2 else one).write()
    assert sorted(row["step"] for row in rows(path)) == sorted([*range(1, 11)] * 2)


def test_a_full_disk_leaves_whole_lines_and_nothing_is_lost(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "evals.jsonl", store)
    measured(store, 100)
    journal.write()
    measured(store, 200)
    real = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        real(fd, bytes(data)[:20], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            journal.write()
    assert [row["step"] for row in rows(journal.path)] == [100, 100]
    journal.write()
    assert [row["step"] for row in rows(journal.path)] == [100, 100, 200, 200]


def test_numbers_that_json_lacks_come_back(store: Store, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "evals.jsonl", store)
    measured(store, 100, math.nan)
    measured(store, 200, math.inf)
    journal.write()
    values = [result.value for _, result in read(journal.path)]
    assert math.isnan(values[0])
    assert values[2] == math.inf


def test_the_store_is_made_again_from_the_file(store: Store, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "evals.jsonl", store)
    measured(store, 100)
    journal.write()
    fresh = Store(tmp_path / "fresh.sqlite")
    assert Journal(journal.path, fresh).restore() == 2
    assert [(r.step, r.name, r.logged) for r in fresh.results()] == [(100, "t/acc", True), (100, "t/acc.strict", True)]


# ---------------------------------------------------------------------------------------------------------- loggers


class Recorder:
    """A logger that fails at first."""

    def __init__(self, failures: int = 0) -> None:
        self.points: list[Point] = []
        self.failures = failures

    def log(self, points: Sequence[Point]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("nobody there")
        self.points += points

    def close(self) -> None:
        return None


def delivered(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> Delivery:
    module = ModuleType("reshard.evaluate.loggers.recorder")
    module.make = lambda run, folder, options: recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("reshard.evaluate.log._LOOK_S", 0.02)
    monkeypatch.setattr("reshard.evaluate.log._RETRY_S", (0.02, 0.1))
    delivery = Delivery("recorder", tmp_path / "evals.jsonl", store, tmp_path, {}, tmp_path)
    delivery.start()
    return delivery


def test_a_logger_gets_every_point_once_across_restarts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    for step in (200, 100):
        measured(store, step)
        Journal(tmp_path / "evals.jsonl", store).write()
        assert delivered(store, tmp_path, monkeypatch, recorder).finish(5) == 0
    assert [(p.step, p.name) for p in recorder.points] == [
        (200, "eval/t/acc"), (200, "eval/t/acc.strict"), (100, "eval/t/acc"), (100, "eval/t/acc.strict"),
    ]  # fmt: skip


def test_a_logger_that_fails_is_tried_again_and_says_what_is_left(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(failures=1000)
    measured(store, 100)
    Journal(tmp_path / "evals.jsonl", store).write()
    delivery = delivered(store, tmp_path, monkeypatch, recorder)
    time.sleep(0.2)
    assert delivery.finish(0.1) == 2
    assert delivery.problem == "ConnectionError: nobody there"
    recorder.failures = 1
    assert delivered(store, tmp_path, monkeypatch, recorder).finish(5) == 0
    assert len(recorder.points) == 2


def test_a_logger_that_is_not_installed_is_named_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.evaluate.loggers.find_spec", lambda name: None)
    with pytest.raises(InputError, match="wandb is not installed") as caught:
        require("wandb", {})
    assert "pip install wandb" in str(caught.value.hint)


def test_a_setting_that_a_logger_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="unknown dir"):
        require("tensorboard", {"dir": "x"})


POINTS = [
    Point(200, "eval/t/acc", 0.5, 1000.0), Point(100, "eval/t/acc", 0.25, 1001.0),
    Point(100, "eval/t,x/exact_match.strict-match@8", 0.75, 1001.0),
]  # fmt: skip


def twice(name: str, folder: Path, options: dict[str, Any]) -> None:
    """Log the points, and again as after a kill that came before the cursor moved."""
    for _ in range(2):
        logger = open_logger(name, Path("/runs/mine"), folder, options)
        logger.log(POINTS)
        logger.close()


def test_tensorboard_has_every_point_once_at_its_step(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    twice("tensorboard", tmp_path, {})
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(scalar.step, scalar.value) for scalar in found.Scalars("eval/t/acc")] == [(200, 0.5), (100, 0.25)]


@pytest.mark.filterwarnings("ignore")  # MLflow's own, of the libraries below it
def test_mlflow_has_every_point_once_under_a_name_that_it_takes(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    twice("mlflow", tmp_path, {"tracking_uri": uri})
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    history = client.get_metric_history(run.info.run_id, "eval/t/acc")
    assert sorted((metric.step, metric.value) for metric in history) == [(100, 0.25), (200, 0.5)]
    assert "eval/t_x/exact_match.strict-match_8" in run.data.metrics


def test_wandb_keeps_rows_of_earlier_steps_in_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reshard.evaluate.loggers import wandb

    class Run:
        def __init__(self) -> None:
            self.axes: dict[str, Any] = {}
            self.rows: list[dict[str, Any]] = []

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            self.axes[name] = step_metric

        def log(self, row: dict[str, Any]) -> None:
            self.rows.append(row)

    run = Run()
    wandb.Wandb(run).log(POINTS)
    assert run.axes["eval/*"] == "eval/step"
    assert [row["eval/step"] for row in run.rows] == [100, 200]
