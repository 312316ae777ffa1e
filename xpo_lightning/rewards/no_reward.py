"""`NoReward`: stands in for the reward of a run that trains on preference pairs alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.base import Reward

MISSING = (
    "model.reward: nothing says which of two sampled completions is better; give a reward or a judge, or train on "
    "preference pairs alone, with data.preferences and without data.source"
)


class NoReward(Reward):
    """The reward of a module that has none: pairs of a preference data set need none, and others are refused."""

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Refuse to score."""
        raise InputError(MISSING)
