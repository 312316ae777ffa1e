"""Preference losses and the XPO objective: pure functions of log-probabilities, per example.

The objective is Algorithm 1 of Exploratory Preference Optimization (Xie et al. 2024, arXiv 2405.21046), step 6:

    alpha * sum log pi(y_ref)  -  sum log sigma( beta * log[pi(y+)/ref(y+)] - beta * log[pi(y-)/ref(y-)] )

with y_ref the reference's completion, y+ the preferred one of the pair and y- the other. It is minimised, so a
positive alpha pushes the reference's own samples down: optimism, not imitation.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xpo_lightning.batch import Pair
from xpo_lightning.errors import InputError


class PreferenceLoss(ABC):
    """Loss of a labelled pair, from the log-ratios log pi(y)/ref(y) of its two completions.

    Args:
        label_smoothing: Share of labels taken to be wrong, in [0, 0.5): the label p becomes (1 - s) p + s (1 - p).
            (cDPO; Mitchell 2023, "A note on DPO with noisy preferences".)
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0.0 <= label_smoothing < 0.5:
            raise InputError(
                f"model.preference_loss.init_args.label_smoothing must be at least 0 and below 0.5, "
                f"but is {label_smoothing}"
            )
        self.label_smoothing = label_smoothing

    @abstractmethod
    def of_preferred(self, margin: Tensor, beta: float) -> Tensor:
        """Loss when the first completion is preferred.

        Args:
            margin: Log-ratio of the preferred completion minus log-ratio of the other, in nats. (B,)
            beta: Strength of the KL constraint.

        Returns:
            Loss per pair. (B,)
        """

    def __call__(self, log_ratios: Pair[Tensor], labels: Tensor, beta: float) -> Tensor:
        """Weigh both orders of each pair by its label.

        Args:
            log_ratios: log pi(y)/ref(y), summed over tokens, in nats. (B,) a side
            labels: Probability that the policy's completion is preferred. (B,)
            beta: Strength of the KL constraint.

        Returns:
            Loss per pair. (B,)
        """
        labels = labels * (1 - self.label_smoothing) + (1 - labels) * self.label_smoothing
        margin = log_ratios.by_policy - log_ratios.by_reference
        return labels * self.of_preferred(margin, beta) + (1 - labels) * self.of_preferred(-margin, beta)


class SigmoidLoss(PreferenceLoss):
    """-log sigma(beta * margin): the loss of DPO (Rafailov et al. 2023, Eq. 7) and of XPO's Algorithm 1."""

    def of_preferred(self, margin: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        return -logsigmoid(beta * margin)


class IPOLoss(PreferenceLoss):
    """(margin - 1/(2 beta))^2: the loss of IPO (Azar et al. 2023, Eq. 17), with log-ratios summed over tokens."""

    def of_preferred(self, margin: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        return (margin - 1 / (2 * beta)) ** 2


@dataclass(frozen=True)
class XPOLoss:
    """The objective of each pair and its parts.

    Args:
        preference: Preference loss; 0 where both completions are the same tokens. (B,)
        bonus: alpha times the log-probability of the reference's completion: the exploration term. (B,)
        log_ratios: log pi(y)/ref(y), summed over tokens, in nats, with gradient. (B,) a side
    """

    preference: Tensor
    bonus: Tensor
    log_ratios: Pair[Tensor]

    @property
    def total(self) -> Tensor:
        """What is minimised, per pair, of shape (B,)."""
        return self.preference + self.bonus


def xpo_loss(
    policy_logps: Pair[Tensor],
    reference_logps: Pair[Tensor],
    labels: Tensor,
    identical: Tensor,
    *,
    alpha: float,
    beta: float,
    preference_loss: PreferenceLoss,
    bonus_clip: float | None = None,
) -> XPOLoss:
    """Evaluate the XPO objective of each pair (arXiv 2405.21046, Algorithm 1).

    A pair of identical completions says nothing about preference, so its preference term is 0; it keeps its
    exploration term, because the algorithm's bonus is over every sample of the reference.

    Args:
        policy_logps: log pi(y), summed over tokens, with gradient. (B,) a side
        reference_logps: log ref(y), summed over tokens. (B,) a side
        labels: Probability that the policy's completion is preferred. (B,)
        identical: True where both completions are the same tokens. (B,)
        alpha: Weight of the exploration term; 0 gives online DPO.
        beta: Strength of the KL constraint.
        preference_loss: The loss of a labelled pair.
        bonus_clip: Clips log pi(y)/ref(y) inside the exploration term to [-bonus_clip, bonus_clip], in nats, as the
            paper's own experiments do at 500; beyond it the term has no gradient. None switches the clip off.

    Returns:
        The objective of each pair and its parts.
    """
    log_ratios = Pair(
        policy_logps.by_policy - reference_logps.by_policy,
        policy_logps.by_reference - reference_logps.by_reference,
    )
    preference = preference_loss(log_ratios, labels, beta)
    bonus_logps = policy_logps.by_reference
    if bonus_clip is not None:
        bonus_logps = reference_logps.by_reference + log_ratios.by_reference.clamp(-bonus_clip, bonus_clip)
    return XPOLoss(
        preference=torch.where(identical, 0.0, preference),
        bonus=alpha * bonus_logps,
        log_ratios=log_ratios,
    )
