"""The reward of the task on sums: a number and nothing else scores half, the right one scores 1."""

import re
from collections.abc import Sequence
from typing import Any

from xpo_lightning.rollout.decoding import cut_at_stop

STOPS = (".", "\n")
"""Strings at which an answer ends, as in `sums.yaml`."""


def reward(prompts: Sequence[str], completions: Sequence[str], columns: dict[str, list[Any]]) -> list[float]:
    """Score answers.

    Args:
        prompts: B problems.
        completions: B answers; one may hold the stop string that ended it.
        columns: `answer`, the right answer of each.
    """
    return [_score(cut(text), str(answer)) for text, answer in zip(completions, columns["answer"], strict=True)]


def cut(text: str) -> str:
    """Return an answer up to its first stop string."""
    return cut_at_stop(text, STOPS)[0]


def _score(text: str, answer: str) -> float:
    number = text.strip()
    if not re.fullmatch(r"-?\d{1,9}", number):
        return 0.0
    return 1.0 if int(number) == int(answer) else 0.5
