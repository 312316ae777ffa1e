"""Runs the exploration experiments: every arm on every problem, 20 seeds each, then tables and figures.

    python experiments/exploration/run.py --all

Finished runs are left out, so a sweep that was stopped goes on where it was. See docs/exploration.md.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from figures import draw
from plan import EXPERIMENTS, runs
from sweep import sweep
from tables import write_tables

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run what the command line asks for."""
    args = _arguments()
    chosen = [run for run in runs() if args.all or any(run.name.startswith(only) for only in args.only)]
    if not chosen:
        sys.exit(f"--only: no run is named so: {' '.join(args.only)}; see --all --list")
    if args.labels:
        chosen = [replace(run, labels=min(args.labels, run.most_labels)) for run in chosen]
    if args.list:
        print("\n".join(f"{run.name} ({run.steps} steps)" for run in chosen))
        return
    if not args.tables:
        failed = sweep(chosen, args.out, args.seeds, args.processes, args.logs)
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")
    write_tables(chosen, args.out, args.results)
    draw(args.results, args.figures)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="all runs")
    what.add_argument(
        "--only", nargs="+", default=[], help=f"runs whose names begin so: {', '.join(EXPERIMENTS)}, E1/beta_0.015/xpo"
    )
    parser.add_argument("--seeds", type=int, default=20, help="independent repetitions, in one run together")
    parser.add_argument("--labels", type=int, help="train on at most so many labels a seed, to try things out")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/exploration"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the tables (default: `results` in --out)")
    parser.add_argument("--figures", type=Path, help="folder of the figures (default: that of the tables)")
    parser.add_argument("--logs", action="store_true", help="log all metrics too, to metrics.csv in a run's folder")
    parser.add_argument("--list", action="store_true", help="name the runs, and do nothing")
    parser.add_argument("--tables", action="store_true", help="only write tables and figures of runs that are there")
    args = parser.parse_args()
    for name in ("seeds", "labels", "processes"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, but is {value}")
    args.out = args.out.absolute()
    args.results = args.results or args.out / "results"
    args.figures = args.figures or args.results
    return args


if __name__ == "__main__":
    main()
