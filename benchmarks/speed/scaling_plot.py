"""The plot of `scaling.py`."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

LABELS = {
    "prompt": "prompt length (tokens)",
    "completion": "completion length (tokens)",
    "batch": "prompts sampled together",
}


def save_plot(points: list[dict[str, Any]], file: Path) -> None:
    """Draw one panel for each number that was moved.

    Args:
        points: What `scaling.py` measured.
        file: The PNG file to write.
    """
    figure, panels = plt.subplots(1, len(LABELS), figsize=(4 * len(LABELS), 3.4), constrained_layout=True)
    for axes, panel in zip(panels, LABELS, strict=True):
        _draw(axes, panel, [point for point in points if point["panel"] == panel])
    panels[0].set_ylabel("seconds a prompt")
    machine = points[0]["hardware"]
    figure.suptitle(f"xpo-lightning, pythia-14m's shape, {machine['cpu']}, {machine['threads']} threads", fontsize=10)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _draw(axes: Axes, panel: str, points: list[dict[str, Any]]) -> None:
    places = [point[panel] for point in points]
    seconds = [point["seconds_per_prompt"] for point in points]
    axes.plot(places, seconds, marker="o")
    if panel == "batch":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    else:
        axes.set_xlim(left=0)  # a cost that grows linearly is to look like a line
    axes.set_xticks(places, [str(place) for place in places], rotation=45 if panel != "batch" else 0)
    axes.set_ylim(0, 1.15 * max(seconds))
    axes.set_xlabel(LABELS[panel])
    fixed = [f"{name} {points[0][name]}" for name in LABELS if name != panel]
    axes.set_title(", ".join(fixed), fontsize=9)
    axes.grid(alpha=0.3)
