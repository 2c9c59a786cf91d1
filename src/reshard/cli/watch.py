"""Evaluate the checkpoints of a run while it trains, or with --once those that are there.

Every step that eval_strategy and eval_steps ask for is merged, proven, evaluated, and logged once, at its step, in
RUN/evals/evals.jsonl. Start it before the training job or beside it, kill it when you like, start it again: what is
done stays done. `reshard evals RUN` shows how far it is.

RUN     the directory that holds checkpoint-500, checkpoint-1000, ...; it may not be there yet
"""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.cli import output

if TYPE_CHECKING:
    from reshard.evaluate.config import Schedule
    from reshard.evaluate.places import Places


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--config", required=True, metavar="YAML", help="eval_strategy, eval_steps and eval_config")
    parser.add_argument("--once", action="store_true", help="what is there, to the end; then stop")
    parser.add_argument("--retry-failed", action="store_true", help="try what failed or was lost before once more")
    parser.add_argument("--evals-dir", metavar="DIR", help="where all is kept (default: RUN/evals)")
    parser.add_argument("--json", action="store_true", help="the jobs as JSON on stdout, at the end")
    parser.add_argument("--quiet", "-q", action="store_true", help="no talk")


def run(args: argparse.Namespace) -> int:
    import gc

    from reshard.evaluate.config import read_settings
    from reshard.evaluate.places import Places
    from reshard.evaluate.scan import brief
    from reshard.evaluate.watch import watch

    gc.enable()  # this process lives long
    settings = read_settings(Path(args.config))
    places = Places.of(args.run, args.evals_dir)
    say = (lambda text: None) if args.quiet else _say
    if settings.schedule.strategy == "no":
        say("eval_strategy is no: there is nothing to do")
        return 0
    if places.run.is_dir() and (remark := _remark(places, settings.schedule)):
        say(remark)
    with redirect_stdout(sys.stderr):  # some loggers talk
        watched = watch(settings, places, once=args.once, again=args.retry_failed, say=say)
    if args.json:
        output.show_json(watched)
    for line in watched.undelivered:
        output.say(f"note: {line}")
    for job in watched.problems:
        output.say(f"step {job.step} ({job.kind}) is {job.state}: {brief(job.reason)}")
    if watched.left:
        output.say(f"note: {watched.left} steps are under way: the next watch goes on with them")
    return 130 if watched.is_interrupted else 1 if watched.problems else 0


def _remark(places: Places, schedule: Schedule) -> str:
    """What is to be said where there is nothing to evaluate yet; empty where there is."""
    from reshard.errors import InputError, listed
    from reshard.evaluate.ready import steps
    from reshard.formats.detect import find

    numbers = [step for step, _ in steps(places.run)]
    if any(schedule.wants(step) for step in numbers):
        return ""
    if numbers:
        return f"eval_steps {schedule.steps} asks for none of the steps {listed(map(str, numbers))}"
    try:
        find(places.run)
    except InputError:
        return f"{places.run} has no checkpoints yet"
    return f"{places.run} is a checkpoint itself: RUN is the directory that holds checkpoint-500, checkpoint-1000, ..."


def _say(text: str) -> None:
    import time

    output.say(f"{time.strftime('%H:%M:%S')} {text}")
