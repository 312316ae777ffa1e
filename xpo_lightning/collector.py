"""From prompts to labelled pairs: sample both completions, score them, and keep what the frozen reference says."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from xpo_lightning.adapters import adapters_cast
from xpo_lightning.batch import Completions, Experience, Pair, Prompts
from xpo_lightning.errors import NonFiniteError
from xpo_lightning.forward import evaluating
from xpo_lightning.guard import shown
from xpo_lightning.phases import PhaseTimer
from xpo_lightning.preference import argmax_labels, penalize_missing_eos
from xpo_lightning.reference import Reference
from xpo_lightning.reference_cache import Entry, ReferenceCache, missing_rows, with_kept
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.checks import as_scores
from xpo_lightning.rollout.local import LocalRollout, gather, order_of
from xpo_lightning.rollout.noise import Noise

Sampled = tuple[Pair[Completions], Tensor]
"""Completions of B prompts, and the reference's log-probabilities of the policy's (B,)."""


@dataclass
class Collector:
    """Collects the pairs of a batch of prompts.

    Args:
        rollout: Samples completions.
        reference: The frozen reference.
        reward: Scores completions.
        missing_eos_penalty: What a completion that was cut loses in score; None is off.
        timer: Times the phases.

    Attributes:
        cache: What the reference wrote in earlier epochs; None before `open_cache`, and where there is no cache.
    """

    rollout: LocalRollout
    reference: Reference
    reward: Reward
    missing_eos_penalty: float | None
    timer: PhaseTimer
    cache: ReferenceCache | None = field(default=None, init=False)

    @torch.no_grad()
    def __call__(self, policy: nn.Module, prompts: Prompts, noise: Noise, use_cache: bool = False) -> Experience:
        """Sample a completion from the policy and one from the reference for each prompt, and label the pairs.

        Args:
            policy: The policy, on the device of the prompts.
            prompts: B prompts.
            noise: Source of the samples' randomness.
            use_cache: Whether to use the cache, if there is one, for what the reference wrote before.

        Returns:
            B labelled pairs.
        """
        # The reference goes first, so that the same noise gives the same samples of it, whatever the policy writes.
        of_reference, of_policy = (self.rollout.uniforms(prompts, noise) for _ in range(2))
        cache = self.cache if use_cache else None
        kept = [None] * len(prompts) if cache is None else cache.get(prompts)
        groups = self.rollout.groups(prompts, policy)
        parts = []
        for rows in groups:
            index = torch.as_tensor(rows, device=prompts.ids.device)
            uniforms = Pair(of_policy[index], of_reference[index])
            parts.append(self._sample(policy, prompts.select(rows), uniforms, [kept[row] for row in rows]))
        completions = Pair(
            gather([pair.by_policy for pair, _ in parts], groups),
            gather([pair.by_reference for pair, _ in parts], groups),
        )
        of_policys = torch.cat([logps for _, logps in parts])[order_of(groups)]
        self.timer.counts.update(
            prompts=len(prompts),
            prompt_tokens=sum(prompts.counts),
            completion_tokens=sum(completions.by_policy.counts + completions.by_reference.counts),
        )
        scores = self._scores(prompts, completions, kept)
        missing = missing_rows(kept)
        if cache is not None and missing:
            written = completions.by_reference.select(missing)
            cache.put(prompts.select(missing), written, scores.by_reference[missing])
        scores = self._penalized(scores, completions)
        labels = argmax_labels(scores)
        return Experience(prompts, completions, scores, labels, Pair(of_policys, completions.by_reference.logps))

    def open_cache(self, where: str | None, reference: dict[str, Any], trainer: Trainer) -> None:
        """Open the cache of what this reference writes with this sampling, scored by this reward.

        Args:
            where: "memory", or a folder; None is no cache.
            reference: The identity of the reference.
            trainer: Knows the precision, and the number of the process.

        Raises:
            InputError: The folder cannot be used, or holds what was made otherwise.
        """
        if where is None:
            self.cache = None
            return
        sampling = {**asdict(self.rollout.sampling), "eos_token_ids": sorted(self.rollout.eos_token_ids)}
        model = {"policy": reference, "sampling": sampling, "reward": self.reward.identity()}
        made_by = {"model": model, "trainer": {"precision": str(trainer.precision)}}
        self.cache = ReferenceCache(where, made_by, trainer.global_rank)

    def _sample(
        self, policy: nn.Module, prompts: Prompts, uniforms: Pair[Tensor], kept: Sequence[Entry | None]
    ) -> Sampled:
        """Sample both sides; the prompts that the reference has read serve to score what the policy writes."""
        rollout, device = self.rollout, prompts.ids.device
        missing, read, written = missing_rows(kept), None, None
        if missing:
            with self.timer("reference_rollout", device), self.reference.lent() as reference:
                read = rollout.open(reference, prompts.select(missing))
                written = rollout.sample(read, uniforms.by_reference[missing])
                read.rest()
        by_reference = with_kept(written, kept, device)
        with self.timer("policy_rollout", device), evaluating(policy), adapters_cast(policy):
            by_policy = rollout.sample(rollout.open(policy, prompts), uniforms.by_policy)
        with self.timer("reference_scoring", device), self.reference.lent() as reference:
            if read is None or len(missing) < len(prompts):
                read = rollout.open(reference, prompts)
            logps = read.logps(by_policy)
        return Pair(by_policy, by_reference), logps

    def _scores(self, prompts: Prompts, completions: Pair[Completions], kept: Sequence[Entry | None]) -> Pair[Tensor]:
        """Score both sides at once, except what was scored before, (B,) a side."""
        device, missing = prompts.ids.device, missing_rows(kept)
        by_policy, by_reference = completions.by_policy.texts, completions.by_reference.texts
        rows = [*range(len(prompts)), *missing]
        with self.timer("reward", device):
            raw = tuple(prompts.raw[row] for row in rows)
            columns = {name: tuple(values[row] for row in rows) for name, values in prompts.columns.items()}
            try:
                values = self.reward(raw, by_policy + tuple(by_reference[row] for row in missing), columns)
                scores = as_scores(values, len(rows), type(self.reward).__name__).to(device)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}; {shown([raw[row] for row in error.rows])}", error.rows) from error
        before = torch.tensor([0.0 if entry is None else entry.score for entry in kept], device=device)
        before[missing] = scores[len(prompts) :]
        return Pair(scores[: len(prompts)], before)

    def _penalized(self, scores: Pair[Tensor], completions: Pair[Completions]) -> Pair[Tensor]:
        """Take the missing-EOS penalty from completions that were cut, (B,) a side."""
        if self.missing_eos_penalty is None:
            return scores
        penalty = self.missing_eos_penalty
        return Pair(
            penalize_missing_eos(scores.by_policy, completions.by_policy.ended, penalty),
            penalize_missing_eos(scores.by_reference, completions.by_reference.ended, penalty),
        )
