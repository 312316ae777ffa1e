"""Writes the embedded preference pairs: ``python -m tools.quickstart_assets.pairs [--out DIR]``."""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tools.quickstart_assets.grammar import draw_completion, draw_moods, draw_prompts, read_facts
from tools.quickstart_assets.judge import utility

SEED: Final = 20241
PAIRS: Final = 192
LEAST: Final = 1.0  # difference in true utility: a pair is to say something
NAME: Final = "preferences.jsonl"


def draw_pairs(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Draws training prompts with two completions of the grammar each, the one of higher true utility chosen."""
    pairs = []
    for prompt in draw_prompts(rng, count, held_out=False):
        facts = read_facts(prompt)
        worths: list[float] = [0.0, 0.0]
        texts = ["", ""]
        while abs(worths[0] - worths[1]) < LEAST:
            texts = [draw_completion(rng, facts, draw_moods(rng)) for _ in range(2)]
            worths = [utility(prompt, text) for text in texts]
        chosen, rejected = texts if worths[0] > worths[1] else texts[::-1]
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def write_pairs(out: Path) -> None:
    """Writes one JSON object per line."""
    pairs = draw_pairs(random.Random(SEED), PAIRS)
    (out / NAME).write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="ascii")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parents[2] / "xpo_lightning" / "embedded"
    parser.add_argument("--out", type=Path, default=default, help="directory to write to")
    write_pairs(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
