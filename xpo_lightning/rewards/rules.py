"""Rewards without a model, for `PythonReward`."""

from collections.abc import Mapping, Sequence
from typing import Any

from xpo_lightning.core.batch import RawPrompt


def concise(
    prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]], words: int = 25
) -> list[float]:
    """Score answers by how close they are to a given length and whether they end like a sentence.

    Args:
        prompts: B prompts; not used.
        completions: B completions.
        columns: The rows' other columns; not used.
        words: The number of words that scores best.

    Returns:
        Minus the relative distance from that length, at most 2, plus 0.5 for an answer that ends with a full stop, an
        exclamation or a question mark; -2 for an empty one. Length B.
    """
    return [_concise(completion.strip(), words) for completion in completions]


def _concise(completion: str, words: int) -> float:
    if not completion:
        return -2.0
    distance = abs(len(completion.split()) - words) / words
    return (0.5 if completion[-1] in ".!?" else 0.0) - min(distance, 2.0)
