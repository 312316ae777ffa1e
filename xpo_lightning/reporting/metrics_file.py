"""Reads a run's metrics file into one series of values per metric."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from xpo_lightning.core.errors import InputError


@dataclass(frozen=True)
class Series:
    """The values of one metric, in the order of their steps."""

    steps: list[int]
    values: list[float]

    def cut(self, step: int) -> None:
        """Drop the values of this step and of later ones."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()

    def at(self, step: int) -> float | None:
        """Return the value at a step; None if there is none."""
        return self.values[self.steps.index(step)] if step in self.steps else None


Metrics = dict[str, Series]
"""The series of each metric, by name."""


def read_metrics(csv_path: Path) -> Metrics:
    """Read the metrics of a run.

    Args:
        csv_path: A file of `CSVLogger`: a column per metric, a row per logging call, and empty cells for metrics that
            were not logged.

    Returns:
        The series of each metric that was logged at least once. If a metric goes back to an earlier step, a run was
        resumed from there, and the values of all metrics from that step on are replaced.

    Raises:
        InputError: The file is not a metrics file of a run.
    """
    try:
        return _read(csv_path)
    except csv.Error as error:
        raise InputError(f"{csv_path} is no metrics.csv of a run, or a damaged one ({error})") from error


def _read(csv_path: Path) -> Metrics:
    metrics: Metrics = {}
    with csv_path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or []):
            raise InputError(f"{csv_path} has no column 'step'; give the metrics.csv of a run")
        for row in reader:
            cells = {name: cell for name, cell in row.items() if cell and name is not None}
            values = {name: _number(cell, csv_path, reader.line_num, name) for name, cell in cells.items()}
            step = values.pop("step", math.nan)
            if math.isfinite(step):  # A killed process may leave the beginning of a row.
                _add(metrics, int(step), values)
    return {name: series for name, series in metrics.items() if series.steps}


def _add(metrics: Metrics, step: int, values: dict[str, float]) -> None:
    known = [metrics[name].steps for name in values if name in metrics and name != "epoch"]
    redone = metrics if any(steps and steps[-1] > step for steps in known) else values.keys() & metrics.keys()
    for name in redone:
        metrics[name].cut(step)
    for name, value in values.items():
        series = metrics.setdefault(name, Series([], []))
        series.steps.append(step)
        series.values.append(value)


def _number(cell: str, csv_path: Path, line: int, column: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise InputError(f"{csv_path}, line {line}: {column} is {cell!r:.40}, which is no number") from error


def smooth(values: list[float]) -> list[float]:
    """Average each value with those before it, over a tenth of the series, at most 50 values; skip non-finite ones."""
    width = min(max(len(values) // 10, 1), 50)
    averages = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - width) : end] if math.isfinite(value)]
        averages.append(sum(window) / len(window) if window else math.nan)
    return averages


def thin(series: Series, most: int = 400) -> Series:
    """Thin out a long series, but preserve its outline: keep both ends, and each section's lowest and highest value.

    Args:
        series: The series.
        most: Approximate number of values to keep.
    """
    count = len(series.values)
    if count <= most:
        return series
    kept = {0, count - 1}
    for number in range(most // 2):
        stretch = range(number * count // (most // 2), (number + 1) * count // (most // 2))
        finite = [place for place in stretch if math.isfinite(series.values[place])]
        if finite:
            kept |= {min(finite, key=series.values.__getitem__), max(finite, key=series.values.__getitem__)}
    places = sorted(kept)
    return Series([series.steps[place] for place in places], [series.values[place] for place in places])
