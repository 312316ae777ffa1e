"""Rewards without a model, for `PythonReward`."""

from collections.abc import Mapping, Sequence
from typing import Any

from xpo_lightning.core.batch import RawPrompt


def concise(
    prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]], words: int = 25
) -> list[float]:
    """Prefer answers of a given length that end as a sentence does.

    Args:
        prompts: B prompts; not looked at.
        completions: B completions.
        columns: The rows' other columns; not looked at.
        words: The length that scores best.

    Returns:
        Minus the relative distance from that length, plus 0.5 for an answer that ends with a full stop, an exclamation
        or a question mark; -2 for an empty one. Length B.
    """
    return [_concise(completion.strip(), words) for completion in completions]


def _concise(completion: str, words: int) -> float:
    if not completion:
        return -2.0
    distance = abs(len(completion.split()) - words) / words
    return (0.5 if completion[-1] in ".!?" else 0.0) - min(distance, 2.0)
