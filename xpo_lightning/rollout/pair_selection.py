"""Chooses the pair to compare among several completions per side."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xpo_lightning.core.batch import Completions, Pair, concat_completions
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError

Choice = Literal["first", "best_of_each", "largest_margin", "best_and_worst"]
Judging = Literal["tournament", "all_pairs"]


@dataclass(frozen=True)
class Candidates:
    """How many completions the policy and the sampler each write for a prompt, and which two are compared.

    The pair always has one completion of the policy and one of the sampler, so that the exploration term keeps a
    sample of the sampler (arXiv 2405.21046, Algorithm 1). Validation compares one completion per side.

    Args:
        count: Completions per side, K.
        choose: How to choose the pair: `first`, the only one if K is 1; `best_of_each`, the best of the policy's and
            the best of the sampler's; `largest_margin`, the two, one per side, whose scores differ most;
            `best_and_worst`, the best of all 2K and the worst of the other side. If the sampler is the policy itself,
            both sides are one, and `best_and_worst` takes the best and the worst of all 2K.
        judging: How a judge, which compares only two, puts several in an order. `tournament`: each side has a single
            elimination, and the winners a final, 2K - 1 comparisons a prompt; a completion is the better, the later the
            round in which it lost. `all_pairs`: each is compared with each other one, K(2K - 1) comparisons, and is the
            better, the higher its mean probability to be better. Of two that are tied, the first goes on, or comes
            first.
        budget: Most comparisons a prompt with `all_pairs`, in rounds in which each completion is compared once; null
            sets no limit.

    Raises:
        InputError: `count` is below 1, or does not suit `choose` or `judging`, or `budget` does not suit `judging`.
    """

    count: int = 1
    choose: Choice = "first"
    judging: Judging | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("model.candidates.count", self.count, least=1)
        if (self.count > 1) == (self.choose == "first"):
            raise InputError(
                f"model.candidates.choose={self.choose} does not suit model.candidates.count={self.count}: of one "
                f"completion a side the first is taken, and of several, one of best_of_each, largest_margin and "
                f"best_and_worst"
            )
        if self.judging is not None and self.count == 1:
            raise InputError(
                f"model.candidates.judging={self.judging} orders several completions, and model.candidates.count is 1; "
                f"raise the count, or set judging to null"
            )
        if self.budget is not None and self.judging != "all_pairs":
            raise InputError(
                f"model.candidates.budget={self.budget} limits the comparisons of model.candidates.judging=all_pairs, "
                f"but judging is {self.judging or 'null'}; set the budget to null, or judging to all_pairs"
            )
        check_range("model.candidates.budget", self.budget, least=1, or_null=True)

    def select(self, scores: Pair[Tensor], *, one_writer: bool) -> Pair[Tensor]:
        """Choose a pair for each prompt; of equal scores, the first.

        Args:
            scores: Scores of K completions of B prompts. (K, B) per side
            one_writer: Whether the sampler is the policy itself, so that a completion may change sides.

        Returns:
            Index of the completion on each side: k for the policy's k-th, K + k for the sampler's k-th. (B,) each
        """
        own, others = scores.by_policy, scores.by_sampler
        count = len(own)
        if self.choose == "best_of_each":
            return Pair(own.argmax(0), others.argmax(0) + count)
        if self.choose == "largest_margin":
            margins = (own[:, None] - others[None]).abs().flatten(0, 1)  # (K * K, B)
            widest = margins.argmax(0)
            return Pair(widest // count, widest % count + count)
        if self.choose == "best_and_worst":
            return _best_and_worst(own, others, one_writer=one_writer)
        first = torch.zeros_like(own[0], dtype=torch.long)
        return Pair(first, first + count)


def _best_and_worst(own: Tensor, others: Tensor, *, one_writer: bool) -> Pair[Tensor]:
    count, both = len(own), torch.cat([own, others])
    if not one_writer:
        policy_best = own.amax(0) >= others.amax(0)
        by_policy = torch.where(policy_best, own.argmax(0), own.argmin(0))
        return Pair(by_policy, torch.where(policy_best, others.argmin(0), others.argmax(0)) + count)
    best, worst = both.argmax(0), both.argmin(0)
    # All scores equal: the first of each side.
    worst = torch.where(best == worst, worst + count, worst)
    # The best keeps its side, which is as likely the one as the other; the worst takes the other side.
    return Pair(torch.where(best < count, best, worst), torch.where(best < count, worst, best))


def chosen_completions(candidates: Pair[list[Completions]], places: Pair[Tensor]) -> Pair[Completions]:
    """Select the chosen completions.

    Args:
        candidates: K times B completions per side.
        places: Indices as `Candidates` returns them. (B,) per side

    Returns:
        B completions per side.
    """
    if len(candidates.by_policy) == 1:
        return candidates.map(lambda side: side[0])
    everything = concat_completions([*candidates.by_policy, *candidates.by_sampler])
    return places.map(lambda side: everything.select(rows_of(side)))


def chosen_values(candidates: Pair[Tensor], places: Pair[Tensor]) -> Pair[Tensor]:
    """Select the values of the chosen completions, (B,) per side, from (K, B) per side."""
    everything = torch.cat([candidates.by_policy, candidates.by_sampler]).flatten()
    return places.map(lambda side: everything[torch.tensor(rows_of(side), device=side.device)])


def rows_of(places: Tensor) -> list[int]:
    """Return the flat index of each chosen completion in the stacked (2K * B) candidates."""
    return [place * len(places) + row for row, place in enumerate(places.tolist())]
