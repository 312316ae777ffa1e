"""Reads what the runs measured, compares the arms, and writes CSV files and figures."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import mean, stdev

from plan import ARMS, BASELINE, TASKS


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
    bad: float
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
        clean: The final share of clean stories.
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
    clean: float
    peak: float
    cpu_seconds: float
    version: str

    @property
    def objective(self) -> float:
        """The score less beta times the KL."""
        return self.score - TASKS[self.task].beta * self.kl


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
        last.clean,
        max(point.rarity for point in points if point.labels < discovery),
        float(made["cpu_seconds"]),
        str(made["version"]),
    )


def average(points: Sequence[Point]) -> float:
    """Return the trapezoidal mean of the score over the labels."""
    pieces = zip(points, points[1:], strict=False)
    area = sum((after.labels - before.labels) * (after.score + before.score) / 2 for before, after in pieces)
    return area / (points[-1].labels - points[0].labels)


@dataclass(frozen=True)
class Difference:
    """A number of an arm less online DPO's, over the seeds that both have: mean, standard error, p-values.

    `corrected` is by Holm's method, over the arms of the task.
    """

    mean: float
    error: float
    p: float
    corrected: float = math.nan

    def __str__(self) -> str:
        """Say mean and standard error."""
        return f"{self.mean:+.3f} ± {self.error:.3f}"


def differences(results: Sequence[Result], task: str, name: str) -> dict[str, Difference]:
    """Compare each arm of a task with online DPO, seed by seed, in a number of `Result`."""
    found = {}
    base = by_seed(results, task, BASELINE, name)
    for arm in (arm for arm in ARMS if arm != BASELINE):
        own = by_seed(results, task, arm, name)
        pairs = [own[seed] - base[seed] for seed in own if seed in base]
        if len(pairs) > 1:
            error = stdev(pairs) / math.sqrt(len(pairs))
            found[arm] = Difference(mean(pairs), error, paired_p(pairs))
    return holm(found)


def paired_p(pairs: Sequence[float]) -> float:
    """Return the two-sided p-value of a paired t-test; 1 where all differences are 0."""
    from scipy.stats import t

    error = stdev(pairs) / math.sqrt(len(pairs))
    if error == 0:
        return 1.0 if mean(pairs) == 0 else 0.0
    return float(2 * t.sf(abs(mean(pairs) / error), len(pairs) - 1))


def holm(found: dict[str, Difference]) -> dict[str, Difference]:
    """Add the corrected p-values: the k-th smallest of n is multiplied by n - k + 1, and none is below one before it."""
    least, corrected = 0.0, {}
    for place, arm in enumerate(sorted(found, key=lambda arm: found[arm].p)):
        one = found[arm]
        least = max(least, min(1.0, one.p * (len(found) - place)))
        corrected[arm] = Difference(one.mean, one.error, one.p, least)
    return {arm: corrected[arm] for arm in found}


def by_seed(results: Sequence[Result], task: str, arm: str, name: str) -> dict[int, float]:
    """Return a number of each seed of an arm."""
    return {one.seed: float(getattr(one, name)) for one in results if (one.task, one.arm) == (task, arm)}


def table(results: Sequence[Result], task: str) -> str:
    """Say in Markdown what came of the arms of a task."""
    lines = [
        "| arm | seeds that found it | labels to it (median) | score | less online DPO's | p, corrected | area | KL | clean |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    gains = differences(results, task, "score")
    for arm, name in ARMS.items():
        mine = [one for one in results if (one.task, one.arm) == (task, arm)]
        if mine:
            gain = gains.get(arm)
            cells = [
                name,
                f"{sum(one.found for one in mine)} of {len(mine)}",
                median([one.discovery if one.found else math.inf for one in mine], mine[0].labels),
                spread([one.score for one in mine]),
                *(("", "") if gain is None else (str(gain), f"{gain.corrected:.2g}")),
                spread([one.area for one in mine]),
                spread([one.kl for one in mine], 1),
                f"{mean(one.clean for one in mine):.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def median(values: Sequence[float], most: int) -> str:
    """Say a median, which is beyond `most` where half of the values are infinite."""
    middle = sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]
    return f"> {most:,}" if math.isinf(middle[-1]) else f"{mean(middle):,.0f}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Say a mean and its standard error."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def write(rows: Sequence[Point | Result], path: Path) -> None:
    """Write measurements or results as CSV, six digits a number."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(rows[0])])
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in astuple(row)])


def read_results(path: Path) -> list[Result]:
    """Read what `write` wrote of results."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Result(**{one.name: _typed(str(one.type), row[one.name]) for one in fields(Result)})
            for row in csv.DictReader(file)
        ]  # type: ignore[arg-type]


def _typed(kind: str, text: str) -> str | int | float:
    return {"int": int, "float": float}.get(kind.removeprefix("<class '").removesuffix("'>"), str)(text)
