"""TensorBoard: an event file in a directory of its own, `evals/tensorboard` unless `log_dir` says otherwise.

Points keep their step; those that the directory has already are not written again. TensorBoard draws points in the
order in which they were written, so results that come out of order give a line that turns back: its table and its
`relative` axis are not affected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from reshard.evaluate.loggers import Point

PACKAGE = "tensorboard"
OPTIONS = ("log_dir",)


def make(run: Path, folder: Path, options: Mapping[str, Any]) -> TensorBoard:
    """The logger, knowing what its directory has."""
    return TensorBoard(Path(options.get("log_dir") or folder / "tensorboard"))


class TensorBoard:
    """Scalars, one event each."""

    def __init__(self, directory: Path) -> None:
        self._known = set(_written(directory))
        module = import_module("tensorboard.summary.writer.event_file_writer")
        self._writer = module.EventFileWriter(str(directory))
        self._events = import_module("tensorboard.compat.proto.event_pb2")
        self._summaries = import_module("tensorboard.compat.proto.summary_pb2")

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            if (point.name, point.step) in self._known:
                continue
            value = self._summaries.Summary.Value(tag=point.name, simple_value=point.value)
            summary = self._summaries.Summary(value=[value])
            self._writer.add_event(self._events.Event(wall_time=point.time, step=point.step, summary=summary))
            self._known.add((point.name, point.step))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _written(directory: Path) -> Iterator[tuple[str, int]]:
    """(tag, step) of everything that the event files of a directory hold."""
    loader = import_module("tensorboard.backend.event_processing.event_file_loader")
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in loader.LegacyEventFileLoader(str(path)).Load():
            yield from ((value.tag, event.step) for value in event.summary.value)
