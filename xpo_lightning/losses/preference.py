"""Preference losses of labelled pairs: pure functions of two completions' log-ratios log pi(y)/ref(y), per pair."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from xpo_lightning.core.batch import Pair
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError

ROUNDING = 1e-4
"""Log-ratio, in nats, that may be the rounding of float32 alone."""


class PreferenceLoss(ABC):
    """Loss of a labelled pair, from the log-ratios log pi(y)/ref(y) of its two completions.

    Args:
        label_smoothing: Share of labels taken to be wrong, in [0, 0.5): the label p becomes (1 - s) p + s (1 - p).
            (cDPO; Mitchell 2023, "A note on DPO with noisy preferences".)
        length_normalized: Divide each log-ratio by its completion's number of tokens, so that a long completion weighs
            no more than a short one; beta is then per token and wants to be larger. (Length-normalised DPO; Lambert et
            al. 2024, Tulu 3, arXiv 2411.15124.)

    Attributes:
        needs_previous: Whether it also sees the log-ratios of the policy that wrote the pair, see `against_previous`.
        is_policy_gradient: Whether it is right only for completions that the policy, as it is, has written itself.
    """

    needs_previous = False
    is_policy_gradient = False

    def __init__(self, label_smoothing: float = 0.0, length_normalized: bool = False) -> None:
        check_range("model.preference_loss.init_args.label_smoothing", label_smoothing, least=0, below=0.5)
        self.label_smoothing = label_smoothing
        self.length_normalized = length_normalized

    @abstractmethod
    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """Return the loss of pairs whose preferred completion is certain.

        Args:
            chosen: Log-ratio of the preferred completion, in nats (per token, if `length_normalized`). (B,)
            rejected: Log-ratio of the other completion. (B,)
            beta: Strength of the KL constraint.

        Returns:
            Loss per pair. (B,)
        """

    def __call__(
        self, log_ratios: Pair[Tensor], labels: Tensor, beta: float, lengths: Pair[Tensor] | None = None
    ) -> Tensor:
        """Return the losses of both orders of each pair, weighted by its label.

        Args:
            log_ratios: log pi(y)/ref(y), summed over tokens, in nats. (B,) a side
            labels: Probability that the policy's completion is preferred. (B,)
            beta: Strength of the KL constraint.
            lengths: Number of tokens of each completion, for `length_normalized` only. (B,) a side

        Returns:
            Loss per pair. (B,)

        Raises:
            ValueError: `length_normalized` is set, and the lengths are missing.
        """
        log_ratios, labels = self._normalized(log_ratios, lengths), self._smoothed(labels)
        won = self.of_preferred(log_ratios.by_policy, log_ratios.by_sampler, beta)
        lost = self.of_preferred(log_ratios.by_sampler, log_ratios.by_policy, beta)
        return labels * won + (1 - labels) * lost

    def against_previous(self, log_ratios: Pair[Tensor], previous: Pair[Tensor]) -> Pair[Tensor]:
        """Return the log-ratios that the loss is of, if it `needs_previous`.

        Args:
            log_ratios: log pi(y)/ref(y), summed over tokens, in nats, with gradient. (B,) a side
            previous: The same of the policy that wrote the pair. (B,) a side
        """
        raise NotImplementedError(f"{type(self).__name__} needs no previous log-ratios")

    def _normalized(self, log_ratios: Pair[Tensor], lengths: Pair[Tensor] | None) -> Pair[Tensor]:
        """Return the log-ratios, per token if `length_normalized`."""
        if not self.length_normalized:
            return log_ratios
        if lengths is None:
            raise ValueError("a length-normalised preference loss needs the completions' lengths")
        return Pair(
            log_ratios.by_policy / lengths.by_policy.clamp(min=1),
            log_ratios.by_sampler / lengths.by_sampler.clamp(min=1),
        )

    def _smoothed(self, labels: Tensor) -> Tensor:
        return labels * (1 - self.label_smoothing) + (1 - labels) * self.label_smoothing


class SigmoidLoss(PreferenceLoss):
    """-log sigma(beta * margin): the loss of DPO (Rafailov et al. 2023, Eq. 7) and of XPO's Algorithm 1.

    The margin, here and below, is the log-ratio of the preferred completion minus that of the other.
    """

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        return -logsigmoid(beta * (chosen - rejected))


class IPOLoss(PreferenceLoss):
    """(margin - 1/(2 beta))^2: the loss of IPO (Azar et al. 2023, Eq. 17).

    Log-ratios are summed over tokens, as in the paper, unless `length_normalized` is set.
    """

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        return (chosen - rejected - 1 / (2 * beta)) ** 2


class HingeLoss(PreferenceLoss):
    """max(0, 1 - beta * margin): a pair whose margin has reached 1/beta has no gradient any more.

    The hinge of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on log-ratios in place of log-probabilities, as in RSO
    (Liu et al. 2023, arXiv 2309.06657).
    """

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        return relu(1 - beta * (chosen - rejected))


class RobustLoss(PreferenceLoss):
    """((1 - s) l(margin) - s l(-margin)) / (1 - 2s), with l the sigmoid loss: robust DPO.

    Its mean over labels of which a share s was turned round at random is the sigmoid loss of the true labels
    (Chowdhury et al. 2024, arXiv 2403.00409). It has no lower bound for s above 0.

    Args:
        flip_rate: The share s of labels that are wrong, in [0, 0.5); 0 gives the sigmoid loss.
        label_smoothing: Must stay 0: it is another answer to the same question.
        length_normalized: As in `SigmoidLoss`: divide each log-ratio by its completion's number of tokens.
    """

    def __init__(self, flip_rate: float, label_smoothing: float = 0.0, length_normalized: bool = False) -> None:
        super().__init__(label_smoothing, length_normalized)
        check_range("model.preference_loss.init_args.flip_rate", flip_rate, least=0, below=0.5)
        if label_smoothing:
            raise InputError(
                f"model.preference_loss.init_args.label_smoothing={label_smoothing} does not go with RobustLoss, whose "
                f"flip_rate says how many labels are wrong; leave it out"
            )
        self.flip_rate = flip_rate

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        margin = beta * (chosen - rejected)
        unflipped = (1 - self.flip_rate) * -logsigmoid(margin) - self.flip_rate * -logsigmoid(-margin)
        return unflipped / (1 - 2 * self.flip_rate)


class DPOPositiveLoss(PreferenceLoss):
    """-log sigma(beta * (margin - penalty * max(0, -log-ratio of the preferred completion))): DPO-Positive.

    The sigmoid loss can be lowered by making both completions less probable, the other more so than the preferred one;
    the penalty is on that (Pal et al. 2024, "Smaug", arXiv 2402.13228). A loss below `ROUNDING` counts as none: where
    the policy is still its reference, rounding would decide over the penalty's gradient.

    Args:
        penalty: Weight of what the preferred completion has lost against the reference, at least 0; 0 gives the
            sigmoid loss.
        label_smoothing: As in `SigmoidLoss`: share of labels taken to be wrong, in [0, 0.5).
        length_normalized: As in `SigmoidLoss`: divide each log-ratio by its completion's number of tokens.
    """

    def __init__(self, penalty: float = 50.0, label_smoothing: float = 0.0, length_normalized: bool = False) -> None:
        super().__init__(label_smoothing, length_normalized)
        check_range("model.preference_loss.init_args.penalty", penalty, least=0, is_finite=True)
        self.penalty = penalty

    def of_preferred(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """See `PreferenceLoss.of_preferred`."""
        lost = relu(-chosen)
        lost = torch.where(lost > ROUNDING, lost, 0.0)
        return -logsigmoid(beta * (chosen - rejected - self.penalty * lost))
