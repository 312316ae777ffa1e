"""Parity with TRL 1.13.0: the same completions, scores and weights through TRL's training loop and through ours.

    python -m benchmarks.parity.check

Runs where this package is installed, and makes an environment for TRL itself. Nothing is timed.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.parity import our_side
from benchmarks.parity.findings import Finding, findings
from benchmarks.parity.pairs import AGREE, cases
from benchmarks.speed.environments import TRL, start, trl_python
from benchmarks.speed.options import DEFAULT_WORK, absolute_path

Results = Mapping[str, Mapping[str, Tensor]]
"""What a side made of each case: tensors by their names."""

TERMS = ("loss", "dpo", "xpo")
RECORDED = (*TERMS, "scores.by_policy", "scores.by_sampler")
HOW = (
    f"What {TRL} makes of the cases that benchmarks/parity/pairs.py calls AGREE: the loss of the batch; dpo, xpo and "
    "scores of each pair; the gradient of every weight, not clipped. Recorded by `python -m benchmarks.parity.check "
    "--record FILE` from XPOTrainer.train() on a CPU in float32; completions and raw scores were given, nothing else."
)


@dataclass(frozen=True)
class Distance:
    """How far two sides are apart.

    Args:
        loss: Largest difference of the batch's loss and of each term of a pair, as a share of the largest of TRL's.
        gradient: Largest difference of a gradient, as a share of the largest of TRL's in the same weight.
        weights: Weights, as tensors, that have a gradient.
    """

    loss: float
    gradient: float
    weights: int


def distance(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> Distance:
    """Compare what two sides made of a case.

    Raises:
        RuntimeError: They have gradients of different weights.
    """
    names = [{name for name in side if name.startswith("gradient.")} for side in (theirs, ours)]
    if names[0] != names[1] or not names[0]:
        raise RuntimeError(f"gradients of different weights: {sorted(names[0] ^ names[1])}")
    return Distance(
        loss=max(_relative(theirs[name], ours[name]) for name in TERMS),
        gradient=max(_relative(theirs[name], ours[name]) for name in names[0]),
        weights=len(names[0]),
    )


def _relative(theirs: Tensor, ours: Tensor) -> float:
    largest = float(theirs.abs().max())
    difference = float((theirs.double() - ours.double()).abs().max())
    # A bias of keys moves no attention weight, so its gradient is rounding on both sides.
    return difference / largest if largest > 1e-6 else difference


def run_trl(python: Path) -> dict[str, dict[str, Tensor]]:
    """Run TRL's side."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        start(python, "parity.trl_side", folder, env=env | {"HF_HUB_OFFLINE": "1"})
        return {file.stem: load_file(file) for file in Path(folder).glob("*.safetensors")}


def run_ours() -> dict[str, dict[str, Tensor]]:
    """Run our side."""
    results = {name: our_side.run(case) for name, case in cases().items()}
    results["reference samples"] = our_side.reference_samples()
    results["reward scores"] = our_side.reward_scores()
    return results


def record(theirs: Results, path: Path) -> None:
    """Write TRL's side of the cases in which it is right."""
    kept = {
        f"{case}/{name}": value
        for case in AGREE
        for name, value in theirs[case].items()
        if name in RECORDED or name.startswith("gradient.")
    }
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    save_file(kept, path, metadata={"how": HOW, "versions": f"{TRL}, {versions}"})


def agreement_table(theirs: Results, ours: Results) -> str:
    """Say in Markdown how far the sides are apart where TRL is right."""
    lines = [
        "| case | weights compared | largest difference of loss | largest difference of a gradient |",
        "| --- | --- | --- | --- |",
    ]
    for name in AGREE:
        apart = distance(theirs[name], ours[name])
        lines.append(f"| {name} | {apart.weights} | {apart.loss:.1e} | {apart.gradient:.1e} |")
    return "\n".join(lines)


def findings_table(found: Sequence[Finding]) -> str:
    """Say in Markdown where they differ."""
    lines = ["| what | TRL 1.13.0 | here | right | why |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {each.what} | {each.trl} | {each.ours} | {each.right} | {each.why} |" for each in found]
    return "\n".join(lines)


def main() -> int:
    """Run both sides and print both tables, or record TRL's side."""
    args = _arguments()
    theirs = run_trl(args.trl_python or trl_python(args.work))
    if args.record is not None:
        record(theirs, args.record)
        return 0
    ours = run_ours()
    print(agreement_table(theirs, ours), findings_table(findings(theirs, ours)), sep="\n\n")
    apart = [distance(theirs[name], ours[name]) for name in AGREE]
    return int(max(max(each.loss, each.gradient) for each in apart) > args.tolerance)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=absolute_path, default=DEFAULT_WORK, help="folder for TRL's environment")
    parser.add_argument("--trl-python", type=absolute_path, help="use this interpreter, which has TRL and peft")
    parser.add_argument("--record", type=Path, help="write TRL's side to this file, for the tests, and do nothing else")
    parser.add_argument("--tolerance", type=float, default=5e-5, help="fail beyond this relative difference (5e-5)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
