"""Evaluates the XPO objective of labelled pairs; alpha and beta may follow schedules."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import Experience, Pair
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.bonus import Bonus, BonusInput, Scored
from xpo_lightning.losses.preference import PreferenceLoss
from xpo_lightning.losses.schedules import Progress, Schedule, as_positive_schedule, as_schedule
from xpo_lightning.losses.xpo import bonus_input, xpo_loss
from xpo_lightning.models.logprobs import several_logps, several_logps_and_entropies
from xpo_lightning.training.metrics import of_sampled, update_metrics

DEFAULT_ALPHA = 1e-5
"""Weight of the exploration term unless `model.alpha` is set."""


class Objective:
    """Evaluates the objective; the arguments are `XPOLightningModule`'s options of the same names.

    Raises:
        InputError: A value is out of range.
    """

    def __init__(
        self,
        alpha: Schedule | float | list[float],
        beta: Schedule | float | list[float],
        *,
        preference_loss: PreferenceLoss,
        bonus: Bonus,
        bonus_clip: float | None,
        entropy_bonus: float,
        alpha_in_beta: bool,
    ) -> None:
        check_range("model.bonus_clip", bonus_clip, above=0, or_null=True)
        check_range("model.entropy_bonus", entropy_bonus, least=0, is_finite=True)
        self.alpha, self.beta = as_schedule(alpha), as_positive_schedule(beta, "model.beta")
        self.preference_loss, self.bonus, self.bonus_clip = preference_loss, bonus, bonus_clip
        self.entropy_bonus, self.alpha_in_beta = entropy_bonus, alpha_in_beta

    def weights(self, progress: Progress) -> dict[str, float]:
        """Return alpha (times beta, if `alpha_in_beta`) and beta at this point of the run.

        Raises:
            InputError: The schedule of beta gives a value that is not above 0.
        """
        alpha, beta = self.alpha(progress), self.beta(progress)
        if beta <= 0:
            raise InputError(f"model.beta must be above 0, but its schedule gives {beta} at step {progress.step}")
        return {"alpha": alpha * beta if self.alpha_in_beta else alpha, "beta": beta}

    def evaluate(
        self, policy: nn.Module, experience: Experience, *, alpha: float, beta: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the objective and the metrics of each pair.

        Args:
            policy: The policy.
            experience: B pairs.
            alpha: Weight of the exploration term.
            beta: Strength of the KL constraint.

        Returns:
            The objective of each pair (B,), with gradient if enabled, and each metric (B,), without gradient.
        """
        entropies: Tensor | None = None
        if self.entropy_bonus:
            logps, features, entropies = several_logps_and_entropies(policy, experience.prompts, experience.written)
        else:
            logps, features = several_logps(policy, experience.prompts, experience.written)
        by_policy, by_sampler, *third = self._scored(experience, logps, features)
        loss = xpo_loss(
            Pair(by_policy.logps, by_sampler.logps),
            experience.reference_logps,
            experience.labels,
            experience.without_preference,
            alpha=alpha,
            beta=beta,
            preference_loss=self.preference_loss,
            bonus_clip=self.bonus_clip,
            bonus=self.bonus,
            sample=third[0] if third else None,
            lengths=experience.completions.map(lambda side: side.lengths),
            hidden=Pair(by_policy.hidden, by_sampler.hidden),
            previous=self._previous(experience, by_policy, by_sampler),
            entropies=entropies,
            entropy_weight=self.entropy_bonus,
            offline=experience.offline,
        )
        measured = update_metrics(experience, loss, Pair(by_policy.logps, by_sampler.logps), beta)
        if entropies is not None:
            measured["objective/token_entropy"] = of_sampled(experience, entropies.detach())
        return loss.total, measured

    @torch.no_grad()
    def observe(self, policy: nn.Module, pairs: Sequence[Experience], beta: float) -> Tensor:
        """Return what the bonus learns from each of some pairs, (B, F).

        Args:
            policy: The policy.
            pairs: The pairs, in groups that go through the policy together.
            beta: Strength of the KL constraint.
        """
        return torch.cat([self.bonus.observe(self._seen(policy, some, beta)).float() for some in pairs])

    def _seen(self, policy: nn.Module, experience: Experience, beta: float) -> BonusInput:
        logps, features = several_logps(policy, experience.prompts, experience.written)
        by_policy, by_sampler, *third = self._scored(experience, logps, features)
        sample = third[0] if third else None
        return bonus_input(Pair(by_policy, by_sampler), sample, experience.labels, beta, self.bonus_clip)

    def _previous(self, experience: Experience, by_policy: Scored, by_sampler: Scored) -> Pair[Tensor] | None:
        """Return the log-ratios of the policy that wrote the pair; in validation, that is the policy as it is."""
        if not self.preference_loss.needs_previous:
            return None
        before = experience.previous_logps
        if before is None:
            return Pair(by_policy.log_ratios.detach(), by_sampler.log_ratios.detach())
        reference = experience.reference_logps
        return Pair(before.by_policy - reference.by_policy, before.by_sampler - reference.by_sampler)

    def _scored(
        self, experience: Experience, logps: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> list[Scored]:
        """Put together what the bonus sees of each completion.

        Raises:
            InputError: The bonus needs hidden states, and the model gives none.
        """
        if self.bonus.needs_hidden and features is None:
            raise InputError(
                f"model.bonus={type(self.bonus).__name__} reads the policy's last hidden states, and model.policy "
                f"does more to them than a linear head before they are logits; take another bonus"
            )
        reference = experience.reference_logps
        third = [] if experience.sample is None else [experience.sample.reference_logps]
        hidden = features if features is not None and self.bonus.needs_hidden else [None] * len(logps)
        lengths = [some.lengths for some in experience.written]
        parts = zip(logps, [reference.by_policy, reference.by_sampler, *third], lengths, hidden, strict=True)
        return [Scored(*part) for part in parts]
