"""From scores to labels: who wrote the better completion."""

import torch
from torch import Tensor

from xpo_lightning.batch import Pair
from xpo_lightning.errors import InputError


def argmax_labels(scores: Pair[Tensor]) -> Tensor:
    """Prefer the completion with the higher score.

    Equal scores prefer neither: the label is 0.5, so that a tie counts half for each side in the loss and in the win
    rate alike.

    Args:
        scores: The reward model's scores. (B,) a side

    Returns:
        Probability that the policy's completion is the better one: 1, 0 or 0.5. (B,)
    """
    margin = scores.by_policy - scores.by_reference
    return (torch.sign(margin) + 1) / 2


def check_penalty(penalty: float | None) -> float | None:
    """Refuse a penalty that would reward completions for being cut; give back any other."""
    if penalty is not None and not penalty >= 0:
        raise InputError(f"model.missing_eos_penalty must be at least 0 or null, but is {penalty}")
    return penalty


def penalize_missing_eos(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` from the scores of completions that were cut before they ended.

    Args:
        scores: The reward model's scores. (B,)
        ended: True where the completion ended by itself (EOS or a stop string). (B,)
        penalty: What a cut completion loses, in units of the score.

    Returns:
        The scores that are compared. (B,)
    """
    return torch.where(ended, scores, scores - penalty)
