"""Run the zoo: `python tests/zoo [--only NAME,...] [--modes MODE,...] [--markdown FILE]`."""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers

from zoo.compare import Outcome, compare, describe
from zoo.families import BUILDABLE, UNBUILDABLE, build
from zoo.rewards import CLASSIFIERS, compare_reward
from zoo.step import MODES
from zoo.strangers import STRANGERS
from zoo.table import Outcomes, write_table

REWARD = "reward"


def main() -> int:
    """Compare each family in each mode, say what came of it, and return how many came out wrong."""
    parser = argparse.ArgumentParser("python tests/zoo", description="Compare families of models with a naive loop.")
    parser.add_argument("--only", help="names of families, with commas between them; all by default")
    parser.add_argument("--modes", help=f"of {', '.join([*MODES, REWARD])}; all by default")
    parser.add_argument("--markdown", type=Path, help="write a table of all that was compared")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    modes = options.modes.split(",") if options.modes else [*MODES, REWARD]
    names = options.only.split(",") if options.only else list(dict.fromkeys([*BUILDABLE, *CLASSIFIERS]))
    strange = [name for name in names if name not in {*BUILDABLE, *UNBUILDABLE, *CLASSIFIERS}]
    if strange:
        parser.error(f"unknown families: {', '.join(strange)}")
    start, outcomes = time.monotonic(), Outcomes()
    for name in names:
        for mode in modes:
            if _is_tried(name, mode):
                outcomes[name, mode] = outcome = _try(_comparison(name, mode))
                print(f"{name:26s} {mode:16s} {outcome}", flush=True)
    bad = [place for place, outcome in outcomes.items() if outcome.kind not in ("right", "refused")]
    print(f"{len(outcomes)} comparisons in {time.monotonic() - start:.0f} s, {len(bad)} of them bad")
    if options.markdown:
        write_table(options.markdown, outcomes)
    return len(bad)


def _is_tried(name: str, mode: str) -> bool:
    """Tell whether there is such a model; a stranger cannot be loaded, as the mode with dropout has to."""
    return name in (CLASSIFIERS if mode == REWARD else BUILDABLE) and not ("dropout" in mode and name in STRANGERS)


def _comparison(name: str, mode: str) -> Callable[[], Outcome]:
    return partial(compare_reward, name) if mode == REWARD else partial(compare, partial(build, name), MODES[mode])


def _try(comparison: Callable[[], Outcome]) -> Outcome:
    try:
        return comparison()
    except Exception as error:  # the zoo's own: a family that it cannot build, or run row by row
        return Outcome("UNTRIED", message=describe(error))


if __name__ == "__main__":
    sys.exit(min(main(), 1))
