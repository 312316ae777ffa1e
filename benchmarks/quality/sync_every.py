"""Trains the quickstart with a policy that is behind when it writes, and compares win rates with those without delay.

    python -m benchmarks.quality.sync_every --json benchmarks/results/sync_every.json

Each run is one `xpo fit --config quickstart`, whose policy's completions are written by `EarlierPolicy` with weights
that are renewed every s batches. What is finished is not run again.
"""

import argparse
import csv
import json
import math
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.xpo_runs import Run

ENGINE = "benchmarks.quality.earlier_policy.EarlierPolicy"
NAMES = {"win_rate": "eval/win_rate", "kl": "eval/objective/kl", "score": "eval/objective/model_scores"}
Row = dict[str, Any]


def train(out: Path, every: int, seed: int, further: list[str]) -> Row:
    """Make a run unless it is there, and return its last validation."""
    engine = ("--model.rollout", ENGINE, "--model.rollout.sync_every", str(every))
    options = ("--config", "quickstart", "--seed_everything", str(seed), *engine, *further)
    run = Run(f"every-{every}", seed, out / f"every-{every}-seed-{seed}", options)
    if not run.is_finished and run.make(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))) is None:
        raise SystemExit(f"the run failed, see {run.folder / 'log.txt'}")
    with (run.folder / "version_0" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval/win_rate")]
    last = rows[-1]
    numbers = {name: float(last[column]) for name, column in NAMES.items()}
    return {"sync_every": every, "seed": seed, "steps": round(float(last["step"])), **numbers}


def differences(rows: list[Row], every: int, base: int, name: str) -> list[float]:
    """Return, for each seed, a number at one delay less that at another."""
    found = {(row["sync_every"], row["seed"]): float(row[name]) for row in rows}
    return [value - found[base, seed] for (one, seed), value in found.items() if one == every]


def table(rows: list[Row]) -> str:
    """Say in Markdown what each delay ended at."""
    delays = sorted({int(row["sync_every"]) for row in rows})
    lines = ["| sync_every | seeds | win rate | KL | win rate less that of 1 |", "| --- | --- | --- | --- | --- |"]
    for every in delays:
        mine = [row for row in rows if row["sync_every"] == every]
        gap = "" if every == delays[0] else spread(differences(rows, every, delays[0], "win_rate"))
        cells = (spread([row[name] for row in mine]) for name in ("win_rate", "kl"))
        lines.append(f"| {every} | {len(mine)} | {' | '.join(cells)} | {gap} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Say a mean and its standard error."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def main() -> None:
    """Make the runs that are missing, write down their ends, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", nargs="+", type=int, default=[1, 10], help="delays, in batches (1 10)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of each (1 2 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/sync_every"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("options", nargs="*", help="after --: further options of `xpo fit`")
    args = parser.parse_args()
    rows = [train(args.out.resolve(), every, seed, args.options) for seed in args.seeds for every in args.every]
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
