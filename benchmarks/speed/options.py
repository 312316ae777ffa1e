"""The command-line options that the scripts share, and the models and prompts that they ask for."""

import argparse
from pathlib import Path

from benchmarks.speed.environments import start
from benchmarks.speed.suites import Suite

DEFAULT_WORK = Path.home() / ".cache" / "xpo-lightning-benchmarks"
WARM_UP_PROMPTS = 32


def absolute_path(text: str) -> Path:
    """Read a path; workers start in another folder. Links stay: an environment's interpreter is one."""
    return Path(text).absolute()


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that say where things are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--work", type=absolute_path, default=DEFAULT_WORK, help="folder for environments, models and prompts"
    )
    parser.add_argument("--tokenizer", default="EleutherAI/pythia-14m", help="the tokenizer of suite pythia")
    parser.add_argument(
        "--prompts", default="trl-lib/tldr", help="JSONL file with a field `prompt`, or data set on the hub"
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    return parser


def make_assets(python: Path, suite: Suite, args: argparse.Namespace) -> Path:
    """Make the models and prompts of a suite, and return their folder."""
    folder: Path = args.work / "assets" / suite.assets
    where = ["--tokenizer", args.tokenizer, "--prompts", args.prompts, "--count", str(suite.prompts + WARM_UP_PROMPTS)]
    start(python, "speed.assets", suite.assets, str(folder), *where)
    return folder
