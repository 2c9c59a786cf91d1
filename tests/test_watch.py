"""Every wanted checkpoint of a run is evaluated once, on its final bytes, and logged once at its step: whatever the
trainer does to it meanwhile, and whoever is killed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from reshard.cli.main import main
from reshard.errors import InputError
from reshard.evaluate.backend import Phase, Request, Status, Unavailable
from reshard.evaluate.config import Schedule, Settings, settings_of
from reshard.evaluate.metrics import Metric
from reshard.evaluate.places import Places
from reshard.evaluate.protect import hold
from reshard.evaluate.ready import whole
from reshard.evaluate.records import Key, New, State
from reshard.evaluate.scan import is_over
from reshard.evaluate.store import Store
from reshard.evaluate.watch import Watched, watch

EVALUATE = 'printf "%s\\n" "$1" >> "$2"; printf \'{"t": {"acc": %s}}\' "$1" > "$3.new"; mv "$3.new" "$3"'


def weights(step: int) -> dict[str, np.ndarray]:
    return {"model.weight": np.full((64, 16), step, "f4"), "model.bias": np.arange(16, dtype="f4")}


def save(run: Path, step: int, value: int | None = None) -> Path:
    """A checkpoint as a trainer leaves it, in place if it is there."""
    path = run / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights(step if value is None else value), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "none-that-is-known"}))
    return path


def settings(**config: Any) -> Settings:
    block = {"backend": "command", "command": "true {model}", "poll_interval": 0.02, "retry_wait": 0.01, **config}
    return settings_of({"eval_strategy": "steps", "eval_config": block})


def with_command(tally: Path, **config: Any) -> Settings:
    """An evaluation that notes that it ran, and says its step is its score."""
    return settings(command=["sh", "-c", EVALUATE, "evaluate", "{step}", str(tally), "{output}"], **config)


class Fake:
    """A backend in this process. What it does with a request is up to the test; the score is in the weights."""

    def __init__(self, behave: Callable[[Request, int], Status] | None = None, unknown: Sequence[str] = ()) -> None:
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.polls: Counter[str] = Counter()
        self._behave, self._unknown = behave, unknown

    def check(self, tasks: Sequence[str]) -> Sequence[str]:
        return [task for task in tasks if task in self._unknown]

    def submit(self, request: Request) -> str:
        self.requests.append(request)
        return f"job-{len(self.requests)}"

    def poll(self, request: Request, job_id: str) -> Status:
        self.polls[job_id] += 1
        if self._behave is not None:
            return self._behave(request, self.polls[job_id])
        return scored(request)

    def cancel(self, request: Request, job_id: str) -> None:
        self.cancelled.append(request.step)

    def recover(self, request: Request) -> Status:
        return Status(Phase.MISSING)


def scored(request: Request) -> Status:
    value = float(load_file(request.model / "model.safetensors")["model.weight"][0, 0])
    return Status(Phase.COMPLETED, metrics=(Metric("t", "acc", "none", value),))


def logged(run: Path) -> list[tuple[int, str, float]]:
    path = run / "evals" / "evals.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(row["step"], row["name"], row["value"]) for row in map(json.loads, lines)]


def states(watched: Watched) -> dict[int, str]:
    return {job.step: str(job.state) for job in watched.jobs}


def once(run: Path, chosen: Settings, backend: Fake | None = None, **more: Any) -> Watched:
    return watch(chosen, Places.of(run), once=True, backend=backend, **more)


class Beside:
    """A watch in a thread beside the test, as one runs beside a trainer."""

    def __init__(self, run: Path, chosen: Settings, backend: Fake) -> None:
        self.run = run
        self.said: list[str] = []
        self.watched: Watched | None = None
        self._thread = threading.Thread(target=self._work, args=(chosen, backend))
        self._thread.start()

    def _work(self, chosen: Settings, backend: Fake) -> None:
        self.watched = watch(chosen, Places.of(self.run), backend=backend, say=self.said.append)

    def until(self, holds: Callable[[], object]) -> None:
        until = time.monotonic() + 120
        while not holds():
            assert time.monotonic() < until, self.said
            time.sleep(0.005)

    def end(self) -> Watched:
        """Training is over."""
        (self.run / "evals" / "training-ended").touch()
        self._thread.join(120)
        assert self.watched is not None, self.said
        return self.watched


# --------------------------------------------------------------------------------------------------------- the walk


def test_a_run_is_evaluated_at_every_wanted_step_and_then_left_alone(tmp_path: Path) -> None:
    for step in (100, 150, 200):
        save(tmp_path, step)
    chosen = settings_of({"eval_steps": 100, "eval_config": {
        "backend": "command", "poll_interval": 0.02,
        "command": ["sh", "-c", EVALUATE, "evaluate", "{step}", str(tmp_path / "tally"), "{output}"],
    }})  # fmt: skip
    assert states(once(tmp_path, chosen)) == {100: "done", 200: "done"}
    assert logged(tmp_path) == [(100, "eval/t/acc", 100.0), (200, "eval/t/acc", 200.0)]
    before = (tmp_path / "evals" / "evals.jsonl").read_bytes()
    once(tmp_path, chosen)
    assert (tmp_path / "evals" / "evals.jsonl").read_bytes() == before
    assert (tmp_path / "tally").read_text() == "100\n200\n"


def test_what_is_evaluated_are_the_weights_of_the_step(tmp_path: Path) -> None:
    save(tmp_path, 100)
    backend = Fake()
    once(tmp_path, settings(keep_merged="all"), backend)
    (request,) = backend.requests
    merged = load_file(request.model / "model.safetensors")
    assert {name: value.tobytes() for name, value in merged.items()} == {
        name: value.tobytes() for name, value in weights(100).items()
    }
    assert not list((tmp_path / "evals" / "held").iterdir())


def test_results_are_logged_in_the_order_in_which_they_come(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)

    def behave(request: Request, _: int) -> Status:
        later = {step for step, _, _ in logged(tmp_path)}
        return scored(request) if request.step == 3 or request.step + 1 in later else Status(Phase.RUNNING)

    once(tmp_path, settings(max_running=3), Fake(behave))
    assert logged(tmp_path) == [(step, "eval/t/acc", float(step)) for step in (3, 2, 1)]


def test_whole_models_that_are_not_kept_are_gone_and_the_shards_never_are(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    watched = once(tmp_path, settings(keep_best=1, best_metric="t/acc", best_mode="min"), Fake())
    assert [job.step for job in watched.jobs if job.merged] == [1]
    assert len(list((tmp_path / "evals" / "merged").iterdir())) == 1
    assert all((tmp_path / f"checkpoint-{step}" / "model.safetensors").exists() for step in (1, 2, 3))


def test_shards_are_removed_when_told_to_but_for_the_best_and_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    once(tmp_path, settings(keep_best=1, best_metric="t/acc", best_mode="min", remove_shards=True), Fake())
    left = {path.parent.name for path in tmp_path.glob("checkpoint-*/model.safetensors")}
    assert left == {"checkpoint-1", "checkpoint-3"}


def test_checkpoint_type_ema_without_averaged_weights_is_said(tmp_path: Path) -> None:
    save(tmp_path, 5)
    watched = once(tmp_path, settings(checkpoint_type="both"), Fake())
    by_kind = {job.kind: job for job in watched.jobs}
    assert (by_kind["regular"].state, by_kind["ema"].state) == (State.DONE, State.FAILED)
    assert "no averaged weights" in by_kind["ema"].reason


# ------------------------------------------------------------------------------------------- a run that is to come


def test_a_run_that_is_not_there_yet_is_waited_for_and_nothing_is_made_meanwhile(tmp_path: Path) -> None:
    run = tmp_path / "run"
    beside = Beside(run, settings(), Fake())
    beside.until(lambda: any(f"{run} is not there yet: waiting" in line for line in beside.said))
    time.sleep(0.1)
    assert not run.exists()
    run.mkdir()  # a trainer that finds something in it would refuse it
    beside.until(lambda: any(f"{run} is empty: waiting" in line for line in beside.said))
    time.sleep(0.1)
    assert list(run.iterdir()) == []
    save(run, 5)
    beside.until(lambda: logged(run))
    assert states(beside.end()) == {5: "done"}
    assert sum("waiting for the training" in line for line in beside.said) == 2


def test_a_run_that_is_not_there_is_an_error_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_settings(tmp_path / "eval.yaml", tmp_path / "tally")
    assert main(["watch", str(tmp_path / "run"), "--config", str(config), "--once"]) == 1
    assert "run: no such directory" in capsys.readouterr().err
    assert main(["evals", str(tmp_path / "run")]) == 1
    assert "run: no such directory" in capsys.readouterr().err
    assert main(["watch", str(config), "--config", str(config)]) == 1
    assert "it is no directory" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tasks_are_checked_while_a_run_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mmmu_vall"):
        watch(settings(tasks=["mmmu_vall"]), Places.of(tmp_path / "run"), backend=Fake(unknown=["mmmu_vall"]))


def test_a_watch_that_waits_for_a_run_ends_when_it_is_told_to(tmp_path: Path) -> None:
    config = write_settings(tmp_path / "eval.yaml", tmp_path / "tally")
    words = [sys.executable, "-m", "reshard", "watch", str(tmp_path / "run"), "--config", str(config)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert "is not there yet" in child.stderr.readline()
        child.send_signal(signal.SIGTERM)
        child.stderr.read()
    assert child.returncode == 0
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_cleared_and_begun_anew_is_evaluated_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, 5)
    beside = Beside(run, settings(), Fake())
    beside.until(lambda: logged(run) == [(5, "eval/t/acc", 5.0)])
    while run.exists():  # the watcher clears up there too
        shutil.rmtree(run, ignore_errors=True)
    save(run, 5, value=7)
    beside.until(lambda: logged(run) == [(5, "eval/t/acc", 7.0)])
    assert any("evals.sqlite was removed" in line for line in beside.said)
    assert states(beside.end()) == {5: "done"}


# -------------------------------------------------------------------------------------------- what the trainer does


def test_what_only_an_earlier_watch_was_asked_for_keeps_no_later_one_waiting(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "config.json").unlink()
    save(tmp_path, 4)
    assert states(once(tmp_path, settings(), Fake())) == {2: "seen", 4: "done"}
    later = Settings(Schedule(steps=4), settings().evaluation)
    watching = threading.Thread(target=once, args=(tmp_path, later, Fake()), daemon=True)
    watching.start()
    watching.join(60)
    assert not watching.is_alive()


@pytest.mark.parametrize(
    "run, steps, said",
    [
        (".", 3, "eval_steps 3 asks for none of the steps 2"),
        ("checkpoint-2", 1, "is a checkpoint itself"),
        ("checkpoint-2/logs", 1, "has no checkpoints yet"),
    ],
)
def test_a_watch_with_nothing_to_do_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str, steps: int, said: str
) -> None:
    (save(tmp_path, 2) / "logs").mkdir()
    config = tmp_path / "eval.yaml"
    config.write_text(f"eval_steps: {steps}\neval_config: {{backend: command, command: 'true'}}\n")
    assert main(["watch", str(tmp_path / run), "--config", str(config), "--once"]) == 0
    assert said in capsys.readouterr().err


def test_a_checkpoint_without_a_shard_is_not_whole_and_is_evaluated_when_it_is(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    index = {"weight_map": {"model.weight": "model-1.safetensors", "model.bias": "model-2.safetensors"}}
    (path / "model.safetensors").rename(path / "kept")
    save_file({"model.weight": weights(5)["model.weight"]}, path / "model-1.safetensors", {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    watched = once(tmp_path, settings(), Fake())
    assert [(job.state, "model-2.safetensors" in job.reason) for job in watched.problems] == [(State.SEEN, True)]
    save_file({"model.bias": weights(5)["model.bias"]}, path / "model-2.safetensors", {"format": "pt"})
    done = Fake(lambda request, _: Status(Phase.COMPLETED, metrics=(Metric("t", "acc", "none", 1.0),)))
    assert states(once(tmp_path, settings(), done)) == {5: "done"}


def test_a_file_that_still_grows_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 5) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:1000])
    backend = Fake()
    beside = Beside(tmp_path, settings(), backend)
    for end in range(1000, len(data), 400):
        path.write_bytes(data[:end])
        time.sleep(0.01)
    assert backend.requests == []
    path.write_bytes(data)
    beside.until(lambda: logged(tmp_path))
    assert states(beside.end()) == {5: "done"}


def test_a_step_that_is_saved_again_with_the_same_weights_is_evaluated_once(tmp_path: Path) -> None:
    save(tmp_path, 5)
    backend = Fake()
    once(tmp_path, settings(), backend)
    time.sleep(0.01)
    save(tmp_path, 5)
    watched = once(tmp_path, settings(), backend)
    assert [job.state for job in watched.jobs] == [State.DONE, State.SAME]
    assert len(backend.requests) == 1


def test_a_step_that_is_saved_again_while_it_is_evaluated_counts_with_its_last_bytes(tmp_path: Path) -> None:
    save(tmp_path, 5)
    backend = Fake(lambda request, _: scored(request) if len(backend.requests) > 1 else Status(Phase.RUNNING))
    beside = Beside(tmp_path, settings(), backend)
    beside.until(lambda: backend.requests)
    save(tmp_path, 5, value=77)
    beside.until(lambda: logged(tmp_path))
    watched = beside.end()
    assert logged(tmp_path) == [(5, "eval/t/acc", 77.0)]
    assert backend.cancelled == [5]
    assert [job.state for job in watched.jobs] == [State.SUPERSEDED, State.DONE]


def test_a_step_that_is_saved_again_as_it_was_while_it_is_evaluated_is_evaluated_once(tmp_path: Path) -> None:
    save(tmp_path, 5)
    free = threading.Event()
    backend = Fake(lambda request, _: scored(request) if free.is_set() else Status(Phase.RUNNING))
    beside = Beside(tmp_path, settings(max_running=1), backend)
    beside.until(lambda: backend.requests)
    save(tmp_path, 5)
    beside.until(lambda: any("saved again with the same weights" in line for line in beside.said))
    free.set()
    beside.until(lambda: logged(tmp_path))
    assert [job.state for job in beside.end().jobs] == [State.DONE, State.SAME]
    assert (len(backend.requests), backend.cancelled) == (1, [])


def test_results_that_come_while_a_step_is_being_saved_again_are_not_logged(tmp_path: Path) -> None:
    path = save(tmp_path, 5) / "model.safetensors"
    data = path.read_bytes()
    ready = threading.Event()
    backend = Fake(lambda request, _: scored(request) if ready.is_set() else Status(Phase.RUNNING))
    beside = Beside(tmp_path, settings(), backend)
    beside.until(lambda: backend.requests)
    path.write_bytes(data[:500])
    ready.set()
    for end in range(500, 2000, 100):
        path.write_bytes(data[:end])
        time.sleep(0.01)
    assert logged(tmp_path) == []
    save(tmp_path, 5, value=9)
    beside.until(lambda: logged(tmp_path))
    beside.end()
    assert logged(tmp_path) == [(5, "eval/t/acc", 9.0)]


def test_a_step_that_is_saved_with_other_weights_after_it_was_logged_is_reported(tmp_path: Path) -> None:
    save(tmp_path, 5)
    once(tmp_path, settings(), Fake())
    save(tmp_path, 5, value=6)
    watched = once(tmp_path, settings(), Fake())
    assert [job.state for job in watched.jobs] == [State.DONE, State.REWRITTEN]
    assert logged(tmp_path) == [(5, "eval/t/acc", 5.0)]


def test_a_checkpoint_that_is_removed_while_it_waits_is_evaluated_nevertheless(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    free = threading.Event()
    backend = Fake(lambda request, _: scored(request) if free.is_set() else Status(Phase.RUNNING))
    beside = Beside(tmp_path, settings(max_running=1), backend)
    beside.until(lambda: backend.requests and sum("is whole" in line for line in beside.said) == 2)
    assert any("held by 1 hard links" in line for line in beside.said)
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    save(tmp_path, 3)
    free.set()
    beside.until(lambda: len(logged(tmp_path)) == 3)
    assert states(beside.end()) == {1: "done", 2: "done", 3: "done"}


def test_where_there_are_no_hard_links_shards_are_copied_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    save(tmp_path, 5)
    monkeypatch.setattr(os, "link", refuse)
    said: list[str] = []
    assert states(once(tmp_path, settings(), Fake(), say=said.append)) == {5: "done"}
    assert any("held by 1 copies" in line for line in said)


def test_a_second_save_that_is_removed_before_it_was_held_is_reported_and_the_first_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    free = threading.Event()
    backend = Fake(lambda request, _: scored(request) if free.is_set() else Status(Phase.RUNNING))
    beside = Beside(tmp_path, settings(), backend)
    beside.until(lambda: backend.requests)
    (path / "model.safetensors").write_bytes(b"half of a second save")
    beside.until(lambda: any("saved again" in line for line in beside.said))
    shutil.rmtree(path)
    beside.until(lambda: any("removed before that was held" in line for line in beside.said))
    free.set()
    beside.until(lambda: logged(tmp_path))
    assert [job.state for job in beside.end().problems] == [State.LOST]
    assert logged(tmp_path) == [(5, "eval/t/acc", 5.0)]


def test_a_checkpoint_that_is_removed_before_it_was_whole_is_lost_and_said_to_be(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "config.json").unlink()
    beside = Beside(tmp_path, settings(), Fake())
    beside.until(lambda: any("not whole yet" in line for line in beside.said))
    shutil.rmtree(path)
    beside.until(lambda: any("is lost" in line for line in beside.said))
    save(tmp_path, 6)
    (lost,) = beside.end().problems
    assert (lost.step, lost.state) == (5, State.LOST)


@pytest.mark.parametrize("what", ["removes", "rewrites"])
def test_a_trainer_that_touches_a_checkpoint_in_mid_merge_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from reshard.evaluate import model

    path, real, calls = save(tmp_path, 5), model.write, []

    def write(prepared: Any, output: Path) -> Any:
        calls.append(output)
        if len(calls) == 1 and what == "removes":
            shutil.rmtree(path)
        elif len(calls) == 1:
            save(tmp_path, 5, value=8)
        return real(prepared, output)

    monkeypatch.setattr(model, "write", write)
    watched = once(tmp_path, settings(), Fake())
    value = 5.0 if what == "removes" else 8.0
    assert logged(tmp_path) == [(5, "eval/t/acc", value)]
    assert [str(job.state) for job in watched.jobs] == (["done"] if what == "removes" else ["superseded", "done"])


@pytest.mark.parametrize(
    "name, text",
    [
        ("compute_summary.json", "{}"), ("evals/training-ended", ""),
        ("checkpoint-5/trainer_state.json", '{"global_step": 5, "max_steps": 5, "log_history": []}'),
    ],
)  # fmt: skip
def test_a_watch_ends_when_training_has(tmp_path: Path, name: str, text: str) -> None:
    path = save(tmp_path, 5)
    (tmp_path / "evals").mkdir()
    assert not is_over(Places.of(tmp_path))
    assert not is_over(Places.of(tmp_path / "none"))
    (tmp_path / name).write_text(text)
    assert is_over(Places.of(tmp_path))
    assert states(watch(settings(), Places.of(tmp_path), backend=Fake())) == {5: "done"}
    later = save(tmp_path, 6)  # training goes on from there
    os.utime(later, (path.stat().st_mtime + 60, path.stat().st_mtime + 60))
    assert not is_over(Places.of(tmp_path))


def test_checkpoints_may_lie_in_a_directory_for_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 5)
    assert states(once(tmp_path, settings(), Fake())) == {5: "done"}


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reshard.storage import staging

    save(tmp_path, 5)
    real, calls = os.posix_fallocate, []

    def full(fd: int, offset: int, nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) <= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, offset, nbytes)

    monkeypatch.setattr(staging.os, "posix_fallocate", full)
    said: list[str] = []
    assert states(once(tmp_path, settings(), Fake(), say=said.append)) == {5: "done"}
    assert sum("the disk is full" in line for line in said) == 2
    assert logged(tmp_path) == [(5, "eval/t/acc", 5.0)]


def test_whole_models_never_take_more_room_than_they_may(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    most = []

    def behave(request: Request, polls: int) -> Status:
        most.append(len([p for p in request.model.parent.iterdir() if not p.name.startswith(".")]))
        return scored(request) if polls > 3 else Status(Phase.RUNNING)

    chosen = settings(max_running=5, max_merged_size="14KB")
    assert set(states(once(tmp_path, chosen, Fake(behave))).values()) == {"done"}
    assert max(most) == 2


def test_a_model_that_never_has_room_fails_with_that_reason(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (job,) = once(tmp_path, settings(max_merged_size="1KB"), Fake()).problems
    assert (job.state, "max_merged_size" in job.reason) == (State.FAILED, True)


def test_an_attempt_that_fails_is_tried_again_in_a_directory_of_its_own(tmp_path: Path) -> None:
    save(tmp_path, 5)
    backend = Fake(lambda request, _: scored(request) if request.attempt == 3 else Status(Phase.FAILED, "no GPU"))
    assert states(once(tmp_path, settings(retries=2), backend)) == {5: "done"}
    assert len({request.output for request in backend.requests}) == 3


@pytest.mark.parametrize(
    "status, config, wanted",
    [
        (Status(Phase.FAILED, "no GPU"), {"retries": 1}, (State.FAILED, 2, "no GPU")),
        (Status(Phase.FAILED, "no such task", permanent=True), {}, (State.FAILED, 1, "no such task")),
        (Status(Phase.CANCELLED, "by an operator"), {}, (State.CANCELLED, 1, "by an operator")),
        (Status(Phase.CANCELLED), {"retry_on": ["cancelled"]}, (State.CANCELLED, 3, "cancelled at the backend")),
        (Status(Phase.RUNNING), {"timeout": 0.05, "retries": 0}, (State.TIMED_OUT, 1, "no result after 0 s")),
    ],
)  # fmt: skip
def test_an_evaluation_ends_as_what_it_was_with_its_reason(
    tmp_path: Path, status: Status, config: Mapping[str, Any], wanted: tuple[State, int, str]
) -> None:
    save(tmp_path, 5)
    backend = Fake(lambda request, _: status)
    (job,) = once(tmp_path, settings(**config), backend).problems
    assert (job.state, job.attempts, job.reason) == wanted
    assert logged(tmp_path) == []
    assert states(once(tmp_path, settings(), Fake(), again=True)) == {5: "done"}


def test_a_server_that_does_not_answer_costs_time_and_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)
    monkeypatch.setattr("reshard.evaluate.advance._SILENCE_S", (0.02, 0.05))

    def behave(request: Request, polls: int) -> Status:
        if polls < 6:
            raise Unavailable("connection refused")
        return scored(request)

    watched = once(tmp_path, settings(retries=0), Fake(behave))
    assert [(job.state, job.attempts) for job in watched.jobs] == [(State.DONE, 1)]


def test_a_job_that_the_server_forgot_is_looked_for_and_then_sent_again(tmp_path: Path) -> None:
    save(tmp_path, 5)
    backend = Fake(lambda request, _: scored(request) if request.attempt == 2 else Status(Phase.MISSING, "404"))
    watched = once(tmp_path, settings(retries=0), backend)
    assert [(job.state, job.attempts) for job in watched.jobs] == [(State.DONE, 2)]


def test_a_defect_of_a_backend_fails_one_step_and_not_the_others(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def behave(request: Request, _: int) -> Status:
        if request.step == 1:
            raise ZeroDivisionError("oops")
        return scored(request)

    watched = once(tmp_path, settings(retries=0), Fake(behave))
    assert states(watched) == {1: "failed", 2: "done"}
    assert watched.problems[0].reason == "ZeroDivisionError: oops"


def test_a_task_that_does_not_exist_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    save(tmp_path, 5)
    backend = Fake(unknown=["mmmu_vall"])
    with pytest.raises(InputError, match="mmmu_vall"):
        once(tmp_path, settings(tasks=["mmmu_val", "mmmu_vall"]), backend)
    assert backend.requests == []


def test_without_the_store_the_log_says_what_is_done(tmp_path: Path) -> None:
    save(tmp_path, 5)
    once(tmp_path, settings(), Fake())
    for path in (tmp_path / "evals").glob("evals.sqlite*"):
        path.unlink()
    backend = Fake()
    assert states(once(tmp_path, settings(), backend)) == {5: "done"}
    assert backend.requests == []
    assert len(logged(tmp_path)) == 1


# ------------------------------------------------------------------------------------------------ what attempts leave


def leaving(behave: Callable[[Request, int], Status]) -> Fake:
    """A backend whose attempts leave a file each, beside a link to what is none of theirs."""

    def leave(request: Request, polls: int) -> Status:
        (request.output / "results.json").write_text(str(request.attempt))
        with suppress(FileExistsError):
            (request.output / "link").symlink_to(request.output.parents[3])
        return behave(request, polls)

    return Fake(leave)


def outputs(run: Path) -> list[str]:
    return sorted(path.read_text() for path in (run / "evals" / "output").glob("*/*/results.json"))


@pytest.mark.parametrize("keep, left", [("last", ["3"]), ("all", ["1", "2", "3"])])
def test_of_the_attempts_at_a_step_the_one_that_counts_is_kept(tmp_path: Path, keep: str, left: list[str]) -> None:
    save(tmp_path, 5)
    backend = leaving(lambda request, _: scored(request) if request.attempt == 3 else Status(Phase.FAILED, "no GPU"))
    watched = once(tmp_path, settings(retries=2, keep_attempts=keep), backend)
    assert (states(watched), outputs(tmp_path)) == ({5: "done"}, left)
    assert (tmp_path / "checkpoint-5" / "model.safetensors").exists()
    with Store(Places.of(tmp_path).store) as store:
        attempts = store.attempts(watched.jobs[0])
    assert [Path(a.output).is_dir() if a.output else None for a in attempts] == (
        [None, None, True] if keep == "last" else [True, True, True]
    )


def test_a_step_that_failed_keeps_its_last_attempt_until_it_is_tried_anew(tmp_path: Path) -> None:
    save(tmp_path, 5)
    backend = leaving(lambda request, _: Status(Phase.FAILED, "no GPU"))
    assert states(once(tmp_path, settings(retries=1), backend)) == {5: "failed"}
    assert outputs(tmp_path) == ["2"]
    once(tmp_path, settings(), leaving(lambda request, _: scored(request)), again=True)
    assert outputs(tmp_path) == ["1"]


def test_what_was_displaced_leaves_nothing_once_nobody_writes_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)
    backend = leaving(lambda request, _: scored(request) if len(backend.requests) > 1 else Status(Phase.RUNNING))
    beside = Beside(tmp_path, settings(), backend)
    beside.until(lambda: backend.requests and outputs(tmp_path))
    save(tmp_path, 5, value=77)
    beside.until(lambda: logged(tmp_path))
    beside.end()
    assert len(outputs(tmp_path)) == 2  # a server may not know that nobody wants it any more
    monkeypatch.setattr("reshard.evaluate.prune._QUIET_S", 0.0)
    once(tmp_path, settings(), backend)
    assert len(outputs(tmp_path)) == 1
    assert [job.state for job in once(tmp_path, settings(), backend).jobs] == [State.SUPERSEDED, State.DONE]


@pytest.mark.parametrize("where", ["elsewhere", "link", "parent"])
def test_no_output_that_is_not_the_watchers_own_is_removed(tmp_path: Path, where: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other" / "step-5-regular" / "attempt-1-00000000"
    save(run, 5)
    once(run, settings(), Fake())
    other.mkdir(parents=True)
    (other / "kept").touch()
    place = Places.of(run).outputs / "step-6-regular" / other.name
    if where == "link":
        place.parent.mkdir()
        place.symlink_to(other)
    elif where == "parent":
        place.parent.symlink_to(other.parent)
    with Store(Places.of(run).store) as store:
        (job,) = store.jobs()
        for output in (other if where == "elsewhere" else place, tmp_path):
            job = store.begin_attempt(job, output)
        store.end_attempt(job, State.DONE, "", state=State.DONE)
        assert [attempt.number for attempt in store.spent_attempts(job.run)] == [1, 2]
    once(run, settings(), Fake())
    assert (other / "kept").exists()


# ------------------------------------------------------------------------------------------------------ who is killed


CHILD = """
import json, os, sys
from pathlib import Path
from reshard.evaluate.config import settings_of
from reshard.evaluate.places import Places
from reshard.evaluate.watch import watch
from reshard.ops import convert, merge
from reshard.formats import huggingface, safetensors
import reshard.evaluate.backends.command

for line in sys.stdin:
    run, block = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        watched = watch(settings_of(block), Places.of(run), once=True)
        os._exit(1 if watched.problems else 0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def watchers() -> Iterator[Watchers]:
    watchers = Watchers()
    yield watchers
    watchers.close()


class Watchers:
    """A process that forks watchers off, one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, run: Path, block: Any, kill_after_s: float | None = None) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([str(run), block]) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            with suppress(ProcessLookupError):  # it may be done
                os.kill(pid, signal.SIGKILL)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.__exit__(None, None, None)


def block(tally: Path) -> Any:
    command = ["sh", "-c", "sleep 0.03; " + EVALUATE, "evaluate", "{step}", str(tally), "{output}"]
    config = {"backend": "command", "command": command, "poll_interval": 0.02, "retry_wait": 0.01, "max_running": 2}
    return {"eval_config": config}


@pytest.mark.slow
def test_a_watcher_that_is_killed_anywhere_fifty_times_evaluates_and_logs_each_step_once(
    tmp_path: Path, watchers: Watchers
) -> None:
    chance, killed = random.Random(5), 0
    for number in range(10):
        run, tally = tmp_path / f"run-{number}", tmp_path / f"tally-{number}"
        for step in (1, 2, 3):
            save(run, step)
        for _ in range(5):
            killed += watchers(run, block(tally), chance.uniform(0.0, 0.12)) == -signal.SIGKILL
        assert watchers(run, block(tally)) == 0
        assert sorted(logged(run)) == [(step, "eval/t/acc", float(step)) for step in (1, 2, 3)]
        assert sorted(tally.read_text().split()) == ["1", "2", "3"]
    assert killed >= 5  # how many are still at work when they are killed is the machine's affair


@pytest.mark.slow
def test_a_machine_that_goes_down_with_its_evaluations_logs_each_step_once(tmp_path: Path, watchers: Watchers) -> None:
    chance = random.Random(7)
    for number in range(6):
        run, tally = tmp_path / f"run-{number}", tmp_path / f"tally-{number}"
        for step in (1, 2):
            save(run, step)
        for _ in range(3):
            watchers(run, block(tally), chance.uniform(0.05, 0.4))
            for path in run.glob("evals/output/*/*/.process/pid"):
                with suppress(ProcessLookupError):
                    os.killpg(int(path.read_text()), signal.SIGKILL)
        assert watchers(run, block(tally)) == 0
        assert sorted(logged(run)) == [(step, "eval/t/acc", float(step)) for step in (1, 2)]


def test_what_was_held_when_a_watcher_was_killed_is_evaluated_though_the_checkpoint_is_gone(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    found = whole(path, "regular", None)
    hold(found, Places.of(tmp_path).held(5, "regular", found.fingerprint))
    shutil.rmtree(path)
    assert states(once(tmp_path, settings(), Fake())) == {5: "done"}
    assert logged(tmp_path) == [(5, "eval/t/acc", 5.0)]


def test_two_watchers_share_a_run_and_evaluate_each_step_once(tmp_path: Path) -> None:
    for step in range(1, 9):
        save(tmp_path / "run", step)
    one, two = Fake(), Fake()
    threads = [
        threading.Thread(target=once, args=(tmp_path / "run", settings(max_running=1), backend))
        for backend in (one, two)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(request.step for request in one.requests + two.requests) == list(range(1, 9))
    assert sorted(step for step, _, _ in logged(tmp_path / "run")) == list(range(1, 9))


# ------------------------------------------------------------------------------------------------- the command line


def write_settings(path: Path, tally: Path) -> Path:
    path.write_text(json.dumps({"trainer_args": block(tally)}))  # JSON is YAML
    return path


def test_the_command_line_watches_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for step in (10, 20):
        save(run, step)
    config = write_settings(tmp_path / "eval.yaml", tmp_path / "tally")
    assert main(["watch", str(run), "--config", str(config), "--once"]) == 0
    assert "step 10: merged" in capsys.readouterr().err
    assert main(["evals", str(run)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split() for line in table] == [
        ["step", "state", "attempts", "t/acc", "why"], ["10", "done", "1", "10"], ["20", "done", "1", "20"],
    ]  # fmt: skip
    assert main(["evals", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["results"][0]["value"]) for row in rows] == [(10, 10.0), (20, 20.0)]
    assert main(["evals", str(run), "--best", "t/acc", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert (best["step"], best["checkpoint"]) == (20, str(run / "checkpoint-20"))
    assert main(["watch", str(run), "--config", str(config), "--once", "--json", "--quiet"]) == 0
    assert [job["state"] for job in json.loads(capsys.readouterr().out)["jobs"]] == ["done", "done"]
    assert main(["evals", str(run), "--best", "t/f1"]) == 1
    assert "there are t/acc" in capsys.readouterr().err


def test_a_run_that_was_not_watched_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evals", str(tmp_path)]) == 1
    assert "was not watched yet" in capsys.readouterr().err


def test_a_step_without_results_is_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "run", 5)
    config = tmp_path / "eval.yaml"
    config.write_text('eval_config: {backend: command, command: "false {model}", poll_interval: 0.05, retries: 0}')
    assert main(["watch", str(tmp_path / "run"), "--config", str(config), "--once"]) == 1
    assert "step 5 (regular) is failed: " in capsys.readouterr().err


def test_sigterm_finishes_what_is_under_way(tmp_path: Path) -> None:
    run, tally = tmp_path / "run", tmp_path / "tally"
    save(run, 5)
    config = write_settings(tmp_path / "eval.yaml", tally)
    words = [sys.executable, "-m", "reshard", "watch", str(run), "--config", str(config)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "submitted" in line:
                break
        child.send_signal(signal.SIGTERM)
        child.stderr.read()
    assert child.returncode == 0
    assert logged(run) == [(5, "eval/t/acc", 5.0)]


def test_sigterm_does_not_wait_for_a_server_that_is_away(tmp_path: Path) -> None:
    save(tmp_path / "run", 5)
    config = tmp_path / "eval.yaml"
    config.write_text("eval_config: {server_url: 'http://127.0.0.1:1', tasks: [t], poll_interval: 0.05}")
    words = [sys.executable, "-m", "reshard", "watch", str(tmp_path / "run"), "--config", str(config)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "the backend does not answer" in line:
                break
        child.send_signal(signal.SIGTERM)
        try:
            assert child.wait(20) == 0
        finally:
            child.kill()
        assert "the next watch goes on" in child.stderr.read()


def test_a_second_sigterm_stops_at_once_and_the_next_watch_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, 5)
    config, go = tmp_path / "eval.yaml", tmp_path / "go"
    script = f'until [ -e "{go}" ]; do sleep 0.02; done; ' + EVALUATE
    command = ["sh", "-c", script, "evaluate", "{step}", str(tmp_path / "tally"), "{output}"]
    config.write_text(json.dumps({"eval_config": {"backend": "command", "command": command, "poll_interval": 0.05}}))
    words = [sys.executable, "-m", "reshard", "watch", str(run), "--config", str(config)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "finishing" in line or "submitted" in line:
                child.send_signal(signal.SIGTERM)
    assert child.returncode == 130
    go.touch()
    assert main(["watch", str(run), "--config", str(config), "--once"]) == 0
    assert logged(run) == [(5, "eval/t/acc", 5.0)]
    assert (tmp_path / "tally").read_text() == "5\n"


@pytest.mark.slow
def test_an_idle_run_of_two_hundred_checkpoints_costs_next_to_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(100, 20100, 100):
        save(run, step)
    places = Places.of(run)
    with Store(places.store) as store:
        name = store.meta("run", str(run))
        for step in range(100, 20100, 100):
            found = whole(run / f"checkpoint-{step}", "regular", None)
            files = {file: list(stamp) for file, stamp in found.files.items()}
            store.add(New(Key(name, step, "regular", found.fingerprint), State.DONE, str(found.path), files=files))
    config = tmp_path / "eval.yaml"
    config.write_text('eval_config: {backend: command, command: "x {model}", poll_interval: 2}')
    child = psutil.Popen([sys.executable, "-m", "reshard", "watch", str(run), "--config", str(config)])
    try:
        time.sleep(3)
        before = child.cpu_times()
        time.sleep(8)
        after = child.cpu_times()
        assert child.memory_info().rss < 100e6
        assert (after.user + after.system - before.user - before.system) / 8 < 0.01
    finally:
        child.terminate()
        assert child.wait(10) == 0
