"""Compares two policies on the same prompts by a reward or a judge."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xpo_lightning.core.batch import Completions, Pair, Prompts, RawPrompt, left_pad
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.rng import RolloutRNG, Stream
from xpo_lightning.data.preprocessing import PromptPreprocessor
from xpo_lightning.data.prompts import PromptTokenizer
from xpo_lightning.data.readers import LocatedRow
from xpo_lightning.evaluation.policies import NamedPolicy
from xpo_lightning.rewards.base import Feedback
from xpo_lightning.rewards.scorer import PairScorer
from xpo_lightning.rollout.sampling import Sampling


@dataclass(frozen=True)
class TokenizedPrompts:
    """B prompts, tokenized for one policy.

    Args:
        ids: Token ids of each prompt.
        raw: Each prompt as its row has it.
        columns: The rows' other columns, each of length B.
    """

    ids: list[list[int]]
    raw: tuple[RawPrompt, ...]
    columns: dict[str, tuple[Any, ...]]


def tokenize_for(
    encoders: Sequence[PromptTokenizer], rows: Sequence[LocatedRow], encoding: PromptPreprocessor, name: str
) -> list[TokenizedPrompts]:
    """Tokenize rows for several policies, and keep those that suit all of them.

    Args:
        encoders: One tokenizer of prompts for each policy.
        rows: The rows.
        encoding: Gives the column of the prompts, and the limits on their length.
        name: Name of the rows in messages.

    Raises:
        InputError: A row cannot be used, or no row suits all policies.
    """
    kept = [
        {place: (row, ids) for place, row, ids in replace(encoding, encoder=encoder).encode(rows, name, report=False)}
        for encoder in encoders
    ]
    places = sorted(set.intersection(*(set(each) for each in kept)))
    if not places:
        raise InputError(f"{name}: no prompt suits both writers; all are dropped for their length by one or the other")
    column = encoding.prompt_column
    found = [kept[0][place][0] for place in places]
    raw = tuple(row[column] for row in found)
    columns = {other: tuple(row[other] for row in found) for other in found[0] if other != column}
    return [TokenizedPrompts([each[place][1] for place in places], raw, columns) for each in kept]


@dataclass(frozen=True)
class Comparison:
    """Generates the completions of policies that are to be compared.

    Args:
        sampling: How completions are sampled.
        samples: K, the completions of a prompt by each policy.
        seed: Seed of the random numbers.
        device: Device of the policies.
        at_once: Most prompts that are sampled together; None chooses a number for the device.
    """

    sampling: Sampling
    samples: int
    seed: int
    device: torch.device
    at_once: int | None = None

    def write(self, writer: NamedPolicy, encoded: TokenizedPrompts, place: int) -> list[Completions]:
        """Generate one policy's completions of all prompts.

        Args:
            writer: The policy.
            encoded: B prompts, tokenized for this policy.
            place: 0 or 1: the two policies draw different random numbers, even if they are the same model.

        Returns:
            K entries of B completions each, on the CPU.
        """
        ids, mask = left_pad(encoded.ids, self.device)
        prompts = Prompts(ids, mask, encoded.raw, encoded.columns)
        noise = [RolloutRNG(self.seed, Stream.COMPARISON + place, number) for number in range(self.samples)]
        uniforms = [one.uniforms(len(prompts), self.sampling.max_new_tokens).to(self.device) for one in noise]
        written = writer.seated(self.sampling, self.device, self.at_once).write(prompts, uniforms)
        return [some.to("cpu") for some in written]


@dataclass(frozen=True)
class Outcome:
    """The result of a comparison.

    Args:
        wins: For each prompt and comparison, 1 if the first policy's completion is better, 0.5 for a tie, 0 if it is
            worse; NaN if a judge gave no answer. (B, C)
        scores: Mean score of each policy; None for a judge.
    """

    wins: Tensor
    scores: Pair[float] | None

    def exchanged(self) -> "Outcome":
        """Return the result with the policies exchanged."""
        scores = None if self.scores is None else Pair(self.scores.by_sampler, self.scores.by_policy)
        return Outcome(1 - self.wins, scores)

    @property
    def by_prompt(self) -> Tensor:
        """The share of each prompt's comparisons that the first policy won, without prompts that have no answer."""
        shares = self.wins.nanmean(1)
        return shares[~shares.isnan()]


def compare_completions(
    feedback: Feedback,
    missing_eos_penalty: float | None,
    encoded: TokenizedPrompts,
    completions: Pair[list[Completions]],
) -> Outcome:
    """Compare the completions of two policies by a reward or a judge.

    With a reward, each of the first policy's K completions of a prompt is compared with each of the second's, K * K
    comparisons; a judge compares K pairs. Two completions with the same text that ended alike are a tie, even if
    rounding gives them different scores.

    Args:
        feedback: The reward or the judge, loaded.
        missing_eos_penalty: Subtracted from the score of a completion that was cut; None is off. Not for judges.
        encoded: B prompts.
        completions: For each policy, K entries of B completions.
    """
    ids, mask = left_pad(encoded.ids)
    prompts = Prompts(ids, mask, encoded.raw, encoded.columns)
    scorer = PairScorer(feedback, missing_eos_penalty)
    ranking = scorer.ranking(prompts, completions)
    if ranking is not None:
        own = [torch.full((len(prompts),), place) for place in range(len(completions.by_policy))]
        pairs = [scorer.compared(ranking, Pair(place, place + len(own))) for place in own]
        return Outcome(_won(torch.stack([each.margins for each in pairs], 1)), None)
    scores = scorer.penalized(scorer.score(prompts, completions, [None] * len(prompts)), completions)
    margins = scores.by_policy[:, None] - scores.by_sampler[None]  # (K, K, B)
    margins = margins.masked_fill(_alike(completions), 0.0).flatten(0, 1).t()
    return Outcome(_won(margins), Pair(float(scores.by_policy.mean()), float(scores.by_sampler.mean())))


def _won(margins: Tensor) -> Tensor:
    wins = (torch.sign(margins.double()) + 1) / 2
    return wins.masked_fill(margins.isnan(), torch.nan)  # torch takes the sign of NaN for 0.


def _alike(completions: Pair[list[Completions]]) -> Tensor:
    """Tell which completions of a prompt are the same, (K, K, B)."""

    def read(some: Completions) -> Sequence[tuple[str, bool]]:
        return list(zip(some.texts, some.ended.tolist(), strict=True))

    firsts, seconds = ([read(some) for some in side] for side in (completions.by_policy, completions.by_sampler))
    return torch.tensor([[[a == b for a, b in zip(x, y, strict=True)] for y in seconds] for x in firsts])
