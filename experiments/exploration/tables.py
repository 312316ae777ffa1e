"""From the files of the runs to the numbers behind the page: curves, a row a run, and a row a seed."""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plan import Run

GOOD = 1 / 8
"""Regret that Proposition 2.1 says online DPO does not reach."""
EARLY = {"beta_0.02": 259, "beta_0.015": 2080, "beta_0.0125": 11013, "good_coverage": 1000}
"""Labels at which `runs.csv` gives the regret besides the last; for Proposition 2.1 its T = exp(1 / (8 beta)) / 2."""
POINTS = 40
"""Points of a curve that a table keeps in even steps, and as many again in even ratios."""


@dataclass(frozen=True)
class Finished:
    """What a run has left.

    Args:
        run: The run.
        labels: Labels a seed at each measurement, ascending.
        regret: Regret of each seed at each of them.
        first: Labels at the first rare completion of each seed; None where there was none.
    """

    run: Run
    labels: list[int]
    regret: list[list[float]]
    first: list[int | None]

    def at(self, labels: int) -> list[float]:
        """Return the regret of each seed at the last measurement up to so many labels."""
        return [row for number, row in zip(self.labels, self.regret, strict=True) if number <= labels][-1]

    def labels_to(self, regret: float) -> list[int | None]:
        """Return, for each seed, the labels at the first measurement below a regret; None where there is none."""
        measured = list(zip(self.labels, self.regret, strict=True))
        return [
            next((labels for labels, row in measured if row[seed] < regret), None) for seed in range(len(self.first))
        ]


def read(run: Run, out: Path) -> Finished:
    """Read the files of a run."""
    folder = out / run.name
    with (folder / "regret.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    with (folder / "found.csv").open(newline="") as file:
        first = [int(row["labels"]) if row["labels"] else None for row in csv.DictReader(file)]
    return Finished(run, [int(row[0]) for row in rows], [[float(cell) for cell in row[1:]] for row in rows], first)


def write_tables(runs: Iterable[Run], out: Path, results: Path) -> None:
    """Write the tables of all runs that are finished: `runs.csv`, `seeds.csv`, and a `curves_*.csv` an experiment."""
    finished = [read(run, out) for run in runs if (out / run.name / "inputs.txt").is_file()]
    results.mkdir(parents=True, exist_ok=True)
    _write(results / "runs.csv", [_summary(one) for one in finished])
    _write(results / "seeds.csv", [row for one in finished for row in _seeds(one)])
    for experiment in sorted({one.run.experiment for one in finished}):
        rows = [row for one in finished if one.run.experiment == experiment for row in _curve(one)]
        _write(results / f"curves_{experiment}.csv", rows)


def _names(one: Finished) -> dict[str, Any]:
    experiment, problem, arm = one.run.name.split("/")
    return {"experiment": experiment, "problem": problem, "arm": arm}


def _summary(one: Finished) -> dict[str, Any]:
    reached, last = one.labels_to(GOOD), one.labels[-1]
    early = min(EARLY.get(one.run.problem, 2000), last)
    (before, before_error), (end, end_error) = (mean_and_error(one.at(labels)) for labels in (early, last))
    means = [statistics.fmean(row) for row in one.regret]
    return {
        **_names(one),
        "seeds": len(one.first),
        "labels": last,
        "found": share(one.first),
        "first_found_median": _shown(median(one.first)),
        "below_eighth": share(reached),
        "labels_to_eighth_median": _shown(median(reached)),
        "early_labels": early,
        "found_early": share([labels if labels is not None and labels <= early else None for labels in one.first]),
        "below_eighth_early": share([labels if labels is not None and labels <= early else None for labels in reached]),
        "regret_start": f"{means[0]:.4g}",
        "regret_early": f"{before:.4g}",
        "regret_early_se": f"{before_error:.2g}",
        "regret_end": f"{end:.4g}",
        "regret_end_se": f"{end_error:.2g}",
        "regret_peak": f"{max(means):.4g}",
    }


def _seeds(one: Finished) -> list[dict[str, Any]]:
    reached = one.labels_to(GOOD)
    return [
        {
            **_names(one),
            "seed": seed,
            "first_found": _shown(first),
            "labels_to_eighth": _shown(reached[seed]),
            "regret_end": f"{one.regret[-1][seed]:.4g}",
        }
        for seed, first in enumerate(one.first)
    ]


def _curve(one: Finished) -> list[dict[str, Any]]:
    last = len(one.labels) - 1
    even = {round(last * place / POINTS) for place in range(POINTS + 1)}
    kept = sorted(even | {round(last ** (place / POINTS)) for place in range(POINTS + 1)})
    rows = []
    for place in kept:
        mean, error = mean_and_error(one.regret[place])
        below = sum(value < GOOD for value in one.regret[place]) / len(one.first)
        numbers = {"regret": f"{mean:.4g}", "regret_se": f"{error:.2g}", "below_eighth": f"{below:.2f}"}
        rows.append({**_names(one), "labels": one.labels[place], **numbers})
    return rows


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return a mean and its standard error; 0 for the latter where there is one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def share(values: Sequence[int | None]) -> str:
    """Return the share of seeds for which there is a value."""
    return f"{sum(value is not None for value in values) / len(values):.2f}"


def median(values: Sequence[int | None]) -> float | None:
    """Return the median, with None counted as beyond all numbers; None where it is beyond them."""
    middle = statistics.median(math.inf if value is None else value for value in values)
    return middle if math.isfinite(middle) else None


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
