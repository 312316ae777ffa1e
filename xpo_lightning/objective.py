"""The XPO objective of labelled pairs under a policy, with weights that may change as a run goes on."""

from torch import Tensor, nn

from xpo_lightning.batch import Experience
from xpo_lightning.errors import InputError
from xpo_lightning.logps import pair_logps
from xpo_lightning.losses import PreferenceLoss, SigmoidLoss, xpo_loss
from xpo_lightning.metrics import pair_metrics
from xpo_lightning.schedules import Progress, Schedule, as_positive_schedule, as_schedule


class Objective:
    """Evaluates the objective; the arguments are `XPOLightningModule`'s options of the same names.

    Raises:
        InputError: A value is out of range.
    """

    def __init__(
        self,
        alpha: Schedule | float | list[float],
        beta: Schedule | float | list[float],
        preference_loss: PreferenceLoss | None,
        bonus_clip: float | None,
    ) -> None:
        self.alpha, self.beta = as_schedule(alpha), as_positive_schedule(beta, "model.beta")
        self.preference_loss, self.bonus_clip = preference_loss or SigmoidLoss(), bonus_clip
        if bonus_clip is not None and not bonus_clip > 0:
            raise InputError(f"model.bonus_clip must be above 0 or null, but is {bonus_clip}")

    def weights(self, progress: Progress) -> dict[str, float]:
        """Return alpha and beta at some point of a run.

        Raises:
            InputError: The schedule of beta gives what is not above 0.
        """
        weights = {"alpha": self.alpha(progress), "beta": self.beta(progress)}
        if weights["beta"] <= 0:
            raise InputError(
                f"model.beta must be above 0, but its schedule gives {weights['beta']} at step {progress.step}"
            )
        return weights

    def __call__(
        self, policy: nn.Module, experience: Experience, *, alpha: float, beta: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluate.

        Args:
            policy: The policy.
            experience: B pairs.
            alpha: Weight of the exploration term.
            beta: Strength of the KL constraint.

        Returns:
            The objective of each pair, with gradient where enabled (B,), and each metric, without (B,) each.
        """
        policy_logps = pair_logps(policy, experience.prompts, experience.completions)
        loss = xpo_loss(
            policy_logps,
            experience.reference_logps,
            experience.labels,
            experience.identical,
            alpha=alpha,
            beta=beta,
            preference_loss=self.preference_loss,
            bonus_clip=self.bonus_clip,
        )
        return loss.total, pair_metrics(experience, loss, policy_logps, beta)
