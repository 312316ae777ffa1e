"""Draws what the runs of a task measured: score, KL and rarity against labels, and score against KL."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib as mpl
from comparing import geometric, standard_error
from results import Point
from tasks import ARMS, TASKS

mpl.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "labels": "labelled pairs",
    "score": "mean score",
    "kl": "KL from the reference, nats a completion",
}
COLOURS = plt.get_cmap("tab20")
PANELS = (("labels", "score"), ("labels", "rarity"), ("labels", "kl"), ("kl", "score"))


def draw(points: Sequence[Point], task: str, path: Path) -> None:
    """Draw the mean over seeds of each arm of a task, with its standard error; of a probability, the geometric mean."""
    names = NAMES | {"rarity": f"probability of {TASKS[task].best}"}
    figure, panels = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    for panel, (across, up) in zip(panels.flat, PANELS, strict=True):
        for number, arm in enumerate(ARMS):
            mine = [point for point in points if (point.task, point.arm) == (task, arm)]
            labels = sorted({point.labels for point in mine})
            if not mine:
                continue
            here = [[point for point in mine if point.labels == count] for count in labels]
            ups = [[getattr(point, up) for point in group] for group in here]
            style = {"label": ARMS[arm], "color": COLOURS(number % 20), "marker": "o^s"[number // 10], "markersize": 3}
            if up == "rarity":
                panel.plot(labels, [geometric(group) for group in ups], linewidth=1.2, **style)
                continue
            xs = labels if across == "labels" else [mean(getattr(point, across) for point in group) for group in here]
            panel.errorbar(xs, [mean(group) for group in ups], [standard_error(group) for group in ups], capsize=2,
                           linewidth=1.2, elinewidth=0.8, **style)  # fmt: skip
        panel.set(xlabel=names[across], ylabel=names[up], yscale="log" if up == "rarity" else "linear")
        panel.grid(alpha=0.3)
    panels.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
