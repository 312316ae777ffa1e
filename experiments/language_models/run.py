"""What exploration buys a language model: all arms and seeds on the story tasks, by the command line that users have.

    python experiments/language_models/run.py --processes 2

Runs that are finished are not made again, so the same command goes on where it was stopped. What all of them measured
goes to CSV files, which keep what they have of other runs, and to tables and figures. The page
docs/exploration_language_models.md was written before the runs.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
from comparing import table, with_tables
from drawing import draw
from reference import make as make_reference
from reference import save_smollm2
from results import Point, Result, add, collect
from tasks import ARMS, TASKS, Task
from xpo_runs import ROOT, Run, make_all


def main() -> int:
    """Make the runs that are missing, then write down what all of them measured."""
    args = _arguments()
    tasks = {name: replace(TASKS[name], seeds=args.seeds or TASKS[name].seeds) for name in args.tasks}
    failed = 0
    if not args.collect:
        # Seeds go round in the outer loop, so that whatever has been made at some time compares the arms.
        failed = make_all(sorted(_runs(args, tasks), key=lambda run: run.seed), args.processes)
    points, results = collect(args.out, list(tasks))
    if not results:
        print(f"no finished run in {args.out}", file=sys.stderr)
        return 1
    args.results.mkdir(parents=True, exist_ok=True)
    points = add(points, Point, args.results / "curves.csv")
    results = add(results, Result, args.results / "runs.csv")
    for name in {result.task: None for result in results}:
        draw(points, name, args.figures / f"exploration_{name}.png")
        print(f"{name}: {TASKS[name].about}\n\n{table(results, name)}\n")
    if args.page is not None:
        args.page.write_text(with_tables(args.page.read_text(encoding="utf-8"), results), encoding="utf-8")
    return int(failed > 0)


def _runs(args: argparse.Namespace, tasks: dict[str, Task]) -> list[Run]:
    runs = []
    for name, task in tasks.items():
        options = [*_policy(args, task), *args.options]
        for arm in [arm for arm in task.arms if not args.arms or arm in args.arms]:
            files = [HERE / name for name in (*task.configs, f"arms/{arm}.yaml")]
            if task.own_arms is not None and (HERE / task.own_arms / f"{arm}.yaml").exists():
                files.append(HERE / task.own_arms / f"{arm}.yaml")
            configs = [part for file in files for part in ("--config", str(file.relative_to(ROOT)))]
            for seed in range(1, task.seeds + 1):
                chosen = (*configs, "--seed_everything", str(seed), *options)
                runs.append(Run(arm, seed, args.out / name / f"{arm}-{seed}", chosen, (str(HERE),)))
    return runs


def _policy(args: argparse.Namespace, task: Task) -> list[str]:
    """Return the option that names a task's reference, which is made if it is not there."""
    if task.reference == "embedded":
        return []
    args.out.mkdir(parents=True, exist_ok=True)
    if task.reference == "smollm2":
        folder = save_smollm2(args.out / "smollm2")
    else:
        folder = make_reference(args.out / f"reference_{task.rarity:g}", task.rarity, args.reference_steps)
    return ["--model.policy.path", str(folder)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="which tasks (all)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="which arms (all of a task)")
    parser.add_argument("--seeds", type=int, help="seeds of each arm (the plan's)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, which share the cores (2)")
    parser.add_argument("--reference-steps", type=int, default=300, help="steps of the reference's own training (300)")
    parser.add_argument("--out", type=Path, default=Path("runs/language_models"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the CSV files (default: `results` in --out)")
    parser.add_argument("--figures", type=Path, help="folder of the figures (default: that of the CSV files)")
    parser.add_argument("--page", type=Path, help="a Markdown page whose tables are to be written anew")
    parser.add_argument("--collect", action="store_true", help="run nothing; collect what there is")
    parser.add_argument("options", nargs="*", help="after --: further options of `xpo fit`, for all runs")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.results = args.results or args.out / "results"
    args.figures = args.figures or args.results
    return args


if __name__ == "__main__":
    sys.exit(main())
