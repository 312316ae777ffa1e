"""Turns scores or a judge's answers into labels: the probability that the policy's completion is better."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from xpo_lightning.core.batch import Pair
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError

Rule = Literal["argmax", "bradley_terry", "soft"]
Ties = Literal["half", "policy", "sampler", "random"]


@dataclass(frozen=True)
class PairScores:
    """Scores of B pairs of completions, by a reward or a judge.

    Args:
        scores: Scores, less the missing-EOS penalty; or a judge's probability that the completion beats the other one,
            0.5 if it has no answer. (B,) a side
        answered: False where a judge gave no usable answer; None if a reward gave the scores. (B,)
        counts_unanswered: Whether a pair without an answer counts as a tie.
        comparisons: Comparisons that a judge was asked for to choose the pair among several completions; None if none
            was. (B,)
    """

    scores: Pair[Tensor]
    answered: Tensor | None = None
    counts_unanswered: bool = False
    comparisons: Tensor | None = None

    @property
    def margins(self) -> Tensor:
        """Score of the policy's completion minus that of the sampler's; NaN if a judge has no answer. (B,)."""
        margins = self.scores.by_policy - self.scores.by_sampler
        if self.answered is None or self.counts_unanswered:
            return margins
        return margins.masked_fill(~self.answered, torch.nan)


@dataclass(frozen=True)
class Labels:
    """Training targets of B pairs.

    Args:
        labels: Target probability that the policy's completion is better. (B,)
        silent: True for a pair without a preference term. (B,)
    """

    labels: Tensor
    silent: Tensor


@dataclass(frozen=True)
class LabelRule:
    """How scores or a judge's answer become a label, the probability that the policy's completion is better.

    Args:
        rule: `argmax`: the higher score wins. `bradley_terry`: the winner is drawn with the probability sigma(score
            difference / temperature), as in the theory of XPO, or with a judge's own probability (Bradley and Terry
            1952). `soft`: that probability itself is the label.
        ties: Label of exactly equal scores under `argmax`: `half` counts half for each side, `policy` and `sampler`
            let that side win, and `random` tosses a coin.
        temperature: Divides score differences, and a judge's log-odds, before they become probabilities; above 1, the
            probabilities are less certain.
        flip: Probability, in [0, 0.5), that a label is flipped from p to 1 - p in training: simulates the noise of
            human labels.
        min_margin: In training, pairs whose scores differ by less than this (for a judge, whose probabilities of the
            two sides differ by less) have no preference term.

    Raises:
        InputError: A value is out of range, or two options cannot be combined.
    """

    rule: Rule = "argmax"
    ties: Ties = "half"
    temperature: float = 1.0
    flip: float = 0.0
    min_margin: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values out of range, and options that the rule would ignore."""
        for name, value, choices in (("rule", self.rule, get_args(Rule)), ("ties", self.ties, get_args(Ties))):
            if value not in choices:
                raise InputError(f"model.labels.{name} must be one of {', '.join(choices)}, but is {value}")
        check_range("model.labels.temperature", self.temperature, above=0, is_finite=True)
        check_range("model.labels.flip", self.flip, least=0, below=0.5)
        check_range("model.labels.min_margin", self.min_margin, least=0, is_finite=True)
        if self.rule == "argmax" and self.temperature != 1:
            raise InputError(
                f"model.labels.temperature={self.temperature} changes nothing with model.labels.rule=argmax; leave it "
                f"out, or set the rule to bradley_terry or soft"
            )
        if self.rule != "argmax" and self.ties != "half":
            raise InputError(
                f"model.labels.ties={self.ties} needs model.labels.rule=argmax, but the rule is {self.rule}, for which "
                f"equal scores are a probability of 0.5; leave it out"
            )

    def probability(self, pairs: PairScores) -> Tensor:
        """Turn score differences or a judge's answers into probabilities.

        Args:
            pairs: Scores of B pairs.

        Returns:
            The probability that the policy's completion is better. (B,)
        """
        if pairs.answered is None:
            return torch.sigmoid(pairs.margins / self.temperature)
        return tempered(pairs.scores.by_policy, self.temperature)

    def label(self, pairs: PairScores, uniforms: Tensor | None) -> Labels:
        """Label pairs.

        Args:
            pairs: Scores of B pairs.
            uniforms: Random numbers in [0, 1), (B, 2): the first of a row draws its winner, the second decides on the
                flip. None gives labels without randomness, for validation: a draw becomes its probability, no label is
                flipped, and no pair is silent because of its margin.

        Returns:
            The labels; 0.5 and silent for a pair without an answer of the judge.
        """
        margins = pairs.margins
        draws, flips = (None, None) if uniforms is None else uniforms.to(margins).unbind(1)
        labels = self._labels(pairs, draws)
        silent = unanswered = margins.isnan()
        if flips is not None:
            labels = torch.where(flips < self.flip, 1 - labels, labels)
            silent = silent | (margins.abs() < self.min_margin)
        return Labels(torch.where(unanswered, 0.5, labels), silent)

    def _labels(self, pairs: PairScores, draws: Tensor | None) -> Tensor:
        """Label pairs before flipping; `draws` has one random number per pair (B,), or is None for no randomness."""
        if self.rule == "argmax":
            margins = pairs.margins
            labels = (torch.sign(margins) + 1) / 2
            return torch.where(margins == 0, self._tied(labels, draws), labels)
        probabilities = self.probability(pairs)
        if self.rule == "soft" or draws is None:
            return probabilities
        return (draws < probabilities).to(probabilities.dtype)

    def _tied(self, like: Tensor, draws: Tensor | None) -> Tensor:
        if self.ties == "random" and draws is not None:
            return (draws < 0.5).to(like.dtype)
        return torch.full_like(like, {"policy": 1.0, "sampler": 0.0}.get(self.ties, 0.5))


def tempered(probabilities: Tensor, temperature: float) -> Tensor:
    """Divide log-odds by a temperature.

    Args:
        probabilities: B probabilities p, 0 and 1 included.
        temperature: T, above 0.

    Returns:
        p^(1/T) / (p^(1/T) + (1 - p)^(1/T)); p itself where T is 1. (B,)
    """
    return probabilities if temperature == 1 else torch.sigmoid(torch.logit(probabilities) / temperature)


def check_penalty(penalty: float | None) -> float | None:
    """Return the penalty; refuse one below 0, which would reward completions for being cut."""
    check_range("model.missing_eos_penalty", penalty, least=0, or_null=True)
    return penalty


def penalize_missing_eos(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` from the scores of completions that were cut before they ended.

    Args:
        scores: The reward model's scores. (B,)
        ended: True where the completion ended by itself (EOS or a stop string). (B,)
        penalty: How much a cut completion loses, in units of the score.

    Returns:
        The scores that are compared. (B,)
    """
    return torch.where(ended, scores, scores - penalty)
