"""Stands in for the reward of a run that trains on preference pairs alone."""

from typing import Any

from torch import Tensor

from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.base import Feedback

MISSING = (
    "model.reward: nothing says which of two sampled completions is better; give a reward or a judge, or train on "
    "preference pairs alone, with data.preferences and without data.source"
)


class _NoReward(Feedback):
    """The reward of a module that has none: pairs of a preference data set need none, and others are refused."""

    def forward(self, *args: Any) -> Tensor:
        """Refuse to score."""
        raise InputError(MISSING)


def no_reward() -> Feedback:
    """Return what a module without a reward has in its place; it refuses to score."""
    return _NoReward()


def is_missing(reward: Feedback) -> bool:
    """Tell whether a module has no reward."""
    return isinstance(reward, _NoReward)
