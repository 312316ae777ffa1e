"""A reward that is a weighted sum of other rewards."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.distributed import all_gather_guarded
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fingerprint import recorded_path
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.validation import as_scores

Normalize = Literal["none", "batch"]


class WeightedSum(Reward):
    """Adds up the scores of several rewards, each times its weight.

    Args:
        rewards: The rewards, at least one.
        weights: One weight for each reward; a negative one turns its reward into a penalty.
        normalize: `batch` standardises each reward's scores before they are weighted, so that rewards of different
            scales count alike: it subtracts their mean and divides by their standard deviation, both over all
            completions that are scored together, on all processes. Scores that are all equal become 0. A completion's
            score then depends on the others of its batch. `none` takes scores as they are.

    Raises:
        InputError: There are no rewards, not as many weights as rewards, or an option has an impossible value.
    """

    def __init__(self, rewards: list[Reward], weights: list[float], normalize: Normalize = "none") -> None:
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
        if normalize not in get_args(Normalize):
            raise InputError(f"model.reward.init_args.normalize must be none or batch, but is {normalize!r}")
        self.rewards = nn.ModuleList(rewards)
        self.weights = tuple(weights)
        self.normalize: Normalize = normalize

    @property
    def depends_on_batch(self) -> bool:
        """Whether a completion's score depends on the others that are scored with it, so that it cannot be cached."""
        return self.normalize == "batch" or any(reward.depends_on_batch for reward in self._parts())

    def load(self) -> None:
        """Load every reward."""
        for reward in self._parts():
            reward.load()

    def identity(self) -> dict[str, Any]:
        """Return the weights, the normalization, and the identity of each reward."""
        parts = [reward.identity() for reward in self._parts()]
        own = {"class": recorded_path(type(self)), "weights": list(self.weights), "normalize": self.normalize}
        return {**own, "rewards": parts}

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Score with every reward, and return the weighted sum.

        Args:
            prompts: B prompts, text or chat messages.
            completions: B completions.
            columns: The rows' other columns, each of length B.

        Returns:
            sum_i weight_i * score_i, float32. (B,)

        Raises:
            InputError: One of the rewards raised, or did not return B numbers; the message names it.
            NonFiniteError: Some scores of one of the rewards, or some sums, are not finite; or another process has
                failed, if scores are standardised.
        """
        scores = [
            as_scores(reward(prompts, completions, columns), len(completions), type(reward).__name__)
            for reward in self._parts()
        ]
        if self.normalize == "batch":
            scores = _standardized(scores)
        total = torch.zeros(len(completions), dtype=torch.float32)
        for score, weight in zip(scores, self.weights, strict=True):
            total = total + weight * score
        return as_scores(total, len(completions), type(self).__name__)

    def _parts(self) -> list[Reward]:
        return [reward for reward in self.rewards if isinstance(reward, Reward)]


def _standardized(scores: Sequence[Tensor]) -> list[Tensor]:
    """Standardise each reward's scores over all processes (collective).

    Args:
        scores: This process's scores, by each reward. (B,) each

    Returns:
        (score - mean) / standard deviation of the population, float32; 0 if the deviation is 0. (B,) each
    """
    standardized = []
    for own, *everywhere in zip(scores, *all_gather_guarded(list(scores)), strict=True):
        values = torch.cat(everywhere).double()
        mean = values.mean()
        deviation = (values - mean).square().mean().sqrt()
        # The mean of equal float32 numbers is exact in float64, so their deviation is exactly 0.
        z = (own.double() - mean) / deviation if deviation > 0 else torch.zeros_like(own)
        standardized.append(z.float())
    return standardized
