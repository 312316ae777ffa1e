"""Draws the learning curves of one run or several as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from xpo_lightning.core.atomic_files import replacing_file
from xpo_lightning.reporting.metrics_file import Metrics
from xpo_lightning.reporting.panels import (
    BAND,
    BAND_OPACITY,
    COLORS,
    HELD_OUT,
    PANELS,
    RAW,
    TRAINING,
    Kind,
    Line,
    Panel,
    metrics_to_draw,
)

GREY, INK = "#8a8f98", "#4a4f57"
DASHES = ("-", "--")
"""Line styles of a panel's metrics, where colours tell the runs apart."""


def draw_curves(csv_path: Path | Mapping[str, Path], png_path: Path) -> None:
    """Draw the learning curves of one run, or of several runs in the same panels.

    Args:
        csv_path: The run's metrics file, or the metrics files of several runs by name.
        png_path: Path of the PNG file.

    Raises:
        InputError: A metrics file does not exist, is not a metrics file, or has none of the metrics that are drawn.
    """
    files = csv_path if isinstance(csv_path, Mapping) else {"": csv_path}
    figure = figure_of({name: metrics_to_draw(path) for name, path in files.items()})
    canvas = FigureCanvasAgg(figure)
    with replacing_file(png_path, "wb") as file:
        canvas.print_png(file)  # type: ignore[no-untyped-call]


def figure_of(runs: Mapping[str, Metrics]) -> Figure:
    """Draw one run, or several runs by name in the same panels."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        lines = _draw_run(axes, panel, *runs.values()) if len(runs) == 1 else _draw_runs(axes, panel, runs)
        _finish(axes, panel, lines)
    if len(runs) > 1:
        handles = _legend(list(runs))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=9, frameon=False
        )
    return figure


def run_colors(count: int) -> list[str]:
    """Return a different colour for each of `count` runs."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    return [to_hex(colormaps["turbo"](0.05 + 0.9 * number / (count - 1))) for number in range(count)]


def _draw_run(axes: Axes, panel: Panel, metrics: Metrics) -> list[Line]:
    """Draw the lines of one run: they differ by colour, and the legend names them."""
    lines = panel.lines_of(metrics)
    for line in lines:
        _draw_line(axes, line, COLORS[line.place], label=line.label or None)
    return lines


def _draw_runs(axes: Axes, panel: Panel, runs: Mapping[str, Metrics]) -> list[Line]:
    """Draw the lines of several runs: colours tell the runs apart, line styles the metrics."""
    drawn = []
    for metrics, color in zip(runs.values(), run_colors(len(runs)), strict=True):
        for line in panel.lines_of(metrics):
            if line.kind is not RAW:
                _draw_line(axes, line, color, linestyle=DASHES[line.place])
                drawn.append(line)
    for writer, dash in zip(panel.lines.values(), DASHES, strict=False):
        if writer and drawn:
            axes.plot([], [], color=GREY, linestyle=dash, label=writer)
    if lacking := panel.lacking(runs):
        text = f"not logged: {', '.join(lacking)}"
        axes.text(0.02, 0.97, text, transform=axes.transAxes, va="top", fontsize=8, color=INK, style="italic")
    return drawn


def _draw_line(axes: Axes, line: Line, color: str, **how: Any) -> None:
    axes.plot(line.series.steps, line.series.values, color=color, **_stroke(line.kind, bool(line.dots)), **how)
    if line.band:
        steps, low, high = zip(*line.band, strict=True)
        axes.fill_between(steps, low, high, color=color, alpha=BAND_OPACITY, linewidth=0)


def _stroke(kind: Kind, dotted: bool) -> dict[str, Any]:
    dots = {"marker": "o", "markersize": 3.5} if dotted else {}
    return {"linewidth": kind.width, "alpha": kind.opacity, **dots}


def _legend(names: Sequence[str]) -> list[Line2D]:
    colors = run_colors(len(names))
    runs = [Line2D([], [], color=color, linewidth=3, label=name) for name, color in zip(names, colors, strict=True)]
    held_out = Line2D([], [], color=GREY, label=f"{HELD_OUT.name}, {BAND}", **_stroke(HELD_OUT, True))
    return [*runs, held_out, Line2D([], [], color=GREY, label=f"{TRAINING.name}, smoothed", **_stroke(TRAINING, False))]


def _finish(axes: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    """Draw all of a panel that is not a line: title, axes, legend, and what stands where there are no lines."""
    if lines:
        axes.set_ylim(panel.span(lines))
    else:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=INK, style="italic")
        axes.set_yticks([])
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linewidth=1, linestyle="--", zorder=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="best")
    axes.set_title(panel.title, fontsize=10.5, loc="left")
    axes.set_xlabel("step", fontsize=9, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8.5, colors=INK)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
