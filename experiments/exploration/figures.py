"""The figures, from the tables alone."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

LOOKS = {
    "dpo": ("online DPO (π, π)", "tab:blue", "-"),
    "dpo_reference": ("DPO (π, ref)", "tab:cyan", "-"),
    "xpo": ("XPO, α = 0.05 β", "tab:red", "-"),
    "xpo_wrong_sign": ("XPO, wrong sign", "tab:gray", "--"),
    "xpo_sgd": ("XPO, SGD", "tab:brown", "--"),
    "dpo_hot": ("online DPO, temperature 2", "tab:green", ":"),
    "dpo_entropy": ("online DPO, entropy bonus", "tab:olive", ":"),
    "xpo_both": ("XPO on both, (π, π)", "tab:purple", "-"),
    "xpo_small": ("XPO, α = 1e-5, Adam eps 1e-12", "tab:orange", "-"),
    "xpo_eps": ("XPO, α = 1e-5, Adam eps 1e-8", "tab:orange", "--"),
    "xpo_1e-4": ("XPO, α = 1e-4", "#fcbba1", "-"),
    "xpo_1e-3": ("XPO, α = 1e-3", "#fb6a4a", "-"),
    "xpo_3e-3": ("XPO, α = 3e-3", "#de2d26", "-"),
    "xpo_1e-2": ("XPO, α = 1e-2", "#a50f15", "-"),
    "xpo_2e-2": ("XPO, α = 2e-2", "#67000d", "-"),
    "xpo_3e-2": ("XPO, α = 3e-2", "black", "-"),
    "dpo_lr_0.02": ("online DPO, lr 0.02", "tab:blue", "--"),
    "xpo_lr_0.02": ("XPO, α = 1e-3, lr 0.02", "#fb6a4a", "--"),
    "xpo_both_1e-3": ("XPO on both, (π, π), α = 1e-3", "tab:purple", "-"),
}
MAIN = ("dpo", "dpo_reference", "xpo")
ALPHAS = ("xpo_1e-4", "xpo_1e-3", "xpo_3e-3", "xpo_1e-2", "xpo_3e-2")
RIVALS = ("xpo_wrong_sign", "dpo_hot", "dpo_entropy")
BETAS = ("beta_0.02", "beta_0.015", "beta_0.0125")
PANELS = {
    "exploration_e1": [(beta.replace("_", " "), "E1", beta, MAIN) for beta in BETAS],
    "exploration_e1_arms": [
        ("beta 0.0125: other ways, controls", "E1", BETAS[2], ("dpo", "xpo", "xpo_both", *RIVALS)),
        ("beta 0.0125: the optimizer", "E1", BETAS[2], ("xpo", "xpo_small", "xpo_eps", "xpo_sgd")),
    ],
    "exploration_e2": [
        ("rare best token of 32", "E2", "rare_best", ("dpo", "dpo_reference", *ALPHAS)),
        ("the same: other ways, controls", "E2", "rare_best", ("dpo", "xpo_1e-3", "xpo_both_1e-3", *RIVALS)),
        ("32 tokens, 23 of them garbage", "E2", "blind_32", ("dpo", "xpo_1e-3")),
        ("256 tokens, 247 of them garbage", "E2", "blind_256", ("dpo", "xpo_1e-3")),
    ],
    "exploration_e3": [
        ("rare mode, ref(g) = 1e-4", "E3", "rare_mode", tuple(LOOKS)),
        ("ref(g) = 1e-3", "E3", "less_rare_mode", tuple(LOOKS)),
    ],
    "exploration_controls": [
        ("good coverage, ref(a) = 0.3", "controls", "good_coverage", tuple(LOOKS)),
        ("combination lock", "controls", "lock", tuple(LOOKS)),
    ],
}
"""Title, experiment, problem and arms of each panel of each figure."""

Rows = Sequence[dict[str, str]]


def draw(results: Path, figures: Path) -> None:
    """Draw every figure that the tables have something for."""
    figures.mkdir(parents=True, exist_ok=True)
    for name, panels in PANELS.items():
        tables = [_read(results / f"curves_{experiment}.csv") for _, experiment, _, _ in panels]
        if any(tables):
            _draw(figures / f"{name}.png", panels, tables)


def _draw(path: Path, panels: Sequence[tuple[str, str, str, Sequence[str]]], tables: Sequence[Rows]) -> None:
    columns = min(len(panels), 3) if len(panels) != 4 else 2
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False)
    for axis, (title, experiment, problem, arms), rows in zip(axes.flat, panels, tables, strict=True):
        for arm in arms:
            _curve(axis, [row for row in rows if row["problem"] == problem and row["arm"] == arm], arm)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("labels a seed")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if experiment == "E1":
            axis.axhline(1 / 8, color="black", linewidth=0.6)
            axis.set_xscale("log")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6.5)
    for line in axes:
        line[0].set_ylabel("regret, mean ± s.e.")
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def _curve(axis: Any, rows: Rows, arm: str) -> None:
    if not rows:
        return
    label, colour, style = LOOKS[arm]
    labels, regret, error = ([float(row[key]) for row in rows] for key in ("labels", "regret", "regret_se"))
    axis.plot(labels, regret, style, color=colour, label=label, linewidth=1.3)
    band = [[mean + sign * wide for mean, wide in zip(regret, error, strict=True)] for sign in (-1, 1)]
    axis.fill_between(labels, *band, color=colour, alpha=0.15, linewidth=0)


def _read(path: Path) -> Rows:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
