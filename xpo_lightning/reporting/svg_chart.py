"""Draws learning curves as SVG: computes the positions of each panel's lines, dots and labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from xpo_lightning.reporting.metrics_file import Metrics, Series
from xpo_lightning.reporting.panels import Line, Panel, Span

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 370, 10, 190
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Shape:
    """A drawn line.

    Args:
        line: What is drawn.
        path: The line as an SVG path.
        dots: Positions of dots.
        band: Outline of one standard error either way, as an SVG path; empty if there is none.
    """

    line: Line
    path: str
    dots: Points
    band: str


@dataclass(frozen=True)
class Chart:
    """A drawn panel.

    Args:
        title: What is plotted.
        shapes: The lines.
        steps: Positions and labels of the horizontal axis.
        values: Positions and labels of the vertical axis.
        level: Height of the dashed line that marks no difference; None for no such line.
        summary: The chart in words.
        data: Data with which the script shows values under the pointer.
    """

    title: str
    shapes: list[Shape]
    steps: list[tuple[float, str]]
    values: list[tuple[float, str]]
    level: float | None
    summary: str
    data: dict[str, Any]


def chart_of(panel: Panel, metrics: Metrics) -> Chart | None:
    """Draw a panel of a run; return None if the run logged no finite value of its metrics."""
    lines = panel.lines_of(metrics)
    if not lines:
        return None
    across, up = _steps(lines), panel.span(lines)
    return Chart(
        title=panel.title,
        shapes=[_shape(line, across, up) for line in lines],
        steps=[(_across(tick, across), f"{tick:,.0f}") for tick in _ticks(across, whole=True)],
        values=[(_up(tick, up), f"{tick:g}") for tick in _ticks(up)],
        level=None if panel.level is None else _up(panel.level, up),
        summary=panel.summary(lines),
        data={
            "across": across,
            "lines": [
                {"name": line.name, "steps": line.series.steps, "values": _plain(line.series)}
                for line in lines
                if line.name
            ],
        },
    )


def _shape(line: Line, across: Span, up: Span) -> Shape:
    def placed(points: Points) -> Points:
        return [(_across(step, across), _up(value, up)) for step, value in points]

    low = [(step, edge) for step, edge, _ in line.band]
    high = [(step, edge) for step, _, edge in line.band]
    path = _path(placed([*zip(line.series.steps, line.series.values, strict=True)]))
    return Shape(line, path, placed(line.dots), f"{_path(placed([*low, *reversed(high)]))}Z" if line.band else "")


def _path(points: Points) -> str:
    """Return a line as an SVG path, with a gap at each value that is not finite."""
    parts, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = math.isfinite(y)
    return "".join(parts)


def _steps(lines: Sequence[Line]) -> Span:
    """Return the range of the horizontal axis: from the first step to the last."""
    steps = [step for line in lines for step in line.series.steps]
    first, last = min(steps), max(steps)
    return (first, last) if last > first else (first - 0.5, first + 0.5)


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
