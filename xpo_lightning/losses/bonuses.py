"""Exploration bonuses of published methods that are functions of log-probabilities alone."""

from typing import Literal

import torch
from torch import Tensor

from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.bonus import Bonus, BonusInput, Scored

BonusTarget = Literal["sampler", "both", "rejected"]
"""Which completion's log pi XPO's exploration term contains."""


class XPOBonus(Bonus):
    """XPO's bonus, the default: log pi(y) (Xie et al. 2024, arXiv 2405.21046, Algorithm 1, step 6).

    With a `model.bonus_sampler`, y is that one's completion, as Algorithm 2 has it with D_opt apart from D_pref.

    Args:
        target: Whose completion y is: the `sampler`'s, as in Algorithm 1; `both`, the sum over the pair, for pairs that
            one policy wrote, as in the paper's own experiments; or the `rejected` one, each completion weighted by its
            probability of not being preferred.

    Raises:
        InputError: `target` is none of the three.
    """

    def __init__(self, target: BonusTarget = "sampler") -> None:
        if target not in ("sampler", "both", "rejected"):
            raise InputError(f"model.bonus_on must be 'sampler', 'both' or 'rejected', but is {target!r}")
        self.target = target
        self.uses_sample = target == "sampler"

    def __call__(self, seen: BonusInput) -> Tensor:
        """See `Bonus.__call__`."""
        if self.target == "both":
            return seen.by_policy.logps + seen.by_sampler.logps
        return seen.sample.logps if self.target == "sampler" else seen.of_rejected(lambda side: side.logps)


class SELMBonus(Bonus):
    """SELM's bonus: beta log pi(y)/ref(y) (Zhang et al. 2024, arXiv 2405.19332, as the authors' code has it).

    There, y is a third completion, written by the policy as it was when the iteration began, and the reference is that
    policy too: `model.bonus_sampler` and `model.reference_refresh`. Alpha is XPO's divided by beta.
    """

    uses_sample = True

    def __call__(self, seen: BonusInput) -> Tensor:
        """See `Bonus.__call__`."""
        return seen.beta * seen.sample.log_ratios


class VPOBonus(Bonus):
    """VPO's bonus: sign beta E log pi(y)/ref(y), y from a calibration policy (Cen et al. 2024, arXiv 2405.19320).

    The expectation is taken with one completion a prompt, of `model.bonus_sampler`.

    Args:
        pessimistic: Turn the sign round, as for preferences that were collected beforehand; online, VPO is optimistic.
    """

    uses_sample = True

    def __init__(self, pessimistic: bool = False) -> None:
        self.sign = -1.0 if pessimistic else 1.0

    def __call__(self, seen: BonusInput) -> Tensor:
        """See `Bonus.__call__`."""
        return self.sign * seen.beta * seen.sample.log_ratios


class SEPOPOBonus(Bonus):
    """SE-POPO's bonus: (sigma(beta log pi(y)/ref(y)) - 1/2) / beta (Chen et al. 2025, arXiv 2502.00666).

    It is a preference, so it is bounded where XPO's grows with the reward. y is the first completion of the pair, which
    here is the policy's; the authors' code has both of a pair written by the policy.
    """

    def __call__(self, seen: BonusInput) -> Tensor:
        """See `Bonus.__call__`."""
        return (torch.sigmoid(seen.beta * seen.by_policy.log_ratios) - 0.5) / seen.beta


_EPS = 1e-5


class GEBBonus(Bonus):
    """The general exploratory bonus: -h(u(pi(y))) of the rejected y (Li et al. 2025, arXiv 2510.03269).

    u falls as pi grows, so that what is unlikely is favoured, and h(u) is u f'(u) - f(u), but for constants, of the
    divergence f: u for `kl`, log u for `forward_kl`, sqrt u for `hellinger`. The objective's loss should be that of the
    same divergence. Forms and constants are those of the authors' code, whose kappa is alpha; there, `forward_kl` with
    `inverse` is log pi. Where pi is above 1 - 1e-5, the code can give infinities; here it is taken to be 1 - 1e-5.

    It is longer than other bonuses because of its nine forms.

    Args:
        form: u: `probability` is 1 - pi (1.5 - pi with `hellinger`), `inverse` 1/pi, `arctanh` arctanh(1 - pi).
        divergence: See above.
    """

    def __init__(
        self,
        form: Literal["probability", "inverse", "arctanh"] = "probability",
        divergence: Literal["kl", "forward_kl", "hellinger"] = "kl",
    ) -> None:
        self.form, self.divergence = form, divergence

    def __call__(self, seen: BonusInput) -> Tensor:
        """See `Bonus.__call__`."""
        return seen.of_rejected(self._of_side)

    def _of_side(self, side: Scored) -> Tensor:
        pi, kl, forward = side.logps.exp(), self.divergence == "kl", self.divergence == "forward_kl"
        if self.form == "probability":
            return pi if kl else -((1 - pi).clamp(min=_EPS).log() if forward else (1.5 - pi).sqrt())
        if self.form == "inverse":
            return side.logps if forward else -1 / ((pi if kl else (side.logps / 2).exp()) + _EPS)
        u = torch.arctanh((1 - pi - _EPS).clamp(min=_EPS))
        return -(u if kl else u.log() if forward else (u + 0.5).sqrt())
