"""Preference losses of methods that look for an equilibrium of two players, not for the maximum of a reward."""

from torch import Tensor

from xpo_lightning.core.batch import Pair
from xpo_lightning.core.checks import check_range
from xpo_lightning.losses.preference import PreferenceLoss


class NashMDLoss(PreferenceLoss):
    """-(p - 1/2 - beta log-ratio) log-ratio, the bracket without gradient: Nash-MD's policy gradient.

    log-ratio is that of the policy's own completion, p the probability that it beats the other one, which a mixture of
    the policy and the reference wrote (`MixtureSampler`). (Munos et al. 2023, arXiv 2312.00886: REINFORCE, with 1/2 as
    the control variate.) It is for completions of the policy as it is: one update a rollout, no buffer.

    Args:
        label_smoothing: As in `SigmoidLoss`: share of labels taken to be wrong, in [0, 0.5).
        length_normalized: As in `SigmoidLoss`: divide each log-ratio by its completion's number of tokens.
    """

    is_policy_gradient = True

    def __call__(
        self, log_ratios: Pair[Tensor], labels: Tensor, beta: float, lengths: Pair[Tensor] | None = None
    ) -> Tensor:
        """See `PreferenceLoss.__call__`."""
        own = self._normalized(log_ratios, lengths).by_policy
        return -(self._smoothed(labels) - 0.5 - beta * own.detach()) * own

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """Return the loss of a pair whose preferred completion is the policy's."""
        return -(0.5 - beta * chosen.detach()) * chosen


class SPPOLoss(PreferenceLoss):
    """(log-ratio of the preferred - 1/(2 beta))^2 + (log-ratio of the other + 1/(2 beta))^2: SPPO.

    Self-play preference optimisation (Wu et al. 2024, arXiv 2405.00675), with eta = 1/beta and each completion's
    probability of beating the policy estimated by the label. Its reference is the policy of the last iteration:
    `model.reference_refresh`. Log-ratios are pushed to their values one by one, not only their difference.
    """

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


class INPOLoss(PreferenceLoss):
    """(margin - (1 - ratio) margin of pi_t - ratio/(2 beta))^2, pi_t the policy that wrote the pair: INPO.

    Iterative Nash policy optimisation (Zhang et al. 2024, arXiv 2407.00617) is mirror descent: it stays close to the
    reference, with strength tau, and to the policy of the last iteration, with strength eta. In log-ratios to the
    reference, its loss (log pi(y+)/pi(y-) - tau/eta log ref(y+)/ref(y-) - (1 - tau/eta) log pi_t(y+)/pi_t(y-) -
    1/(2 eta))^2 is this one, with tau = beta and eta = beta/ratio. Needs `model.sampler` to be `PolicySampler`.

    Args:
        ratio: tau/eta, above 0 and at most 1; 1 is `IPOLoss`.
        label_smoothing: As in `SigmoidLoss`: share of labels taken to be wrong, in [0, 0.5).
        length_normalized: As in `SigmoidLoss`: divide each log-ratio by its completion's number of tokens.
    """

    needs_previous = True

    def __init__(self, ratio: float, label_smoothing: float = 0.0, length_normalized: bool = False) -> None:
        super().__init__(label_smoothing, length_normalized)
        check_range("model.preference_loss.init_args.ratio", ratio, above=0, most=1)
        self.ratio = ratio

    def against_previous(self, log_ratios: Pair[Tensor], previous: Pair[Tensor]) -> Pair[Tensor]:
        """See `PreferenceLoss.against_previous`."""
        kept = 1 - self.ratio
        return Pair(
            log_ratios.by_policy - kept * previous.by_policy, log_ratios.by_sampler - kept * previous.by_sampler
        )

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        return (chosen - rejected - self.ratio / (2 * beta)) ** 2
