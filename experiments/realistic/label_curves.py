"""What the runs measured on held-out prompts, against the number of pairs that had been labelled by then."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import mean, stdev

import yaml


@dataclass(frozen=True)
class Row:
    """One validation of one run.

    Args:
        arm: The arm of the run.
        seed: Its seed.
        labels: Pairs that it had labelled: optimizer steps times the batch.
        win_rate: Share of held-out pairs that the policy wins against the reference.
        win_rate_stderr: Its standard error over held-out prompts.
        kl: KL from the reference, in nats a completion.
        score: Mean score of the policy's completions.
    """

    arm: str
    seed: int
    labels: int
    win_rate: float
    win_rate_stderr: float
    kl: float
    score: float


COLUMNS = {
    "win_rate": "eval/win_rate",
    "win_rate_stderr": "eval/win_rate_stderr",
    "kl": "eval/objective/kl",
    "score": "eval/objective/model_scores",
}


def collect(out: Path) -> list[Row]:
    """Read the metrics of all runs in a folder, finished or not."""
    rows = []
    for metrics in sorted(out.glob("*/version_0/metrics.csv")):
        arm, _, seed = metrics.parent.parent.name.rpartition("-")
        batch = yaml.safe_load((metrics.parent / "config.yaml").read_text())["data"]["batch_size"]
        with metrics.open(newline="") as file:
            for line in csv.DictReader(file):
                if line.get("eval/win_rate"):
                    numbers = {name: float(line[column]) for name, column in COLUMNS.items()}
                    rows.append(Row(arm, int(seed), round(float(line["step"])) * batch, **numbers))
    return rows


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV, six digits a number."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in astuple(row)])


def read(path: Path) -> list[Row]:
    """Read what `write` wrote."""
    with path.open(newline="") as file:
        return [
            Row(line["arm"], int(line["seed"]), int(line["labels"]), **{name: float(line[name]) for name in COLUMNS})
            for line in csv.DictReader(file)
        ]


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error, which is NaN for one seed."""
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def by_seed(rows: Sequence[Row], arm: str, labels: int, name: str) -> dict[int, float]:
    """Return a number of each seed of an arm at some number of labels."""
    return {row.seed: getattr(row, name) for row in rows if row.arm == arm and row.labels == labels}


def last_labels(rows: Sequence[Row]) -> int:
    """Return the largest number of labels that every run has reached."""
    most: dict[tuple[str, int], int] = {}
    for row in rows:
        most[row.arm, row.seed] = max(row.labels, most.get((row.arm, row.seed), 0))
    return min(most.values())


def table(rows: Sequence[Row], arms: Mapping[str, str], against: str = "dpo_reference") -> str:
    """Say in Markdown where the arms are at the largest number of labels that every run has reached.

    The last column is a mean of differences of runs of one seed, which share the order of the prompts and the
    randomness of the samples.

    Args:
        rows: What was measured.
        arms: The name of each arm.
        against: The arm whose win rate is subtracted.
    """
    labels = last_labels(rows)
    base = by_seed(rows, against, labels, "win_rate")
    lines = [
        f"| after {labels} labels | seeds | win rate | KL | score | win rate less that of `{against}` |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, name in arms.items():
        wins = by_seed(rows, arm, labels, "win_rate")
        if not wins:
            continue
        cells = [_cell(list(by_seed(rows, arm, labels, column).values())) for column in ("win_rate", "kl", "score")]
        gains = [wins[seed] - base[seed] for seed in wins if seed in base]
        gain = "" if arm == against or not gains else _cell(gains)
        lines.append(f"| `{arm}`: {name} | {len(wins)} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    average, error = summary(values)
    return f"{average:.3f}" if math.isnan(error) else f"{average:.3f} ± {error:.3f}"
