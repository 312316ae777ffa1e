"""XPO beside online DPO at equal numbers of labelled pairs: all arms and seeds, by the command line that users have.

Every arm is an overlay in `arms/` on the same shipped config. A run that is finished is not run again, so the same
command goes on where it was stopped. What is measured goes to `curves.csv`, and is drawn in `curves.png`.
"""

import argparse
import sys
from pathlib import Path

import label_curves
import label_plot

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from xpo_runs import ROOT, Run, make_all

ARMS = {
    "xpo": "XPO, alpha 0.05 beta",
    "xpo_small": "XPO, alpha 1e-5",
    "dpo_reference": "DPO, policy and reference",
    "online_dpo": "online DPO, policy twice",
}
CONFIGS = {"quickstart": "configs/quickstart.yaml", "smollm2": "configs/smollm2.yaml"}
REPEATED = {"smollm2": Path("configs/data/smollm2_prompts_validation.jsonl")}
"""Validation prompts that are too few for one answer each to say much."""


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
    """Make the runs that are missing; return how many failed."""
    out.mkdir(parents=True, exist_ok=True)
    options = _shared_options(args, out)
    # Seeds go round in the outer loop, so that whatever has been made at some time compares the arms.
    return make_all(
        [_run(arm, seed, out, args.model, options) for seed in args.seeds for arm in args.arms], args.processes
    )


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
