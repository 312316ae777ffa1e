"""Draws learning curves as SVG: computes the positions of each panel's lines, marks and labels."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from xpo_lightning.reporting.metrics_file import Metrics, Series, smooth, thin
from xpo_lightning.reporting.panels import Panel

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 370, 10, 190
Span = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        kind: `raw`, `training` or `held-out`.
        color: Number of its colour.
        name: Its label; empty for raw values, which share that of the smoothed ones.
        series: Its values, thinned out if there are many.
        path: The line as an SVG path.
        marks: Positions of dots.
        band: Outline of one standard error either way, as an SVG path.
    """

    kind: str
    color: int
    name: str
    series: Series
    path: str
    marks: list[tuple[float, float]]
    band: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawn panel.

    Args:
        title: What is plotted.
        lines: The lines.
        steps: Positions and labels of the horizontal axis.
        values: Positions and labels of the vertical axis.
        level: Height of the dashed line that marks no difference; None for no such line.
        summary: The chart in words.
        data: Data with which the script shows values under the pointer.
    """

    title: str
    lines: list[Line]
    steps: list[tuple[float, str]]
    values: list[tuple[float, str]]
    level: float | None
    summary: str
    data: dict[str, Any]


def chart_of(panel: Panel, metrics: Metrics) -> Chart | None:
    """Draw a panel of a run; return None if the run logged no finite value of its metrics."""
    series = dict(_series(panel, metrics))
    shown = [value for one in series.values() for value in one.values if math.isfinite(value)]
    if not shown:
        return None
    steps = [step for one in series.values() for step in one.steps]
    across, up = _span(steps, None), (-0.03, 1.03) if panel.share else _span(shown, panel.level)
    lines = [_line(key, one, across, up, metrics, panel) for key, one in series.items()]
    return Chart(
        title=panel.title,
        lines=lines,
        steps=[(_across(tick, across), f"{tick:,.0f}") for tick in _ticks(across, whole=True)],
        values=[(_up(tick, up), f"{tick:g}") for tick in _ticks(up)],
        level=None if panel.level is None else _up(panel.level, up),
        summary=_summary(panel, lines),
        data={
            "across": across,
            "up": up,
            "lines": [
                {"name": line.name, "color": line.color, "steps": line.series.steps, "values": _plain(line.series)}
                for line in lines
                if line.name
            ],
        },
    )


def _series(panel: Panel, metrics: Metrics) -> Iterator[tuple[tuple[str, str], Series]]:
    """Yield the series of a panel by metric and kind, in the order in which they are drawn."""
    for kind in ("raw", "training"):
        for name in panel.lines:
            if one := metrics.get(name):
                yield (name, kind), thin(one if kind == "raw" else Series(one.steps, smooth(one.values)))
    for name in panel.lines:
        if one := metrics.get(f"eval/{name}"):
            yield (name, "held-out"), thin(one)


def _line(key: tuple[str, str], series: Series, across: Span, up: Span, metrics: Metrics, panel: Panel) -> Line:
    metric, kind = key
    writer = panel.lines[metric]
    name = "" if kind == "raw" else f"{writer}, {kind}" if writer else kind
    points = [(_across(step, across), _up(value, up)) for step, value in zip(series.steps, series.values, strict=True)]
    marks = [point for point in points if math.isfinite(point[1])] if kind == "held-out" and len(points) <= 60 else []
    errors = metrics.get(f"eval/{metric}_stderr") if kind == "held-out" else None
    band = _band(series, errors, across, up) if errors else ""
    color = list(panel.lines).index(metric)
    return Line(kind, color, name.replace("held-out", "held out"), series, _path(points), marks, band)


def _band(series: Series, errors: Series, across: Span, up: Span) -> str:
    edges = [(step, value, errors.at(step)) for step, value in zip(series.steps, series.values, strict=True)]
    known = [(step, value, error) for step, value, error in edges if error is not None and math.isfinite(value + error)]
    low = [(_across(step, across), _up(value - error, up)) for step, value, error in known]
    high = [(_across(step, across), _up(value + error, up)) for step, value, error in reversed(known)]
    return _path([*low, *high]) + "Z" if len(known) > 1 else ""


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Return a line as an SVG path, with a gap at each value that is not finite."""
    parts, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = math.isfinite(y)
    return "".join(parts)


def _span(values: Sequence[float], level: float | None) -> Span:
    """Return the range of an axis: all values and the level, with a margin of 5 % unless all values are integers."""
    shown = [*values, *([] if level is None else [level])]
    low, high = min(shown), max(shown)
    air = 0.0 if all(isinstance(value, int) for value in values) else 0.05 * (high - low)
    return (low - air, high + air) if high > low else (low - 0.5, high + 0.5)


def _ticks(span: Span, whole: bool = False) -> list[float]:
    ticks = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(*span)
    return [round(float(tick), 12) for tick in ticks if span[0] <= tick <= span[1]]


def _across(step: float, span: Span) -> float:
    return LEFT + (RIGHT - LEFT) * (step - span[0]) / (span[1] - span[0])


def _up(value: float, span: Span) -> float:
    """Return the vertical position of a value, clipped just outside the chart's edges; NaN if it is not finite."""
    if not math.isfinite(value):
        return math.nan
    return min(max(BOTTOM - (BOTTOM - TOP) * (value - span[0]) / (span[1] - span[0]), TOP - 8), BOTTOM + 8)


def _plain(series: Series) -> list[float | None]:
    """Return the values as JSON can hold them: five digits, and None for those that are not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in series.values]


def _summary(panel: Panel, lines: Sequence[Line]) -> str:
    ends = []
    for line in lines:
        if line.name:
            steps, values = line.series.steps, line.series.values
            ends.append(f"{line.name} {values[0]:.3g} at step {steps[0]:,} and {values[-1]:.3g} at step {steps[-1]:,}")
    return f"{panel.title}: {'; '.join(ends)}."
