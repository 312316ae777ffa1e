"""Computes the metrics of pairs, and averages them over batches and ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric

from xpo_lightning.core.batch import Experience, Pair
from xpo_lightning.losses.xpo import XPOLoss

WITH_ERRORS = ("win_rate", "objective/kl")
OF_SCORES = (
    *("objective/model_scores", "objective/ref_scores", "objective/scores_margin", "objective/rlhf_reward"),
    *("pairs/tied", "win_rate"),
)


def rollout_metrics(experience: Experience, beta: float) -> dict[str, Tensor]:
    """Compute the metrics of newly sampled pairs; `docs/metrics.md` gives each formula.

    A tie is half a win.

    Args:
        experience: B labelled pairs, just sampled, or taken from a preference data set.
        beta: Strength of the KL constraint.

    Returns:
        Each metric, one number per pair (B,); NaN where it does not apply: most for offline pairs, and those of scores
        where a judge has no answer and such pairs are left out.
    """
    scores, reference_logps = experience.scores, experience.reference_logps
    policy, sampler = experience.completions.by_policy, experience.completions.by_sampler
    kl, margins = policy.logps - reference_logps.by_policy, scores.by_policy - scores.by_sampler
    values = {
        "objective/kl": kl,
        "objective/entropy": -policy.logps,
        "objective/model_scores": scores.by_policy,
        "objective/ref_scores": scores.by_sampler,
        "objective/scores_margin": margins,
        "objective/rlhf_reward": scores.by_policy - beta * kl,
        "val/model_contain_eos_token": policy.ended,
        "val/ref_contain_eos_token": sampler.ended,
        "completions/model_length": policy.lengths,
        "completions/ref_length": sampler.lengths,
        "pairs/tied": margins == 0,
        "pairs/identical": experience.identical,
        "win_rate": (torch.sign(margins) + 1) / 2,
    }
    if experience.silent is not None:
        values["pairs/silent"] = experience.silent
    if experience.answered is not None:
        values["pairs/unanswered"] = ~experience.answered
    if experience.comparisons is not None:
        values["pairs/comparisons"] = experience.comparisons
    numbers = {name: value.detach().float() for name, value in values.items()}
    if experience.answered is not None and experience.silent is not None:
        left_out = experience.silent & ~experience.answered
        numbers |= {name: numbers[name].masked_fill(left_out, torch.nan) for name in OF_SCORES}
    if experience.offline is not None:
        identical, cut = numbers["pairs/identical"], (~(policy.ended & sampler.ended)).float()
        numbers = {name: of_sampled(experience, value) for name, value in numbers.items()}
        numbers |= {"pairs/identical": identical, "pairs/truncated": cut.where(experience.offline, torch.nan)}
    return numbers


def of_sampled(experience: Experience, values: Tensor) -> Tensor:
    """Return a metric (B,) with NaN at the pairs of a preference data set, to which it does not apply."""
    return values if experience.offline is None else values.masked_fill(experience.offline, torch.nan)


def update_metrics(experience: Experience, loss: XPOLoss, policy_logps: Pair[Tensor], beta: float) -> dict[str, Tensor]:
    """Compute the metrics of the pairs of an update; `docs/metrics.md` gives each formula.

    For a label between 0 and 1, `chosen` and `rejected` are means of both completions, weighted by the label.

    Args:
        experience: B labelled pairs.
        loss: Their losses.
        policy_logps: The policy's log-probability of each completion, summed over tokens, in nats. (B,) per side
        beta: Strength of the KL constraint.

    Returns:
        Each metric, one number per pair (B,); NaN where it does not apply.
    """
    labels = experience.labels
    chosen_rewards = beta * _mix(loss.log_ratios, labels)
    rejected_rewards = beta * _mix(loss.log_ratios, 1 - labels)
    margins = chosen_rewards - rejected_rewards
    values = {
        "loss/total": loss.total,
        "loss/dpo": loss.preference,
        "loss/xpo": loss.bonus,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (torch.sign(margins) + 1) / 2,
        "logps/chosen": _mix(policy_logps, labels),
        "logps/rejected": _mix(policy_logps, 1 - labels),
        "logps/reference_completions": of_sampled(experience, policy_logps.by_sampler),
    }
    return {name: value.detach().float() for name, value in values.items()}


class PairAverages(Metric):
    """Averages metrics over the pairs of all batches and ranks.

    Sums are kept in float64, so that the order of batches hardly matters.

    Attributes:
        skips_nan: Whether NaN stands for a pair to which a metric does not apply, which is then left out of its mean;
            a metric that applies to no pair has no mean.
    """

    full_state_update = False
    sums: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.skips_nan = False
        self.add_state("sums", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, values: dict[str, Tensor]) -> None:
        """Add a batch: each metric's numbers per pair (B,); all batches must have the same metrics."""
        self.names = list(values)
        stacked = torch.stack(list(values.values())).to(self.count.device, torch.float64)  # (metrics, B)
        if not len(self.sums):
            self.sums = self.squares = torch.zeros(len(stacked), dtype=torch.float64, device=self.count.device)
        count: Tensor | int = stacked.shape[1]
        if self.skips_nan:
            count, stacked = (~stacked.isnan()).sum(1), stacked.nan_to_num(0.0, torch.inf, -torch.inf)
        self.sums = self.sums + stacked.sum(1)
        self.squares = self.squares + stacked.square().sum(1)
        self.count = self.count + count

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each metric, and the standard errors of `WITH_ERRORS` as `<name>_stderr`."""
        means = self.sums / self.count
        variances = (self.squares / self.count - means.square()).clamp(min=0)
        errors = (variances / (self.count - 1).clamp(min=1)).sqrt()
        averages = {name: mean.float() for name, mean in zip(self.names, means, strict=True)}
        for name in (name for name in WITH_ERRORS if name in self.names):
            averages[f"{name}_stderr"] = errors[self.names.index(name)].float()
        return {name: mean for name, mean in averages.items() if not (self.skips_nan and mean.isnan())}


def _mix(pair: Pair[Tensor], labels: Tensor) -> Tensor:
    """Return the mean of both sides weighted by the label: the policy's side at 1, the sampler's side at 0."""
    return labels * pair.by_policy + (1 - labels) * pair.by_sampler
