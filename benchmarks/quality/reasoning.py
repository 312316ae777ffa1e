"""Trains `configs/reasoning.yaml` with several seeds, and measures its accuracy on held-out problems before and after.

    python -m benchmarks.quality.reasoning --seeds 1 2 3 --json benchmarks/results/reasoning.json

Each seed is one `xpo fit`. Then transformers' own `generate` answers the held-out problems with the model that the runs
began with, and with each exported policy: sampled as in training, and greedily. Held-out problems that happen to be
among the training problems are left out, and one that the task made up twice counts once. What is finished is not run
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
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from xpo_lightning import ModelSpec, VerifierReward
from xpo_lightning.data.reasoning_tasks import read_task
from xpo_lightning.rollout.decoding import cut_at_stop

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "configs/reasoning.yaml"
ROWS = 64
"""Problems that are answered together."""
WAYS = {"sampled": True, "greedy": False}
Row = dict[str, Any]


def is_right(text: str, answer: str, score: float) -> bool:
    """Tell whether the run's own reward calls a completion right."""
    return score == 1


def is_bare(text: str, answer: str, score: float) -> bool:
    """Tell whether a completion is the right answer and nothing else, spaces around it aside."""
    return text.strip() == answer


def holds(text: str, answer: str, score: float) -> bool:
    """Tell whether the right answer is among the numbers of a completion, whatever else is written there."""
    return answer in re.findall(r"-?\d+", text)


MEASURES: dict[str, Callable[[str, str, float], bool]] = {"reward": is_right, "bare": is_bare, "anywhere": holds}
"""The run's own reward; a stricter measure; and one that does not mind the format at all."""


def verdicts(reward: VerifierReward, problems: Sequence[Row], texts: Sequence[str]) -> dict[str, list[bool]]:
    """Tell for each completion whether it is right, by each measure."""
    answers = [str(row["answer"]) for row in problems]
    scores = reward([row["prompt"] for row in problems], list(texts), {"answer": answers}).tolist()
    given = list(zip(texts, answers, scores, strict=True))
    return {name: [measure(*each) for each in given] for name, measure in MEASURES.items()}


def compare(before: Sequence[bool], after: Sequence[bool]) -> dict[str, int]:
    """Count what is right before and after, and what became right (`gained`) and wrong (`lost`)."""
    pairs = list(zip(before, after, strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return {"before": sum(before), "after": sum(after), "gained": gained, "lost": lost}


def held_out(data: dict[str, Any]) -> list[Row]:
    """Return the held-out problems that are not among the training problems, each once."""
    trained = {row["prompt"] for _, row in read_task(data["source"], "data.source")}
    rows = {row["prompt"]: row for _, row in read_task(data["validation_source"], "data.validation_source")}
    return [row for prompt, row in rows.items() if prompt not in trained]


def cut(text: str, stops: Sequence[str]) -> str:
    """Return a completion up to the first stop string."""
    return cut_at_stop(text, stops)[0]


def answer(model: Any, tokenizer: Any, prompts: Sequence[str], sampling: dict[str, Any], samples: bool) -> list[str]:
    """Complete prompts as the recipe's sampling does, or with the most likely tokens."""
    torch.manual_seed(0)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if samples else {}
    written: list[str] = []
    for start in range(0, len(prompts), ROWS):
        batch = tokenizer(list(prompts[start : start + ROWS]), return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = model.generate(
                **batch,
                **{"do_sample": False, **options},
                max_new_tokens=sampling["max_new_tokens"],
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        written += [cut(text, sampling["stop_strings"]) for text in texts]
    return written


def answer_all(
    recipe: dict[str, Any], problems: Sequence[Row], out: Path, seeds: Sequence[int], ways: Sequence[str]
) -> None:
    """Write the answers of the first model and of each exported policy to files, unless that has been done."""
    policies = {str(seed): str(out / f"seed-{seed}" / "version_0" / "policy") for seed in seeds}
    first, sampling = recipe["model"]["policy"], recipe["model"]["sampling"]
    tokenizer = ModelSpec(**first).load_tokenizer()
    for who, path in {"before": first["path"], **policies}.items():
        files = {way: out / f"{way}-{who}.json" for way in ways if not (out / f"{way}-{who}.json").exists()}
        if files:
            model = ModelSpec(**{**first, "path": path}).load_model().eval()
        for way, file in files.items():
            texts = answer(model, tokenizer, [row["prompt"] for row in problems], sampling, WAYS[way])
            file.write_text(json.dumps(texts), encoding="utf-8")


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
    """Train with a seed, unless that has been done; validation is left out, since the answers below measure more."""
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


def collect(
    recipe: dict[str, Any], problems: Sequence[Row], out: Path, seeds: Sequence[int], ways: Sequence[str]
) -> dict[str, Any]:
    """Count right answers of each run, before and after."""
    reward = VerifierReward(**recipe["model"]["reward"]["init_args"])
    runs = [{"seed": seed, **json.loads((out / f"seed-{seed}" / "fit.json").read_text())} for seed in seeds]
    for way in ways:
        before, *after = (
            verdicts(reward, problems, json.loads((out / f"{way}-{who}.json").read_text()))
            for who in ("before", *seeds)
        )
        for run, each in zip(runs, after, strict=True):
            run[way] = {name: compare(before[name], each[name]) for name in MEASURES}
    return {"problems": len(problems), "runs": runs}


def described(seeds: Sequence[int], ways: Sequence[str]) -> dict[str, Any]:
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
        "command": " ".join(["python -m benchmarks.quality.reasoning --seeds", *map(str, seeds), "--ways", *ways]),
        "machine": f"{os.cpu_count()} cores of an {models[0] if models else platform.processor()}",
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "torch": version("torch"),
    }


def main() -> None:
    """Train each seed, answer the held-out problems, and write the results."""
    args = _arguments()
    out, recipe = args.out.resolve(), yaml.safe_load((ROOT / RECIPE).read_text(encoding="utf-8"))
    problems, description = held_out(recipe["data"]), described(args.seeds, args.ways)
    for seed in args.seeds:
        train(seed, out / f"seed-{seed}")
    answer_all(recipe, problems, out, args.seeds, args.ways)
    result = {**description, **collect(recipe, problems, out, args.seeds, args.ways)}
    print(json.dumps(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="the seeds (1 2 3)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways of answering (all)")
    parser.add_argument("--out", type=Path, default=Path("runs/reasoning_seeds"), help="where the runs go")
    parser.add_argument("--json", type=Path, help="where the results go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
