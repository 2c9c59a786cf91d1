"""A metric over the steps of training, as SVG that a page holds within itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 320, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 22
Points = Sequence[tuple[int, float]]


def plot(name: str, lines: Mapping[str, Points]) -> str:
    """The picture of one metric; a line for each kind of weights. Points that are no numbers are left out."""
    finite = {kind: sorted((s, v) for s, v in points if math.isfinite(v)) for kind, points in lines.items()}
    every = [point for points in finite.values() for point in points]
    if not every:
        return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(name)}: no numbers</title></svg>'
    place = _Axes(every)
    drawn = "".join(_line(kind, points, place) for kind, points in finite.items() if points)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)} over steps">'
        f"{place.drawn()}{drawn}</svg>"
    )


class _Axes:
    """Where a point is in the picture."""

    def __init__(self, points: Points) -> None:
        steps, values = [step for step, _ in points], [value for _, value in points]
        self.first, self.last = min(steps), max(steps)
        self.low, self.high = min(values), max(values)
        margin = (self.high - self.low) * 0.05 or abs(self.high) * 0.05 or 0.5
        self._bottom, self._span = self.low - margin, self.high - self.low + 2 * margin

    def at(self, step: int, value: float) -> tuple[float, float]:
        across = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        up = (value - self._bottom) / self._span
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    def drawn(self) -> str:
        bottom = _HEIGHT - _BOTTOM
        texts = [(self.low, "grid"), (self.high, "grid")] if self.high > self.low else [(self.high, "grid")]
        grid = ""
        for value, css in texts:
            y = self.at(self.first, value)[1]
            grid += f'<line class="{css}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
            grid += f'<text x="{_LEFT - 4}" y="{y + 3}" text-anchor="end">{number(value)}</text>'
        ends = f'<text x="{_LEFT}" y="{bottom + 15}">{self.first}</text>'
        if self.last > self.first:
            ends += f'<text x="{_WIDTH - _RIGHT}" y="{bottom + 15}" text-anchor="end">{self.last}</text>'
        return f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>{grid}{ends}'


def _line(kind: str, points: Points, axes: _Axes) -> str:
    places = [(*axes.at(step, value), step, value) for step, value in points]
    path = " ".join(f"{x},{y}" for x, y, _, _ in places)
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="3"><title>step {step}: {value!r}</title></circle>'
        for x, y, step, value in places
    )
    return f'<g class="{escape(kind)}"><polyline points="{path}"/>{dots}</g>'


def number(value: float) -> str:
    """A number for people: `0.482`."""
    return f"{value:.4g}"
