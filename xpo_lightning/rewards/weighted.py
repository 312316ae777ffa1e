"""A reward made of other rewards."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xpo_lightning.batch import RawPrompt
from xpo_lightning.errors import InputError
from xpo_lightning.identity import import_path
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.checks import as_scores


class WeightedSum(Reward):
    """Adds up the scores of several rewards, each times its weight.

    Args:
        rewards: The rewards, at least one.
        weights: One weight for each reward; a negative one turns its reward into a penalty.

    Raises:
        InputError: There are no rewards, not as many weights as rewards, or a weight is not finite.
    """

    def __init__(self, rewards: list[Reward], weights: list[float]) -> None:
        super().__init__()
        if not rewards:
            raise InputError("model.reward.init_args.rewards: give at least one reward")
        if len(weights) != len(rewards):
            raise InputError(
                f"model.reward.init_args.weights: expected {len(rewards)} weights, one for each reward, "
                f"but got {len(weights)}"
            )
        if not all(math.isfinite(weight) for weight in weights):
            raise InputError(f"model.reward.init_args.weights: every weight must be a finite number, but got {weights}")
        self.rewards = nn.ModuleList(rewards)
        self.weights = tuple(weights)

    def load(self) -> None:
        """Load every reward."""
        for reward in self._parts():
            reward.load()

    def identity(self) -> dict[str, Any]:
        """Name the weights, and what each reward says of itself."""
        parts = [reward.identity() for reward in self._parts()]
        return {"class": import_path(type(self)), "weights": list(self.weights), "rewards": parts}

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Score with every reward and add up.

        Args:
            prompts: B prompts, text or chat messages.
            completions: B completions.
            columns: The rows' other columns, each of length B.

        Returns:
            sum_i weight_i * score_i, float32. (B,)

        Raises:
            InputError: One of the rewards raised, or did not give B numbers; the message names it.
            NonFiniteError: Some scores of one of the rewards, or some sums, are not finite.
        """
        total = torch.zeros(len(completions), dtype=torch.float32)
        for reward, weight in zip(self._parts(), self.weights, strict=True):
            score = reward(prompts, completions, columns)
            total = total + weight * as_scores(score, len(completions), type(reward).__name__)
        return as_scores(total, len(completions), type(self).__name__)

    def _parts(self) -> list[Reward]:
        return [reward for reward in self.rewards if isinstance(reward, Reward)]
