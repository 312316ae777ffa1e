"""Seconds a step of the quickstart, by how OpenMP's threads wait, alone and beside a busy process."""

import argparse
import csv
import os
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl

from benchmarks.speed.busy import busy_processes
from benchmarks.speed.environments import start
from xpo_lightning.cli import lightning_cli
from xpo_lightning.module import XPOLightningModule

WAYS = {
    "default": {},
    "50000": {"GOMP_SPINCOUNT": "50000"},
    "10000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
STEPS, WARM_UP = 14, 2
FIT = "fit --config quickstart --trainer.num_sanity_val_steps 0 --trainer.callbacks [] --trainer.logger false"


def main() -> None:
    """Take turns with all ways, alone and beside a busy process, and write the seconds as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=Path("thread_waiting.csv"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(_median_step())
        return
    with args.csv.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["round", "waiting", "other_processes", "seconds_a_step"])
        for number in range(1, args.repeats + 1):
            for way, environment in WAYS.items():
                for others in (0, 1):
                    row = [number, way, others, f"{_measured(environment, others):.4f}"]
                    out.writerow(row)
                    file.flush()
                    print(*row, flush=True)


def _measured(environment: dict[str, str], others: int) -> float:
    with busy_processes(others):
        printed = start(sys.executable, "speed.thread_waiting", "--worker", env={**os.environ, **environment})
    return float(printed.split()[-1])


def _median_step() -> float:
    times: list[float] = []
    step = XPOLightningModule.training_step

    def timed(module: XPOLightningModule, batch: Any, batch_idx: int) -> Any:
        begun = time.perf_counter()
        result = step(module, batch, batch_idx)
        times.append(time.perf_counter() - begun)
        return result

    XPOLightningModule.training_step = timed  # type: ignore[method-assign]
    pl.seed_everything(0, verbose=False)
    with TemporaryDirectory() as folder:
        more = ["--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", "1000"]
        lightning_cli.main([*FIT.split(), *more, "--trainer.default_root_dir", folder])
    return statistics.median(times[WARM_UP:])


if __name__ == "__main__":
    main()
