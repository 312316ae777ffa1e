"""Scores completions with a reward, or pairs of them with a judge."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xpo_lightning.core.batch import Completions, Pair, Prompts
from xpo_lightning.core.errors import NonFiniteError
from xpo_lightning.core.fault_tolerance.guard import format_prompts
from xpo_lightning.rewards.base import Feedback, Judge
from xpo_lightning.rewards.labels import PairScores, penalize_missing_eos
from xpo_lightning.rewards.ranking import Ranking
from xpo_lightning.rewards.validation import as_scores


@dataclass(frozen=True)
class PairScorer:
    """Scores completions with the reward, or compares them with the judge.

    Args:
        feedback: The reward or the judge.
        missing_eos_penalty: How much score a cut completion loses; None is off.
    """

    feedback: Feedback
    missing_eos_penalty: float | None

    def ranking(self, prompts: Prompts, completions: Pair[list[Completions]]) -> Ranking | None:
        """Return a ranking of the completions by the judge; None for a reward.

        Args:
            prompts: B prompts.
            completions: K times B completions per side.
        """
        return Ranking(self.feedback, prompts, completions) if isinstance(self.feedback, Judge) else None

    def compared(self, ranking: Ranking, places: Pair[Tensor]) -> PairScores:
        """Return the judge's answer about one pair of each prompt.

        Args:
            ranking: The judge's ranking.
            places: Numbers of the two completions. (B,) each
        """
        device = ranking.prompts.ids.device
        wins = ranking.answers(places).to(device)
        answered = ~wins.isnan()
        wins = wins.masked_fill(~answered, 0.5)
        return PairScores(
            Pair(wins, 1 - wins),
            answered,
            counts_unanswered=ranking.judge.invalid == "tie",
            comparisons=ranking.comparisons.to(device) if ranking.sides.by_policy > 1 else None,
        )

    def score(
        self, prompts: Prompts, completions: Pair[list[Completions]], known: Sequence[float | None]
    ) -> Pair[Tensor]:
        """Score all completions at once, except those whose score is known.

        Args:
            prompts: B prompts.
            completions: K times B completions per side.
            known: The score of each of the sampler's completions if it is known already, or None. Length B.

        Returns:
            The reward's scores. (K, B) per side
        """
        device, size = prompts.ids.device, len(prompts)
        new = [row for row, score in enumerate(known) if score is None]
        sides = [(some, list(range(size))) for some in completions.by_policy]
        sides += [(some, new) for some in completions.by_sampler]
        rows = [row for _, side in sides for row in side]
        texts = [some.texts[row] for some, side in sides for row in side]
        raw_prompts = tuple(prompts.raw[row] for row in rows)
        columns = {name: tuple(values[row] for row in rows) for name, values in prompts.columns.items()}
        try:
            values = self.feedback(raw_prompts, tuple(texts), columns)
            scores = as_scores(values, len(rows), type(self.feedback).__name__).to(device)
        except NonFiniteError as error:
            concerned = format_prompts([raw_prompts[row] for row in error.rows])
            raise NonFiniteError(f"{error}; {concerned}", error.rows) from error
        split = len(completions.by_policy) * size
        by_sampler = torch.tensor([0.0 if score is None else score for score in known], device=device)
        by_sampler = by_sampler.repeat(len(completions.by_sampler), 1)
        by_sampler[:, new] = scores[split:].view(len(completions.by_sampler), len(new))
        return Pair(scores[:split].view(len(completions.by_policy), size), by_sampler)

    def penalized(self, scores: Pair[Tensor], completions: Pair[list[Completions]]) -> Pair[Tensor]:
        """Subtract the missing-EOS penalty from the scores of cut completions, (K, B) per side."""
        if self.missing_eos_penalty is None:
            return scores
        ended = completions.map(lambda side: torch.stack([some.ended for some in side]))
        return Pair(
            penalize_missing_eos(scores.by_policy, ended.by_policy, self.missing_eos_penalty),
            penalize_missing_eos(scores.by_sampler, ended.by_sampler, self.missing_eos_penalty),
        )
