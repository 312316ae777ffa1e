"""Ranks several completions of a prompt by a judge, which compares only two."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xpo_lightning.core.batch import Completions, Pair, Prompts
from xpo_lightning.rewards.base import Judge

Match = tuple[int, int, int]
"""A comparison: the number of the prompt, and those of two of its completions."""


class Ranking:
    """Ranks 2K completions of each of B prompts: the policy's K, then the sampler's K.

    It remembers the judge's answers, and asks about no two completions twice. No answer counts as a tie.

    Args:
        judge: The judge.
        prompts: B prompts.
        completions: K times B completions per side.
    """

    def __init__(self, judge: Judge, prompts: Prompts, completions: Pair[list[Completions]]) -> None:
        self.judge, self.prompts = judge, prompts
        self.sides = completions.map(len)
        self.texts = [some.texts for some in (*completions.by_policy, *completions.by_sampler)]
        self.comparisons = torch.zeros(len(prompts))  # that the judge was asked for; (B,)
        self._answers: dict[Match, float] = {}

    def standings(self, judging: str | None, budget: int | None) -> Pair[Tensor]:
        """Return a number for each completion, higher for a better one. (K, B) per side.

        Args:
            judging: `tournament`: each side plays a single elimination in its own order, a round at a time, and the two
                winners play a final: 2K - 1 comparisons. The number is the round in which a completion lost. Of two
                that are tied, the first goes on. `all_pairs`: each completion is compared with each other one, and the
                number is the mean of its probabilities to be better.
            budget: Most comparisons of a prompt's completions with `all_pairs`, in rounds in which each is compared
                once; one that is in none has 0.5. None for no limit.
        """
        found = self._all_pairs(budget) if judging == "all_pairs" else self._tournament()
        return Pair(*found.split([self.sides.by_policy, self.sides.by_sampler]))

    def answers(self, places: Pair[Tensor]) -> Tensor:
        """Return the probability that the first of two completions of each prompt is better, (B,), NaN if unknown.

        Args:
            places: Numbers of the two completions. (B,) each
        """
        pairs = zip(places.by_policy.tolist(), places.by_sampler.tolist(), strict=True)
        matches = [(row, first, second) for row, (first, second) in enumerate(pairs)]
        self._ask(matches)
        return torch.tensor([self._answers[match] for match in matches])

    def _tournament(self) -> Tensor:
        size, count = len(self.prompts), len(self.texts)
        own = list(range(self.sides.by_policy))
        others = list(range(len(own), count))
        # Who is left, a list a side of each prompt; all prompts have as many at any time.
        left = [[own[:], others[:]] for _ in range(size)]
        lost = torch.full((count, size), torch.inf)
        number = 0
        while len(left[0]) > 1 or len(left[0][0]) > 1:
            number += 1
            if all(len(side) == 1 for side in left[0]):
                left = [[[side[0] for side in sides]] for sides in left]  # the final
            rounds = [
                (row, side, _neighbours(some)) for row, sides in enumerate(left) for side, some in enumerate(sides)
            ]
            self._ask([(row, *pair) for row, _, pairs in rounds for pair in pairs])
            for row, side, pairs in rounds:
                beaten = {second if self._is_ahead((row, first, second)) else first for first, second in pairs}
                lost[list(beaten), row] = number
                left[row][side] = [place for place in left[row][side] if place not in beaten]
        return lost.clamp(max=number + 1)

    def _all_pairs(self, budget: int | None) -> Tensor:
        size, count = len(self.prompts), len(self.texts)
        pairs = every_pair(count)[:budget]
        self._ask([(row, *pair) for row in range(size) for pair in pairs])
        total, met = torch.zeros(count, size), torch.zeros(count, 1)
        for first, second in pairs:
            answers = torch.tensor([self._answers[row, first, second] for row in range(size)]).nan_to_num(0.5)
            total[first] += answers
            total[second] += 1 - answers
            met[[first, second]] += 1
        return torch.where(met > 0, total / met.clamp(min=1), 0.5)

    def _is_ahead(self, match: Match) -> bool:
        return not self._answers[match] < 0.5  # nor if there is no answer

    def _ask(self, matches: Sequence[Match]) -> None:
        """Ask the judge for the answers that are not known, all at once."""
        new = [match for match in dict.fromkeys(matches) if match not in self._answers]
        if not new:
            return
        firsts, seconds = ([self.texts[match[side]][match[0]] for match in new] for side in (1, 2))
        rows = [row for row, _, _ in new]
        columns = {name: tuple(values[row] for row in rows) for name, values in self.prompts.columns.items()}
        said = self.judge(tuple(self.prompts.raw[row] for row in rows), tuple(firsts), tuple(seconds), columns)
        for (row, first, second), answer in zip(new, said.tolist(), strict=True):
            self._answers[row, first, second], self._answers[row, second, first] = answer, 1 - answer
            self.comparisons[row] += self.texts[first][row] != self.texts[second][row]


def every_pair(count: int) -> list[tuple[int, int]]:
    """Return all pairs of an even number of things, in rounds in which each is in one pair (the circle method)."""
    pairs = []
    for turn in range(count - 1):
        others = [1 + (turn + place) % (count - 1) for place in range(count - 1)]
        circle = [0, *others]
        pairs += [(circle[place], circle[-1 - place]) for place in range(count // 2)]
    return pairs


def _neighbours(places: Sequence[int]) -> list[tuple[int, int]]:
    """Pair the first with the second, the third with the fourth; the last of an odd number goes on by itself."""
    return list(zip(places[::2], places[1::2], strict=False))
