"""Draws the learning curves of one run or several from their metrics files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from xpo_lightning.core.atomic_files import replacing_file
from xpo_lightning.core.errors import InputError
from xpo_lightning.reporting.metrics_file import Metrics, Series, read_metrics, smooth
from xpo_lightning.reporting.panels import PANELS, Panel

COLORS = ("#2563a8", "#d9822b", "#2f8f5b", "#b8405e", "#7a5bb0", "#8a6d3b", "#1f9aa8", "#c45ab3")
GREY, INK = "#8a8f98", "#4a4f57"
HELD_OUT = {"linewidth": 2, "marker": "o", "markersize": 3.5}


@dataclass(frozen=True)
class Style:
    """Style of a metric's lines.

    Args:
        color: The colour.
        dash: The line style.
        label: Name in the legend of the panel; None keeps the lines out of the legend.
    """

    color: str
    dash: str = "-"
    label: str | None = ""

    def called(self, kind: str) -> str | None:
        """Return the legend's name of a line of this kind: training, or held out."""
        return None if self.label is None else f"{self.label}, {kind}" if self.label else kind


def draw_curves(csv_path: Path | Mapping[str, Path], png_path: Path) -> None:
    """Draw the learning curves of one run, or of several runs in the same panels.

    Args:
        csv_path: The run's metrics file, or the metrics files of several runs by name.
        png_path: Path of the PNG file.

    Raises:
        InputError: A metrics file does not exist, is not a metrics file, or has none of the metrics that are drawn.
    """
    files = csv_path if isinstance(csv_path, Mapping) else {"": csv_path}
    figure = figure_of({name: _drawable(path) for name, path in files.items()})
    canvas = FigureCanvasAgg(figure)
    with replacing_file(png_path, "wb") as file:
        canvas.print_png(file)  # type: ignore[no-untyped-call]


def figure_of(runs: Mapping[str, Metrics]) -> Figure:
    """Draw one run, or several runs by name in the same panels."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        if len(runs) == 1:
            draw_panel(axes, panel, *runs.values())
        else:
            _overlay(axes, panel, runs)
    if len(runs) > 1:
        handles = _legend(list(runs))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=9, frameon=False
        )
    return figure


def draw_panel(axes: Axes, panel: Panel, metrics: Metrics) -> None:
    """Draw a panel of one run: its lines differ by colour, and the legend names them."""
    for (name, label), color in zip(panel.lines.items(), COLORS, strict=False):
        if raw := metrics.get(name):
            axes.plot(raw.steps, raw.values, color=color, alpha=0.15, linewidth=0.8)
        _draw_line(axes, metrics, name, Style(color, label=label))
    _finish(axes, panel)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="best")


def run_colors(count: int) -> list[str]:
    """Return a different colour for each of `count` runs."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    return [to_hex(colormaps["turbo"](0.05 + 0.9 * number / (count - 1))) for number in range(count)]


def _drawable(csv_path: Path) -> Metrics:
    metrics = read_metrics(csv_path) if csv_path.is_file() else {}
    if not any(panel.logged(metrics) for panel in PANELS):
        raise InputError(f"{csv_path} has no metric to draw; lower trainer.log_every_n_steps for a short run")
    return metrics


def _overlay(axes: Axes, panel: Panel, runs: Mapping[str, Metrics]) -> None:
    """Draw a panel of several runs: colours tell the runs apart, line styles the metrics."""
    for (line, writer), dash in zip(panel.lines.items(), ("-", "--"), strict=False):
        for metrics, color in zip(runs.values(), run_colors(len(runs)), strict=True):
            _draw_line(axes, metrics, line, Style(color, dash, None))
        if writer:
            axes.plot([], [], color=GREY, linestyle=dash, label=writer)
    _finish(axes, panel)
    if lacking := _lacking(panel, runs):
        text = f"not logged: {', '.join(lacking)}"
        axes.text(0.02, 0.97, text, transform=axes.transAxes, va="top", fontsize=8, color=INK, style="italic")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="best")


def _lacking(panel: Panel, runs: Mapping[str, Metrics]) -> list[str]:
    """Name the runs that lack what others logged: all of the panel, or the lines in brackets."""
    logged = {name: panel.logged(metrics) for name, metrics in runs.items()}
    texts = []
    for name, lines in logged.items():
        missing = [writer for line, writer in panel.lines.items() if line in set().union(*logged.values()) - lines]
        if missing:
            texts.append(f"{name} ({', '.join(missing)})" if lines else name)
    return texts


def _draw_line(axes: Axes, metrics: Metrics, name: str, style: Style) -> None:
    color, dash = style.color, style.dash
    if train := metrics.get(name):
        label = style.called("training")
        smoothed = smooth(train.values)
        axes.plot(train.steps, smoothed, color=color, alpha=0.5, linewidth=1.2, linestyle=dash, label=label)
    if held_out := metrics.get(f"eval/{name}"):
        label = style.called("held out")
        axes.plot(held_out.steps, held_out.values, color=color, linestyle=dash, label=label, **HELD_OUT)  # type: ignore[arg-type]
        band = "± standard error" if style.label is not None else None
        _draw_band(axes, held_out, metrics.get(f"eval/{name}_stderr"), color, band)


def _draw_band(axes: Axes, series: Series, errors: Series | None, color: str, label: str | None) -> None:
    """Shade one standard error either way."""
    if errors is not None and errors.steps == series.steps:
        low = [value - error for value, error in zip(series.values, errors.values, strict=True)]
        high = [value + error for value, error in zip(series.values, errors.values, strict=True)]
        axes.fill_between(series.steps, low, high, color=color, alpha=0.18, linewidth=0, label=label)


def _legend(names: Sequence[str]) -> list[Line2D]:
    colors = run_colors(len(names))
    runs = [Line2D([], [], color=color, linewidth=3, label=name) for name, color in zip(names, colors, strict=True)]
    held_out = Line2D([], [], color=GREY, label="held out, ± standard error", **HELD_OUT)  # type: ignore[arg-type]
    return [*runs, held_out, Line2D([], [], color=GREY, alpha=0.6, linewidth=1.2, label="training, smoothed")]


def _finish(axes: Axes, panel: Panel) -> None:
    if not any(np.isfinite(np.asarray(line.get_ydata())).any() for line in axes.lines):
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=INK, style="italic")
        axes.set_yticks([])
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linewidth=1, linestyle="--", zorder=0)
    if panel.share:
        axes.set_ylim(-0.03, 1.03)
    axes.set_title(panel.title, fontsize=10.5, loc="left")
    axes.set_xlabel("step", fontsize=9, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8.5, colors=INK)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
