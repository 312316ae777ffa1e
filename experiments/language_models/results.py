"""Reads what the runs measured, and keeps it in CSV files, beside what those have of other runs."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from tasks import TASKS


@dataclass(frozen=True)
class Point:
    """One measurement of one run; the names are those of `discovery.csv`."""

    task: str
    arm: str
    seed: int
    labels: int
    score: float
    kl: float
    clean: float
    best: float
    rarity: float


@dataclass(frozen=True)
class Result:
    """What came of one run.

    Args:
        task: Its task.
        arm: Its arm.
        seed: Its seed.
        labels: All of its labels.
        discovery: Labels up to the first batch with a bad end in a pair; all of them if there was none.
        found: Whether there was one.
        informative: Share of its pairs that had a preference.
        score: The final mean score.
        area: 1 less the mean of the score over all labels.
        kl: The final KL from the reference, in nats a completion.
        rarity: The final exact probability of what has the best score.
        clean: The final share of clean completions.
        peak: The highest `rarity` that was measured before the batch of the discovery.
        cpu_seconds: Seconds of the processor.
        version: Of the code.
    """

    task: str
    arm: str
    seed: int
    labels: int
    discovery: int
    found: int
    informative: float
    score: float
    area: float
    kl: float
    rarity: float
    clean: float
    peak: float
    cpu_seconds: float
    version: str

    @property
    def objective(self) -> float:
        """The score less beta times the KL."""
        return self.score - TASKS[self.task].beta * self.kl


Row = TypeVar("Row", Point, Result)


def collect(out: Path, tasks: Sequence[str]) -> tuple[list[Point], list[Result]]:
    """Read the files of all finished runs in a folder."""
    points, results = [], []
    for task in tasks:
        for mark in sorted((out / task).glob("*/finished.json")):
            arm, _, seed = mark.parent.name.rpartition("-")
            with (mark.parent / "version_0" / "discovery.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            mine = list(_points(task, arm, int(seed), rows))
            points += mine
            results.append(_result(mine, rows, json.loads(mark.read_text())))
    return points, results


def _points(task: str, arm: str, seed: int, rows: Sequence[dict[str, str]]) -> Iterator[Point]:
    names = [field.name for field in fields(Point)][4:]
    for row in rows:
        if row["score"]:
            yield Point(task, arm, seed, int(row["labels"]), **{name: float(row[name]) for name in names})


def _result(points: Sequence[Point], rows: Sequence[dict[str, str]], made: dict[str, str]) -> Result:
    last, labels = points[-1], int(rows[-1]["labels"])
    first = next((int(row["labels"]) for row in rows if int(row["found"])), None)
    discovery = labels if first is None else first
    return Result(
        last.task,
        last.arm,
        last.seed,
        labels,
        discovery,
        int(first is not None),
        sum(int(row["informative"]) for row in rows) / labels,
        last.score,
        1 - average(points),
        last.kl,
        last.rarity,
        last.clean,
        max(point.rarity for point in points if point.labels < discovery),
        float(made["cpu_seconds"]),
        str(made["version"]),
    )


def average(points: Sequence[Point]) -> float:
    """Return the trapezoidal mean of the score over the labels."""
    area = sum((after.labels - before.labels) * (after.score + before.score) / 2 for before, after in pairwise(points))
    return area / (points[-1].labels - points[0].labels)


def write(rows: Sequence[Point | Result], path: Path) -> None:
    """Write measurements or results as CSV, six digits a number."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(rows[0])])
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in astuple(row)])


def read(kind: type[Row], path: Path) -> list[Row]:
    """Read what `write` wrote of measurements or results."""
    kinds: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{name: kinds[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]


def add(fresh: Sequence[Row], kind: type[Row], path: Path) -> list[Row]:
    """Write rows beside those that a CSV file has of other runs; return all that it has now."""

    def run(row: Row) -> tuple[str, str, int]:
        return row.task, row.arm, row.seed

    runs = {run(row) for row in fresh}
    kept = [row for row in read(kind, path) if run(row) not in runs] if path.exists() else []
    order = list(TASKS)
    write(sorted([*fresh, *kept], key=lambda row: (order.index(row.task), row.arm, row.seed)), path)
    return read(kind, path)
