"""Evaluates the XPO objective of labelled pairs; alpha and beta may follow schedules."""

from torch import Tensor, nn

from xpo_lightning.core.batch import Experience
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.preference import PreferenceLoss
from xpo_lightning.losses.schedules import Progress, Schedule, as_positive_schedule, as_schedule
from xpo_lightning.losses.xpo import BonusTarget, xpo_loss
from xpo_lightning.models.logprobs import pair_logps, pair_logps_and_entropies
from xpo_lightning.training.metrics import update_metrics


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
        bonus_on: BonusTarget,
        bonus_clip: float | None,
        entropy_bonus: float,
        alpha_in_beta: bool,
    ) -> None:
        check_range("model.bonus_clip", bonus_clip, above=0, or_null=True)
        check_range("model.entropy_bonus", entropy_bonus, least=0, is_finite=True)
        self.alpha, self.beta = as_schedule(alpha), as_positive_schedule(beta, "model.beta")
        self.preference_loss, self.bonus_on, self.bonus_clip = preference_loss, bonus_on, bonus_clip
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
        entropies = None
        if self.entropy_bonus:
            policy_logps, entropies = pair_logps_and_entropies(policy, experience.prompts, experience.completions)
        else:
            policy_logps = pair_logps(policy, experience.prompts, experience.completions)
        loss = xpo_loss(
            policy_logps,
            experience.reference_logps,
            experience.labels,
            experience.without_preference,
            alpha=alpha,
            beta=beta,
            preference_loss=self.preference_loss,
            bonus_clip=self.bonus_clip,
            bonus_on=self.bonus_on,
            lengths=experience.completions.map(lambda side: side.lengths),
            entropies=entropies,
            entropy_weight=self.entropy_bonus,
        )
        measured = update_metrics(experience, loss, policy_logps, beta)
        if entropies is not None:
            measured["objective/token_entropy"] = entropies.detach()
        return loss.total, measured
