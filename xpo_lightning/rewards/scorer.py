"""Scores pairs with a reward or a judge, and returns one result type for both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xpo_lightning.core.batch import Completions, Pair, Prompts
from xpo_lightning.core.errors import NonFiniteError
from xpo_lightning.core.fault_tolerance.guard import format_prompts
from xpo_lightning.core.timer import PhaseTimer
from xpo_lightning.rewards.base import Feedback, Judge
from xpo_lightning.rewards.labels import Preferences, penalize_missing_eos
from xpo_lightning.rewards.ranking import Ranking
from xpo_lightning.rewards.validation import as_scores


@dataclass(frozen=True)
class PairScores:
    """Scores of K completions per side of B prompts, by a reward or a judge.

    Args:
        raw: Scores as the reward returned them. (K, B) per side
        scores: The same less the missing-EOS penalty. (K, B) per side
        answered: False if a judge gave no usable answer; None for a reward. (B,)
        is_judged: Whether a judge compared the pairs, so that the scores are its probabilities.
        counts_unanswered: Whether a pair without an answer counts as a tie.
    """

    raw: Pair[Tensor]
    scores: Pair[Tensor]
    answered: Tensor | None = None
    is_judged: bool = False
    counts_unanswered: bool = False

    def preferences(self, scores: Pair[Tensor]) -> Preferences:
        """Turn the scores of the chosen pairs, (B,) per side, into preferences, from which labels are made."""
        margins = scores.by_policy - scores.by_sampler
        if self.answered is not None and not self.counts_unanswered:
            margins = margins.masked_fill(~self.answered, torch.nan)
        return Preferences(margins, scores.by_policy if self.is_judged else None)


@dataclass(frozen=True)
class PairScorer:
    """Scores completions with the reward, or compares them with the judge.

    Args:
        feedback: The reward or the judge.
        missing_eos_penalty: How much score a cut completion loses; None is off.
        timer: Times the calls.
    """

    feedback: Feedback
    missing_eos_penalty: float | None
    timer: PhaseTimer

    def score(
        self, prompts: Prompts, completions: Pair[list[Completions]], known: Sequence[float | None]
    ) -> PairScores:
        """Score completions, or compare them.

        Args:
            prompts: B prompts.
            completions: K times B completions per side; K is 1 for a judge.
            known: The score of each of the sampler's completions if it is known already, or None. Length B.
        """
        with self.timer("reward", prompts.ids.device):
            if isinstance(self.feedback, Judge):
                return self._compared(self.feedback, prompts, completions.map(lambda side: side[0]))
            return self._scored(prompts, completions, known)

    def ranking(self, prompts: Prompts, completions: Pair[list[Completions]]) -> Ranking | None:
        """Return a ranking of several completions a side by the judge; None for a reward, or for one a side.

        Args:
            prompts: B prompts.
            completions: K times B completions per side.
        """
        is_needed = isinstance(self.feedback, Judge) and len(completions.by_policy) > 1
        return Ranking(self.feedback, prompts, completions) if is_needed else None  # type: ignore[arg-type]

    def of_answers(self, wins: Tensor) -> PairScores:
        """Turn a judge's answers about B pairs, NaN where it has none, into scores of one completion a side."""
        answered = ~wins.isnan()
        wins = wins.masked_fill(~answered, 0.5)[None]
        scores = Pair(wins, 1 - wins)
        is_tie = isinstance(self.feedback, Judge) and self.feedback.invalid == "tie"
        return PairScores(scores, scores, answered, is_judged=True, counts_unanswered=is_tie)

    def _compared(self, judge: Judge, prompts: Prompts, completions: Pair[Completions]) -> PairScores:
        texts = completions.map(lambda side: side.texts)
        wins = judge(prompts.raw, texts.by_policy, texts.by_sampler, prompts.columns)
        return self.of_answers(wins.to(prompts.ids.device))

    def _scored(
        self, prompts: Prompts, completions: Pair[list[Completions]], known: Sequence[float | None]
    ) -> PairScores:
        """Score all completions at once, except those whose score is known."""
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
        raw = Pair(scores[:split].view(len(completions.by_policy), size), by_sampler)
        return PairScores(raw, self._penalized(raw, completions))

    def _penalized(self, scores: Pair[Tensor], completions: Pair[list[Completions]]) -> Pair[Tensor]:
        """Subtract the missing-EOS penalty from the scores of cut completions, (K, B) per side."""
        if self.missing_eos_penalty is None:
            return scores
        ended = completions.map(lambda side: torch.stack([some.ended for some in side]))
        return Pair(
            penalize_missing_eos(scores.by_policy, ended.by_policy, self.missing_eos_penalty),
            penalize_missing_eos(scores.by_sampler, ended.by_sampler, self.missing_eos_penalty),
        )
