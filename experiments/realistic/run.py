"""XPO beside online DPO at equal numbers of labelled pairs: all arms and seeds, by the command line that users have.

Every arm is an overlay in `arms/` on the same shipped config. A run that is finished is not run again, so the same
command goes on where it was stopped. What is measured goes to `curves.csv`, and is drawn in `curves.png`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import label_curves
import label_plot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ARMS = {
    "xpo": "XPO, alpha 0.05 beta",
    "xpo_small": "XPO, alpha 1e-5",
    "dpo_reference": "DPO, policy and reference",
    "online_dpo": "online DPO, policy twice",
}
CONFIGS = {"quickstart": "configs/quickstart.yaml", "smollm2": "configs/smollm2.yaml"}
REPEATED = {"smollm2": Path("configs/data/smollm2_prompts_validation.jsonl")}
"""Validation prompts that are too few for one answer each to say much."""


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        arm: Its overlay.
        seed: Its seed.
        folder: Where its metrics and its log go.
        options: The options of `xpo fit`, except where to write.
    """

    arm: str
    seed: int
    folder: Path
    options: tuple[str, ...]

    @property
    def settings(self) -> dict[str, object]:
        """What the run is made with: its options, and what the YAML files among them say."""
        files = {option: (ROOT / option).read_text() for option in self.options if option.endswith(".yaml")}
        return {"options": list(self.options), "files": files}

    @property
    def is_finished(self) -> bool:
        """Whether the run has been made.

        Raises:
            SystemExit: It has been made with other settings.
        """
        mark = self.folder / "finished.json"
        if not mark.exists():
            return False
        if json.loads(mark.read_text()) != self.settings:
            raise SystemExit(f"{self.folder} was made with other settings; choose another --out, or remove it")
        return True

    def make(self, threads: int) -> float | None:
        """Make the run from its beginning; return its seconds, or None where it failed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        where = ("--trainer.default_root_dir", str(self.folder))
        command = [sys.executable, "-m", "xpo_lightning", "fit", *self.options, *where]
        python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": str(threads)}
        begun = time.perf_counter()
        with (self.folder / "log.txt").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, check=False)  # noqa: S603
        if done.returncode:
            return None
        (self.folder / "finished.json").write_text(json.dumps(self.settings, indent=1))
        return time.perf_counter() - begun


def main() -> int:
    """Make the runs that are missing, then collect, print and draw what all of them measured."""
    args = _arguments()
    out = (args.out or Path("runs/realistic") / args.model).resolve()
    failed = 0 if args.collect else _make(args, out)
    rows = label_curves.collect(out)
    if not rows:
        print(f"no measurements in {out}", file=sys.stderr)
        return 1
    label_curves.write(rows, out / "curves.csv")
    label_plot.draw(rows, ARMS, out / "curves.png")
    print(label_curves.table(rows, ARMS))
    print(f"\n{out / 'curves.csv'}\n{out / 'curves.png'}")
    return int(failed > 0)


def _make(args: argparse.Namespace, out: Path) -> int:
    """Make the runs that are missing, several at a time; return how many failed."""
    out.mkdir(parents=True, exist_ok=True)
    options = _shared_options(args, out)
    # Seeds go round in the outer loop, so that whatever has been made at some time compares the arms.
    runs = [_run(arm, seed, out, args.model, options) for seed in args.seeds for arm in args.arms]
    left = [run for run in runs if not run.is_finished]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are finished", flush=True)
    threads = max(1, (os.cpu_count() or 1) // args.processes)

    def make(run: Run) -> bool:
        seconds = run.make(threads)
        said = f"failed, see {run.folder / 'log.txt'}" if seconds is None else f"{seconds:.0f} s"
        print(f"{run.arm}, seed {run.seed}: {said}", flush=True)
        return seconds is None

    with ThreadPoolExecutor(args.processes) as pool:
        return sum(pool.map(make, left))


def _run(arm: str, seed: int, out: Path, model: str, options: list[str]) -> Run:
    files = [
        CONFIGS[model],
        *(str(path.relative_to(ROOT)) for path in (HERE / f"{model}.yaml", HERE / f"arms/{arm}.yaml")),
    ]
    configs = [part for file in files for part in ("--config", file)]
    return Run(arm, seed, out / f"{arm}-{seed}", (*configs, "--seed_everything", str(seed), *options))


def _shared_options(args: argparse.Namespace, out: Path) -> list[str]:
    options = ["--trainer.accelerator", args.accelerator]
    if args.steps is not None:
        options += ["--trainer.max_steps", str(args.steps)]
    if args.policy_path is not None:
        options += ["--model.policy.path", str(args.policy_path)]
    if args.model in REPEATED:
        prompts = (ROOT / REPEATED[args.model]).read_text()
        repeated = out / f"validation_{args.answers}.jsonl"
        repeated.write_text(prompts * args.answers)
        options += ["--data.validation_source", str(repeated)]
    return [*options, *args.options]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="quickstart", help="which shipped config to run")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which arms (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="the seeds of each arm (1 2 3)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (the config's)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu", help="where to run (cpu)")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, which share the cores or the GPU (1)")
    parser.add_argument("--policy-path", help="another path of the policy: a folder or a GGUF file")
    parser.add_argument("--answers", type=int, default=8, help="answers to each of smollm2's validation prompts (8)")
    parser.add_argument("--out", type=Path, help="where everything goes (runs/realistic/MODEL)")
    parser.add_argument("--collect", action="store_true", help="run nothing; collect what there is")
    parser.add_argument("options", nargs="*", help="after --: further options of `xpo fit`, for all runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
