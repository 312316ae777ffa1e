"""Trains `configs/reasoning.yaml` with several seeds, and measures its accuracy on held-out problems before and after.

    python benchmarks/reasoning.py --seeds 1 2 3 --json benchmarks/results/reasoning.json

Each seed is one `xpo fit`, and two `xpo predict` of its run: answers that are sampled as in training, and the most
likely ones. In both, the policy is the trained model and the reference the one that it began with, on the same
problems. Held-out problems that happen to be among the training problems are left out. What is finished is not run
again.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from xpo_lightning.data.reasoning_tasks import read_task

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "configs/reasoning.yaml"
TEMPERATURES = {"sampled": "1", "greedy": "0"}
Row = dict[str, Any]


def is_right(row: Row, side: str) -> bool:
    """Tell whether the run's own reward calls a completion right."""
    return bool(row[f"{side}_score"] == 1)


def is_bare(row: Row, side: str) -> bool:
    """Tell whether a completion is the right answer and nothing else, spaces around it aside."""
    return bool(row[side].strip() == str(row["columns"]["answer"]))


def holds(row: Row, side: str) -> bool:
    """Tell whether the right answer is among the numbers of a completion, whatever else is written there."""
    return str(row["columns"]["answer"]) in re.findall(r"-?\d+", row[side])


MEASURES: dict[str, Callable[[Row, str], bool]] = {"reward": is_right, "bare": is_bare, "anywhere": holds}
"""The run's own reward; a stricter measure; and one that does not mind the format at all."""


def summarize(rows: Iterable[Row], trained: set[str]) -> dict[str, Any]:
    """Count right answers of the reference and of the policy, on problems that are not among the training problems.

    Of a problem that the task made up twice, the first answer counts.

    Args:
        rows: Rows that `xpo predict` wrote.
        trained: The prompts of the training problems.

    Returns:
        The number of problems, and for each measure how many are right before and after, and how many became right
        (`gained`) and wrong (`lost`).
    """
    unseen: dict[str, Row] = {}
    for row in rows:
        if row["prompt"] not in trained:
            unseen.setdefault(row["prompt"], row)
    result: dict[str, Any] = {"problems": len(unseen)}
    for name, measure in MEASURES.items():
        pairs = [(measure(row, "reference"), measure(row, "policy")) for row in unseen.values()]
        before, after = (sum(side) for side in zip(*pairs, strict=True))
        result[name] = {"before": before, "after": after, "gained": pairs.count((False, True))}
        result[name]["lost"] = pairs.count((True, False))
    return result


def training_prompts() -> set[str]:
    """Return the prompts that the recipe trains on."""
    data = yaml.safe_load((ROOT / RECIPE).read_text(encoding="utf-8"))["data"]
    return {row["prompt"] for _, row in read_task(data["source"], "data.source")}


def xpo(log: Path, *words: str) -> None:
    """Run a command of the package.

    Raises:
        SystemExit: It failed.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w") as file:
        command = [sys.executable, "-m", "xpo_lightning", *words]
        done = subprocess.run(  # noqa: S603  (our own command)
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=file, stderr=file, check=False
        )
    if done.returncode:
        raise SystemExit(f"xpo {' '.join(words)} failed, see {log}")


def train(seed: int, folder: Path) -> None:
    """Train with a seed, unless that has been done; validation is left out, since `predict` measures more."""
    mark = folder / "fit.json"
    if mark.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = ("--seed_everything", str(seed), "--trainer.limit_val_batches", "0")
    begun, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    xpo(folder / "fit.log", "fit", "--config", RECIPE, *options, "--trainer.default_root_dir", str(folder))
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    seconds = {"seconds": round(time.perf_counter() - begun), "processor_seconds": round(processor)}
    mark.write_text(json.dumps(seconds), encoding="utf-8")


def predict(folder: Path, name: str) -> None:
    """Write the answers to all held-out problems, unless that has been done."""
    if not (folder / f"{name}.jsonl").exists():
        options = ("--model.sampling.temperature", TEMPERATURES[name], "--data.max_validation_prompts", "null")
        xpo(folder / f"{name}.log", "predict", str(folder), *options)
        (file,) = folder.rglob("predictions.jsonl")
        file.rename(folder / f"{name}.jsonl")


def collect(folder: Path, trained: set[str]) -> dict[str, Any]:
    """Count right answers in what there is of a run."""
    found = {name: folder / f"{name}.jsonl" for name in TEMPERATURES if (folder / f"{name}.jsonl").exists()}
    rows = {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in found.items()}
    return {**json.loads((folder / "fit.json").read_text()), **{name: summarize(rows[name], trained) for name in rows}}


def described(seeds: list[int]) -> dict[str, Any]:
    """Describe when, of what and on what the numbers are."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "command": f"python benchmarks/reasoning.py --seeds {' '.join(map(str, seeds))}",
        "machine": f"{os.cpu_count()} cores of an {models[0] if models else platform.processor()}",
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "torch": version("torch"),
    }


def main() -> None:
    """Train each seed, then measure each, and write the results after each measurement."""
    args = _arguments()
    trained, folders = training_prompts(), {seed: args.out.resolve() / f"seed-{seed}" for seed in args.seeds}
    description = described(args.seeds)
    for seed, folder in folders.items():
        train(seed, folder)
    for name in TEMPERATURES:
        for folder in folders.values():
            predict(folder, name)
            runs = [{"seed": each, **collect(place, trained)} for each, place in folders.items()]
            print(json.dumps(runs), flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps({**description, "runs": runs}, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="the seeds (1 2 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/reasoning_seeds"), help="where the runs go")
    parser.add_argument("--json", type=Path, help="where the results go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
