"""Preference losses with another divergence than KL, and what is added to a preference loss."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from xpo_lightning.core.batch import Pair
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.preference import PreferenceLoss

CAP = 80.0
"""Most nats of an exponent, so that float32 holds its exponential."""


class FDivergenceLoss(PreferenceLoss):
    """-log sigma(beta (f'(u+) - f'(u-))), u = pi(y)/ref(y): DPO with the divergence f in place of KL.

    (Wang et al. 2023, arXiv 2309.16240.) f'(u) is, but for constants, -1/u for `forward_kl`, -2/sqrt u for `hellinger`
    (the alpha-divergence of 1/2), log(2u/(1 + u)) for `jensen_shannon`, and u + log u for `chi_squared`, which is mixed
    with KL (chi-squared preference optimisation: Huang et al. 2024, arXiv 2407.13399). GEB's bonus wants the first two.

    Args:
        divergence: f.
        margin_clip: Clips beta times the difference to this many either way, beyond which there is no gradient, as
            chi-squared preference optimisation does at twice the largest reward; null is off.
        label_smoothing: As in `SigmoidLoss`: share of labels taken to be wrong, in [0, 0.5).
        length_normalized: As in `SigmoidLoss`: divide each log-ratio by its completion's number of tokens.
    """

    def __init__(
        self,
        divergence: Literal["forward_kl", "hellinger", "jensen_shannon", "chi_squared"],
        margin_clip: float | None = None,
        label_smoothing: float = 0.0,
        length_normalized: bool = False,
    ) -> None:
        super().__init__(label_smoothing, length_normalized)
        check_range("model.preference_loss.init_args.margin_clip", margin_clip, above=0, or_null=True)
        self.divergence, self.margin_clip = divergence, margin_clip

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        margin = beta * (self._slope(chosen) - self._slope(rejected))
        return -logsigmoid(margin if self.margin_clip is None else margin.clamp(-self.margin_clip, self.margin_clip))

    def _slope(self, log_ratio: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return -(-log_ratio).clamp(max=CAP).exp()
        if self.divergence == "hellinger":
            return -2 * (-log_ratio / 2).clamp(max=CAP).exp()
        if self.divergence == "jensen_shannon":
            return log_ratio - softplus(log_ratio)
        return log_ratio + log_ratio.clamp(max=CAP).exp()


class NLLLoss(PreferenceLoss):
    """-log-ratio of the preferred completion: its negative log-likelihood, less the reference's, which is constant.

    Added to another loss by `MixedLoss`, it keeps the preferred completion from becoming less likely together with the
    other one (Pang et al. 2024, arXiv 2404.19733, who take it per token: `length_normalized`).
    """

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        return -chosen


class MixedLoss(PreferenceLoss):
    """A weighted sum of preference losses.

    Args:
        losses: The losses, each with options of its own.
        weights: A number for each.

    Raises:
        InputError: There are no losses, or not as many weights.
    """

    def __init__(self, losses: Sequence[PreferenceLoss], weights: Sequence[float]) -> None:
        super().__init__()
        if not losses or len(losses) != len(weights):
            raise InputError(
                f"model.preference_loss.init_args.weights must have a number for each of the {len(losses)} losses, "
                f"at least one, but has {len(weights)}"
            )
        for weight in weights:
            check_range("model.preference_loss.init_args.weights", abs(weight), least=0, is_finite=True)
        self.losses, self.weights = list(losses), list(weights)
        self.is_policy_gradient = any(loss.is_policy_gradient for loss in losses)
        if any(loss.needs_previous for loss in losses):
            raise InputError("model.preference_loss.init_args.losses: INPOLoss stands alone; leave it out of MixedLoss")

    def __call__(
        self, log_ratios: Pair[Tensor], labels: Tensor, beta: float, lengths: Pair[Tensor] | None = None
    ) -> Tensor:
        """See `PreferenceLoss.__call__`."""
        parts = [loss(log_ratios, labels, beta, lengths) for loss in self.losses]
        return sum((weight * part for weight, part in zip(self.weights, parts, strict=True)), labels.new_zeros(()))

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        parts = [loss.of_preferred(chosen, rejected, beta) for loss in self.losses]
        return sum((weight * part for weight, part in zip(self.weights, parts, strict=True)), chosen.new_zeros(()))
