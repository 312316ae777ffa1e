"""The XPO objective: a pure function of log-probabilities, per pair.

The objective is Algorithm 1 of Exploratory Preference Optimization (Xie et al. 2024, arXiv 2405.21046), step 6:

    alpha * sum log pi(y_samp)  -  sum log sigma( beta * log[pi(y+)/ref(y+)] - beta * log[pi(y-)/ref(y-)] )

with y_samp the sampler's completion (in Algorithm 1 the sampler is the reference), y+ the preferred one of the pair and
y- the other. It is minimised, so a positive alpha pushes the sampler's own samples down: optimism, not imitation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from xpo_lightning.core.batch import Pair
from xpo_lightning.losses.bonus import Bonus, BonusInput, Scored
from xpo_lightning.losses.bonuses import BonusTarget, XPOBonus
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


@dataclass(frozen=True)
class XPOLoss:
    """The objective of each pair and its parts.

    Args:
        preference: Preference loss; 0 where the pair says nothing about preference. (B,)
        bonus: The exploration term: alpha times the bonus, such as the log-probability of Algorithm 1, which it pushes
            down if alpha is positive. (B,)
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
    bonus: Bonus | None = None,
    sample: Scored | None = None,
    hidden: Pair[Tensor | None] | None = None,
    previous: Pair[Tensor] | None = None,
    offline: Tensor | None = None,
) -> XPOLoss:
    """Evaluate the XPO objective of each pair (arXiv 2405.21046, Algorithm 1).

    A silent pair says nothing about preference, so its preference term is 0. It keeps its exploration term, because
    the algorithm's bonus covers every sample of the sampler. An offline pair, one of a preference data set, has a
    preference term alone: it is part of D_pref, and nothing of it is a sample of D_opt (Algorithm 2).

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
        bonus_on: The target of `XPOBonus`, which is the bonus if `bonus` is None.
        lengths: Number of tokens of each completion, for losses and bonuses that need it. (B,) a side
        entropies: Entropy of the policy's next-token distribution, in nats, averaged over the tokens of its own
            completion, with gradient. (B,)
        entropy_weight: Weight of the entropies; a positive weight maximises them. (Williams and Peng 1991; Mnih et al.
            2016, arXiv 1602.01783.)
        bonus: What alpha multiplies.
        sample: A third completion, for a bonus that takes one; None is the sampler's completion.
        hidden: The policy's last hidden states, for a bonus that needs them. (B, T, D) a side
        previous: Log-ratios of the policy that wrote the pair, for a loss that needs them. (B,) a side
        offline: True where the pair is one of a preference data set; None is nowhere. (B,)

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
    compared = log_ratios if previous is None else preference_loss.against_previous(log_ratios, previous)
    preference = preference_loss(compared, labels, beta, lengths)

    def scored(of: Callable[[Pair[Any]], Any]) -> Scored:
        optional = (None if given is None else of(given) for given in (lengths, hidden))
        return Scored(of(policy_logps), of(reference_logps), *optional)

    sides = Pair(scored(attrgetter("by_policy")), scored(attrgetter("by_sampler")))
    seen = bonus_input(sides, sample, labels, beta, bonus_clip)
    explored = alpha * (bonus or XPOBonus(bonus_on))(seen)
    entropy = _entropy_term(preference, entropies, entropy_weight)
    if offline is not None:
        explored, entropy = torch.where(offline, 0.0, explored), torch.where(offline, 0.0, entropy)
    return XPOLoss(
        preference=torch.where(silent, 0.0, preference), bonus=explored, entropy=entropy, log_ratios=log_ratios
    )


def bonus_input(
    sides: Pair[Scored], sample: Scored | None, labels: Tensor, beta: float, clip: float | None
) -> BonusInput:
    """Put together what a bonus sees, with its log-ratios clipped.

    Args:
        sides: Both completions of B pairs.
        sample: The third completions, if there are some.
        labels: Probability that the policy's completion is preferred. (B,)
        beta: Strength of the KL constraint.
        clip: Most nats between log pi(y) and log ref(y); None for no limit.
    """
    clipped = sides.map(lambda side: _clipped(side, clip))
    of_sample = clipped.by_sampler if sample is None else _clipped(sample, clip)
    return BonusInput(clipped.by_policy, clipped.by_sampler, of_sample, labels, beta)


def _clipped(side: Scored, clip: float | None) -> Scored:
    if clip is None:
        return side
    return replace(side, logps=side.reference_logps + side.log_ratios.clamp(-clip, clip))


def _entropy_term(like: Tensor, entropies: Tensor | None, weight: float) -> Tensor:
    if weight == 0:
        return torch.zeros_like(like)
    if entropies is None:
        raise ValueError("an entropy weight other than 0 needs the policy's entropies")
    return -weight * entropies
