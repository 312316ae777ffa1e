"""The picture: win rate and KL against labels, and win rate against KL."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from label_curves import Row, by_seed, summary

mpl.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"labels": "labelled pairs", "win_rate": "win rate against the reference", "kl": "KL, nats a completion"}
PANELS = (("labels", "win_rate"), ("labels", "kl"), ("kl", "win_rate"))


def draw(rows: Sequence[Row], arms: Mapping[str, str], path: Path) -> None:
    """Draw the mean over seeds of each arm, and its standard error.

    Args:
        rows: What was measured.
        arms: The name of each arm.
        path: The PNG file.
    """
    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 4), layout="constrained")
    for panel, (across, up) in zip(panels, PANELS, strict=True):
        for number, (arm, name) in enumerate(arms.items()):
            labels = sorted({row.labels for row in rows if row.arm == arm})
            if not labels:
                continue
            up_means, up_errors = _curve(rows, arm, labels, up)
            across_means = labels if across == "labels" else _curve(rows, arm, labels, across)[0]
            across_errors = None if across == "labels" else _curve(rows, arm, labels, across)[1]
            panel.errorbar(
                across_means, up_means, up_errors, across_errors, label=name, color=f"C{number}", marker="o",
                markersize=3, capsize=2, linewidth=1.2, elinewidth=0.8,
            )  # fmt: skip
        panel.set(xlabel=NAMES[across], ylabel=NAMES[up])
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(rows: Sequence[Row], arm: str, labels: Sequence[int], name: str) -> tuple[list[float], list[float]]:
    points = [summary(list(by_seed(rows, arm, count, name).values())) for count in labels]
    return [average for average, _ in points], [error for _, error in points]
