"""From prompts to labelled pairs: sample both completions, score them, and keep what the frozen reference says."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xpo_lightning.batch import Completions, Experience, Pair, Prompts, cut
from xpo_lightning.logps import token_logps
from xpo_lightning.preference import argmax_labels, penalize_missing_eos
from xpo_lightning.reference import Reference
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.checks import as_scores
from xpo_lightning.rollout.local import LocalRollout


@dataclass
class Collector:
    """Collects the pairs of a batch of prompts.

    Args:
        rollout: Samples completions.
        reference: The frozen reference.
        reward: Scores completions.
        missing_eos_penalty: What a completion that was cut loses in score; None is off.
        rows_at_once: Most completions that the reference scores in one forward pass.
    """

    rollout: LocalRollout
    reference: Reference
    reward: Reward
    missing_eos_penalty: float | None
    rows_at_once: int

    @torch.no_grad()
    def __call__(self, policy: nn.Module, prompts: Prompts, noise: torch.Generator) -> Experience:
        """Sample a completion from the policy and one from the reference for each prompt, and label the pairs.

        Args:
            policy: The policy, on the device of the prompts.
            prompts: B prompts.
            noise: Source of the samples' randomness, on the device of the prompts.

        Returns:
            B labelled pairs.
        """
        # The reference goes first, so that the same noise gives the same samples of it, whatever the policy writes.
        with self.reference.lent() as reference:
            by_reference = self.rollout(reference, prompts, noise)
        by_policy = self.rollout(policy, prompts, noise)
        with self.reference.lent() as reference:
            reference_logps = Pair(self._logps(reference, prompts, by_policy), by_reference.logps)
        completions = Pair(by_policy, by_reference)
        scores = completions.map(lambda side: self._scores(prompts, side))
        return Experience(prompts, completions, scores, argmax_labels(scores), reference_logps)

    def _logps(self, model: nn.Module, prompts: Prompts, completions: Completions) -> Tensor:
        """Sum the log-probabilities that a model gives completions, some rows at a time, of shape (B,)."""
        groups = cut(range(len(prompts)), self.rows_at_once)
        return torch.cat([token_logps(model, prompts.select(g), completions.select(g)).sum(1) for g in groups])

    def _scores(self, prompts: Prompts, completions: Completions) -> Tensor:
        """Score completions, and take the missing-EOS penalty from those that were cut, of shape (B,)."""
        values = self.reward(prompts.raw, completions.texts, prompts.columns)
        scores = as_scores(values, len(completions), type(self.reward).__name__).to(completions.ids.device)
        if self.missing_eos_penalty is None:
            return scores
        return penalize_missing_eos(scores, completions.ended, self.missing_eos_penalty)
