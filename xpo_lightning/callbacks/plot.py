"""Learning curves: from a run's metrics file to a picture."""

import csv
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xpo_lightning.errors import InputError

BLUE, ORANGE, GREY = "#2563a8", "#d9822b", "#8a8f98"


@dataclass(frozen=True)
class Series:
    """The values of one metric, in the order in which they were logged."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Panel:
    """One small plot.

    Args:
        title: What is plotted, with its unit.
        lines: Colour and name in the legend of each training metric; the same under `eval/` goes with it.
        level: Where a dashed line marks no difference.
        share: True for shares, whose axis runs from 0 to 1.
    """

    title: str
    lines: dict[str, tuple[str, str]]
    level: float | None = None
    share: bool = False


PANELS = (
    Panel("Win rate against the reference", {"win_rate": (BLUE, "")}, level=0.5, share=True),
    Panel("KL from the reference (nats)", {"objective/kl": (BLUE, "")}, level=0),
    Panel("Preference loss", {"loss/dpo": (BLUE, "")}),
    Panel("Score margin, policy − reference", {"objective/scores_margin": (BLUE, "")}, level=0),
    Panel(
        "Completion length (tokens)",
        {"completions/model_length": (BLUE, "policy"), "completions/ref_length": (ORANGE, "reference")},
    ),
    Panel(
        "Completions that ended by themselves",
        {"val/model_contain_eos_token": (BLUE, "policy"), "val/ref_contain_eos_token": (ORANGE, "reference")},
        share=True,
    ),
)


def read_metrics(csv_path: Path) -> dict[str, Series]:
    """Read the metrics of a run.

    Args:
        csv_path: What `CSVLogger` wrote: a column a metric, a row each time something was logged, cells empty where a
            metric was not.

    Returns:
        The series of each metric that was logged at least once.
    """
    metrics: dict[str, Series] = {}
    with csv_path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if cell and name != "step":
                    series = metrics.setdefault(name, Series([], []))
                    series.steps.append(int(row["step"]))
                    series.values.append(float(cell))
    return metrics


def smooth(values: list[float]) -> list[float]:
    """Average each value with those before it: a tenth of the series, at most 50 values."""
    width = min(max(len(values) // 10, 1), 50)
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def draw_curves(csv_path: Path, png_path: Path) -> None:
    """Draw the learning curves of a run.

    Args:
        csv_path: Its metrics file.
        png_path: Where the picture goes.

    Raises:
        InputError: The metrics file does not exist, or has none of the metrics that are drawn.
    """
    metrics = read_metrics(csv_path) if csv_path.is_file() else {}
    if not any(name in metrics or f"eval/{name}" in metrics for panel in PANELS for name in panel.lines):
        raise InputError(f"{csv_path} has no metric to draw; lower trainer.log_every_n_steps for a short run")
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        _draw_panel(axes, panel, metrics)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    partial = png_path.with_name(png_path.name + ".partial")
    with partial.open("wb") as file:
        canvas.print_png(file)  # type: ignore[no-untyped-call]
    partial.replace(png_path)


def _draw_panel(axes: Axes, panel: Panel, metrics: dict[str, Series]) -> None:
    for name, (color, label) in panel.lines.items():
        writer = f"{label}, " if label else ""
        if train := metrics.get(name):
            axes.plot(train.steps, train.values, color=color, alpha=0.15, linewidth=0.8)
            axes.plot(
                train.steps, smooth(train.values), color=color, alpha=0.5, linewidth=1.2, label=f"{writer}training"
            )
        if held_out := metrics.get(f"eval/{name}"):
            axes.plot(
                held_out.steps,
                held_out.values,
                color=color,
                linewidth=2,
                marker="o",
                markersize=3.5,
                label=f"{writer}held out",
            )
            _draw_band(axes, held_out, metrics.get(f"eval/{name}_stderr"), color)
    _finish_panel(axes, panel)


def _draw_band(axes: Axes, series: Series, errors: Series | None, color: str) -> None:
    """Shade one standard error either way."""
    if errors is not None and errors.steps == series.steps:
        low = [value - error for value, error in zip(series.values, errors.values, strict=True)]
        high = [value + error for value, error in zip(series.values, errors.values, strict=True)]
        axes.fill_between(series.steps, low, high, color=color, alpha=0.18, linewidth=0, label="± standard error")


def _finish_panel(axes: Axes, panel: Panel) -> None:
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linewidth=1, linestyle="--", zorder=0)
    if panel.share:
        axes.set_ylim(-0.03, 1.03)
    axes.set_title(panel.title, fontsize=10.5, loc="left")
    axes.set_xlabel("step", fontsize=9, color=GREY)
    axes.tick_params(labelsize=8.5, colors="#4a4f57")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="best")
