"""Measures what a step of each recipe in `configs/methods` costs against a step of the quickstart (XPO), in pairs.

    python -m benchmarks.speed.methods            # all recipes
    python -m benchmarks.speed.methods selm copo  # some

Each round runs the quickstart and then the recipe, in this process, for a few steps each; the ratio of the two is that
round's. What is measured is processor time, which others on the machine change little. The policy does not learn
(learning rate 1e-12), so that completions do not grow shorter under one method and not under another.
"""

import argparse
import time
import warnings
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl

from xpo_lightning.cli import lightning_cli
from xpo_lightning.core.recipes import recipes

ROUNDS, STEPS, WARM_UP = 3, 5, 2


class Seconds(pl.Callback):
    """Measures the processor seconds of each training step."""

    last: "Seconds"

    def __init__(self) -> None:
        Seconds.last, self.steps = self, []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._begin = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.steps.append(time.process_time() - self._begin)


def seconds_of_step(folder: str, *configs: str) -> float:
    """Train on a few batches, and return the median of their seconds without the first ones."""
    words = [word for config in ("quickstart", *configs) for word in ("--config", config)]
    words += ["--trainer.max_steps=-1", "--trainer.max_epochs=1", f"--trainer.limit_train_batches={STEPS}"]
    words += ["--trainer.val_check_interval=null", "--trainer.limit_val_batches=0"]
    words += ["--trainer.num_sanity_val_steps=0", f"--trainer.default_root_dir={folder}", "--trainer.logger=false"]
    words += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    words += ["--model.learning_rate=1e-12", f"--trainer.callbacks+={{class_path: {__name__}.Seconds}}"]
    lightning_cli.main(["fit", *words])
    return median(Seconds.last.steps[WARM_UP:])


def ratios(folder: str, method: str) -> list[float]:
    """Return the ratio of each round: the recipe's step by the quickstart's."""
    found = []
    for _ in range(ROUNDS):
        base = seconds_of_step(folder)
        found.append(seconds_of_step(folder, method) / base)
    return found


def main() -> None:
    """Print a line for each recipe: the median ratio, and the lowest and the highest."""
    known = [name.removeprefix("methods/") for name in recipes() if name.startswith("methods/")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"some of {', '.join(known)}; by default all")
    methods = parser.parse_args().methods
    if unknown := set(methods) - set(known):
        parser.error(f"there are no recipes {', '.join(sorted(unknown))} (there are {', '.join(known)})")
    warnings.filterwarnings("ignore")
    with TemporaryDirectory() as folder:
        seconds_of_step(folder)  # whatever is slow only once
        for method in methods or known:
            found = sorted(ratios(folder, f"methods/{method}"))
            print(f"{method:12} {median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
