"""The XPO objective: a pure function of log-probabilities, per pair.

The objective is Algorithm 1 of Exploratory Preference Optimization (Xie et al. 2024, arXiv 2405.21046), step 6:

    alpha * sum log pi(y_samp)  -  sum log sigma( beta * log[pi(y+)/ref(y+)] - beta * log[pi(y-)/ref(y-)] )

with y_samp the sampler's completion (in Algorithm 1 the sampler is the reference), y+ the preferred one of the pair and
y- the other. It is minimised, so a positive alpha pushes the sampler's own samples down: optimism, not imitation.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xpo_lightning.core.batch import Pair
from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.preference import DPOPositiveLoss, HingeLoss, IPOLoss, PreferenceLoss, RobustLoss, SigmoidLoss

__all__ = [
    "BonusTarget",
    "DPOPositiveLoss",
    "HingeLoss",
    "IPOLoss",
    "PreferenceLoss",
    "RobustLoss",
    "SigmoidLoss",
    "XPOLoss",
    "xpo_loss",
]

BonusTarget = Literal["sampler", "both", "rejected"]
"""Which completion's log pi the exploration term contains."""


@dataclass(frozen=True)
class XPOLoss:
    """The objective of each pair and its parts.

    Args:
        preference: Preference loss; 0 where the pair says nothing about preference. (B,)
        bonus: The exploration term: alpha times the log-probability that it pushes down if alpha is positive. (B,)
        entropy: Minus the entropy weight times the policy's entropy, in nats per token; 0 if the weight is 0. (B,)
        log_ratios: log pi(y)/ref(y), summed over tokens, in nats, with gradient. (B,) a side
    """

    preference: Tensor
    bonus: Tensor
    entropy: Tensor
    log_ratios: Pair[Tensor]

    @property
    def total(self) -> Tensor:
        """The objective to minimise, per pair, of shape (B,)."""
        return self.preference + self.bonus + self.entropy


def xpo_loss(
    policy_logps: Pair[Tensor],
    reference_logps: Pair[Tensor],
    labels: Tensor,
    silent: Tensor,
    *,
    alpha: float,
    beta: float,
    preference_loss: PreferenceLoss,
    bonus_clip: float | None = None,
    bonus_on: BonusTarget = "sampler",
    lengths: Pair[Tensor] | None = None,
    entropies: Tensor | None = None,
    entropy_weight: float = 0.0,
) -> XPOLoss:
    """Evaluate the XPO objective of each pair (arXiv 2405.21046, Algorithm 1).

    A silent pair says nothing about preference, so its preference term is 0. It keeps its exploration term, because
    the algorithm's bonus covers every sample of the sampler.

    Args:
        policy_logps: log pi(y), summed over tokens, with gradient. (B,) a side
        reference_logps: log ref(y), summed over tokens. (B,) a side
        labels: Probability that the policy's completion is preferred. (B,)
        silent: True where the pair says nothing about preference: both completions are the same tokens, or it is
            unknown which is better. (B,)
        alpha: Weight of the exploration term; 0 gives online DPO.
        beta: Strength of the KL constraint.
        preference_loss: The loss of a labelled pair.
        bonus_clip: Clips log pi(y)/ref(y) inside the exploration term to [-bonus_clip, bonus_clip], in nats, as the
            paper's own experiments do at 500; beyond it the term has no gradient. None switches clipping off.
        bonus_on: Which completion's log pi the exploration term contains. `sampler`: that of the sampler's completion
            (Algorithm 1). `both`: the sum over both completions, for pairs that one policy wrote, as in the paper's own
            experiments. `rejected`: that of the completion that is not preferred, as in GEB (arXiv 2510.03269); each
            completion is weighted by its probability of not being preferred.
        lengths: Number of tokens of each completion, for a length-normalised preference loss. (B,) a side
        entropies: Entropy of the policy's next-token distribution, in nats, averaged over the tokens of its own
            completion, with gradient. (B,)
        entropy_weight: Weight of the entropies; a positive weight maximises them. (Williams and Peng 1991; Mnih et al.
            2016, arXiv 1602.01783.)

    Returns:
        The objective of each pair and its parts.

    Raises:
        InputError: `bonus_on` is none of the three.
        ValueError: The options need lengths or entropies, and these are missing.
    """
    log_ratios = Pair(
        policy_logps.by_policy - reference_logps.by_policy,
        policy_logps.by_sampler - reference_logps.by_sampler,
    )
    preference = preference_loss(log_ratios, labels, beta, lengths)
    bonus_logps = policy_logps
    if bonus_clip is not None:
        bonus_logps = Pair(
            reference_logps.by_policy + log_ratios.by_policy.clamp(-bonus_clip, bonus_clip),
            reference_logps.by_sampler + log_ratios.by_sampler.clamp(-bonus_clip, bonus_clip),
        )
    return XPOLoss(
        preference=torch.where(silent, 0.0, preference),
        bonus=alpha * _explored(bonus_logps, labels, bonus_on),
        entropy=_entropy_term(preference, entropies, entropy_weight),
        log_ratios=log_ratios,
    )


def _explored(logps: Pair[Tensor], labels: Tensor, bonus_on: BonusTarget) -> Tensor:
    """Return the log-probability inside the exploration term, of shape (B,)."""
    if bonus_on == "sampler":
        return logps.by_sampler
    if bonus_on == "both":
        return logps.by_policy + logps.by_sampler
    if bonus_on == "rejected":
        return labels * logps.by_sampler + (1 - labels) * logps.by_policy
    raise InputError(f"model.bonus_on must be 'sampler', 'both' or 'rejected', but is {bonus_on!r}")


def _entropy_term(like: Tensor, entropies: Tensor | None, weight: float) -> Tensor:
    if weight == 0:
        return torch.zeros_like(like)
    if entropies is None:
        raise ValueError("an entropy weight other than 0 needs the policy's entropies")
    return -weight * entropies
