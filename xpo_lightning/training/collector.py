"""Turns prompts into labelled pairs: generates completions, scores them, chooses two of each prompt and labels them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from xpo_lightning.core.batch import BonusSample, Completions, Experience, Pair, Prompts
from xpo_lightning.core.fault_tolerance.guard import check_finite
from xpo_lightning.core.rng import RolloutRNG
from xpo_lightning.core.timer import PhaseTimer
from xpo_lightning.rewards.labels import LabelRule, PairScores
from xpo_lightning.rewards.scorer import PairScorer
from xpo_lightning.rollout.batch_writer import BatchWriter, GivenSide, RolloutBatch, ScoredSide, Side, halves
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.pair_selection import Candidates, chosen_completions, chosen_values
from xpo_lightning.rollout.reference_cache import ReferenceCache, missing_rows
from xpo_lightning.rollout.samplers import PolicySampler, ReferenceSampler
from xpo_lightning.training.persistent_state import PersistentState


@dataclass(frozen=True)
class Upcoming:
    """The training batch after the present one.

    Args:
        prompts: B prompts.
        rng: Source of its randomness.
        wanted: Whether this run trains on it.
    """

    prompts: Prompts
    rng: RolloutRNG
    wanted: bool


@dataclass
class Collector:
    """Collects one labelled pair for each prompt of a batch.

    Args:
        writer: Writes completions, and scores them under the reference.
        memory: Holds the reference, the samplers, which write the second completion in training and the exploration
            term's, and the cache of the reference's completions.
        candidates: How many completions each side writes in training, and which become the pair.
        scorer: Scores completions with the reward or judge.
        label_rule: Turns the scores into labels.
        timer: Times the phases.
        keeps_previous: Whether pairs keep the log-probabilities of the policy that wrote both of them.
    """

    writer: BatchWriter
    memory: PersistentState
    candidates: Candidates
    scorer: PairScorer
    label_rule: LabelRule
    timer: PhaseTimer
    keeps_previous: bool = False

    @property
    def rollout(self) -> LocalRollout:
        """Samples completions with the models of this process."""
        return self.writer.rollout

    @torch.no_grad()
    def collect(
        self,
        policy: nn.Module,
        prompts: Prompts,
        rng: RolloutRNG,
        *,
        training: bool = False,
        upcoming: Upcoming | None = None,
    ) -> Experience:
        """Sample completions of each prompt, and label one pair of them.

        Args:
            policy: The policy, on the device of the prompts.
            prompts: B prompts.
            rng: Source of randomness for samples and labels.
            training: Whether the policy trains on the pairs. If not, each pair is one completion by the policy and one
                by the initial reference, which is not taken from the cache, and labels are not random.
            upcoming: The batch that the engine is to write next; None if that is not known, or not ahead of time.

        Returns:
            B labelled pairs.
        """
        batch, numbers = self._plan(policy, prompts, rng, training)
        later = None if upcoming is None else self._plan(policy, upcoming.prompts, upcoming.rng, training)[0]
        sides = self.writer.write(batch, later, is_wanted=upcoming is None or upcoming.wanted)
        self._count(prompts, sides)
        if training and self.memory.sampler.writes_both:
            sides = [*halves(sides[0]), *sides[1:]]
        by_sampler, by_policy, *third = sides
        completions = Pair(by_policy.completions, by_sampler.completions)
        with self.timer("reward", prompts.ids.device):
            places, scores = self._choose(batch, completions)
        labels = self.label_rule.label(scores, numbers)
        written = chosen_completions(completions, places)
        return Experience(
            prompts=prompts,
            completions=written,
            scores=scores.scores,
            labels=labels.labels,
            reference_logps=chosen_values(Pair(by_policy.reference_logps, by_sampler.reference_logps), places),
            silent=labels.silent,
            answered=scores.answered,
            sample=BonusSample(third[0].completions[0], third[0].reference_logps[0]) if third else None,
            previous_logps=written.map(lambda side: side.logps) if training and self.keeps_previous else None,
            comparisons=scores.comparisons,
        )

    @torch.no_grad()
    def take(
        self,
        policy: nn.Module,
        prompts: Prompts,
        chosen: Sequence[str],
        rejected: Sequence[str],
        *,
        training: bool = False,
    ) -> Experience:
        """Make labelled pairs of the rows of a preference data set: nothing is sampled or scored by the reward.

        Args:
            policy: The policy, whose size decides how many prompts are read together.
            prompts: B prompts.
            chosen: The preferred completion of each. Length B.
            rejected: The other completion of each. Length B.
            training: Whether the policy trains on the pairs. If not, the reference is the initial one.

        Returns:
            B offline pairs with the label 1; their token log-probabilities are NaN, because their writers are not here.
        """
        given = [GivenSide([self.rollout.given(prompts, texts)]) for texts in (chosen, rejected)]
        lend = partial(self.memory.reference.lent, first=not training)
        sides = self.writer.complete(RolloutBatch(policy, lend, prompts, given, [None] * len(prompts)))
        self._count(prompts, sides)
        certain = torch.ones(len(prompts), device=prompts.ids.device)
        return Experience(
            prompts=prompts,
            completions=Pair(*(side.completions[0] for side in sides)),
            scores=Pair(certain, 1 - certain),
            labels=certain,
            reference_logps=Pair(*(side.reference_logps[0] for side in sides)),
            silent=torch.zeros_like(certain, dtype=torch.bool),
            offline=torch.ones_like(certain, dtype=torch.bool),
        )

    def _plan(
        self, policy: nn.Module, prompts: Prompts, rng: RolloutRNG, training: bool
    ) -> tuple[RolloutBatch, Tensor | None]:
        """Plan who writes what, and draw the random numbers; return those of the labels as well, (B, 2).

        The sampler's are drawn first, so that it writes the same beside any policy.
        """
        sampler, third = (self.memory.sampler, self.memory.bonus_sampler) if training else (ReferenceSampler(), None)
        count = self.candidates.count if training else 1
        writers = [(sampler, 2 * count + 1)] if sampler.writes_both else [(sampler, count), (PolicySampler(), count)]
        sides = [Side(writer, [self.rollout.uniforms(prompts, rng) for _ in range(drawn)]) for writer, drawn in writers]
        numbers = rng.uniforms(len(prompts), 2) if training else None
        if third is not None:
            sides.append(Side(third, [self.rollout.uniforms(prompts, rng)]))
        cache = self.memory.cache if training else None
        kept = [None] * len(prompts) if cache is None else cache.get(prompts)
        lend = partial(self.memory.reference.lent, first=not training)
        return RolloutBatch(policy, lend, prompts, sides, kept, rng.number if training else None), numbers

    def _choose(self, batch: RolloutBatch, completions: Pair[list[Completions]]) -> tuple[Pair[Tensor], PairScores]:
        """Choose a pair for each prompt by the reward or judge, and return its places and its scores."""
        training, prompts = batch.number is not None, batch.prompts
        candidates = self.candidates if training else Candidates()
        one_writer = training and self.memory.sampler.is_policy
        ranking = self.scorer.ranking(prompts, completions)
        if ranking is not None:
            standings = ranking.standings(candidates.judging, candidates.budget)
            places = candidates.select(standings, one_writer=one_writer)
            return places.map(lambda side: side.to(prompts.ids.device)), self.scorer.compared(ranking, places)
        known = [None if entry is None else entry.score for entry in batch.kept]
        raw = self.scorer.score(prompts, completions, known)
        missing = missing_rows(batch.kept)
        if training and self.memory.cache is not None and missing:
            fresh = completions.by_sampler[0].select(missing)
            self.memory.cache.put(prompts.select(missing), fresh, raw.by_sampler[0, missing])
        scores = self.scorer.penalized(raw, completions)
        places = candidates.select(scores, one_writer=one_writer)
        return places, PairScores(chosen_values(scores, places))

    def open_cache(self, where: str | None, reference: dict[str, Any], trainer: Trainer) -> None:
        """Open the cache of the reference's completions and their scores.

        Args:
            where: "memory", or a folder; None for no cache.
            reference: The identity of the reference.
            trainer: Gives the precision and the rank of this process.

        Raises:
            InputError: The folder cannot be used, or was filled with another reference, sampling, reward or precision.
        """
        if where is None:
            self.memory.cache = None
            return
        sampling = {**asdict(self.rollout.sampling), "eos_token_ids": sorted(self.rollout.eos_token_ids)}
        # Tells these caches from those of earlier versions, which decoded (and so scored) texts without their prompts.
        sampling["texts"] = "decoded behind their prompts"
        model = {"policy": reference, "sampling": sampling, "reward": self.scorer.feedback.identity()}
        made_by = {"model": model, "trainer": {"precision": str(trainer.precision)}}
        self.memory.cache = ReferenceCache(where, made_by, trainer.global_rank)

    def _count(self, prompts: Prompts, sides: Sequence[ScoredSide]) -> None:
        tokens = sum(sum(some.counts) for side in sides for some in side.completions)
        self.timer.counts.update(prompts=len(prompts), prompt_tokens=sum(prompts.counts), completion_tokens=tokens)


def check_rollout(experience: Experience) -> Experience:
    """Return the pairs if all of their scores and log-probabilities are finite; refuse them otherwise.

    Raises:
        NonFiniteError: A score or log-probability is not finite.
    """
    scores, own = experience.scores, experience.completions.by_policy.logps
    if experience.offline is not None:
        own = own.masked_fill(experience.offline, 0.0)  # Another model wrote them.
    values = [
        ("the score of the policy's completion", scores.by_policy),
        ("the score of the sampler's completion", scores.by_sampler),
        ("the policy's log-probability of its own completion", own),
        ("the reference's log-probability of the policy's completion", experience.reference_logps.by_policy),
        ("the reference's log-probability of the sampler's completion", experience.reference_logps.by_sampler),
    ]
    if experience.sample is not None:
        reads = "the reference's log-probability of the bonus sampler's completion"
        values.append((reads, experience.sample.reference_logps))
    check_finite(values, experience.prompts.raw, "no step was taken on them")
    return experience
