"""Turns prompts into labelled pairs: generates completions, scores them, chooses two of each prompt and labels them."""

from collections.abc import Callable, Sequence
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
from xpo_lightning.rewards.labels import LabelRule
from xpo_lightning.rewards.ranking import Ranking
from xpo_lightning.rewards.scorer import PairScorer, PairScores
from xpo_lightning.rollout.context import RolloutContext
from xpo_lightning.rollout.engine import GenerationRequest, RolloutEngine
from xpo_lightning.rollout.engine_writer import EngineWriter
from xpo_lightning.rollout.local import LocalRollout, gather, order_of
from xpo_lightning.rollout.pair_selection import Candidates, chosen_completions, chosen_values
from xpo_lightning.rollout.reference_cache import ReferenceCache, missing_rows
from xpo_lightning.rollout.samplers import ReferenceSampler, Sampler
from xpo_lightning.training.persistent_state import PersistentState

Written = tuple[Pair[list[Completions]], Pair[Tensor]]
"""For each side, K completions of B prompts, and the reference's log-probabilities of them, (K, B)."""

COMPARED = 8
"""Most of the policy's completions per batch for which the engine's log-probabilities are compared with ours."""


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


@dataclass(frozen=True)
class Draws:
    """Random numbers of a batch, float64. The sampler's are drawn first, so that it writes the same beside any policy.

    Args:
        sides: Those of each side's completions. (B, max_new_tokens) each
        labels: Those of the labels. (B, 2)
        bonus: Those of the bonus sampler's completions. (B, max_new_tokens)
    """

    sides: Pair[list[Tensor]]
    labels: Tensor | None
    bonus: Tensor | None


@dataclass
class Collector:
    """Collects one labelled pair for each prompt of a batch.

    Args:
        rollout: Samples completions with the models of this process.
        memory: Holds the reference, the samplers, which write the second completion in training and the exploration
            term's, and the cache of the reference's completions.
        candidates: How many completions each side writes in training, and which become the pair.
        scorer: Scores completions with the reward or judge.
        label_rule: Turns the scores into labels.
        timer: Times the phases.
        writer: Has an engine write the policy's and the reference's completions in place of `rollout`; None if there is
            no engine.
        keeps_previous: Whether pairs keep the log-probabilities of the policy that wrote both of them.
    """

    rollout: LocalRollout
    memory: PersistentState
    candidates: Candidates
    scorer: PairScorer
    label_rule: LabelRule
    timer: PhaseTimer
    writer: EngineWriter | None = None
    keeps_previous: bool = False

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
        sampler = self.memory.sampler if training else ReferenceSampler()
        bonus_sampler = self.memory.bonus_sampler if training else None
        candidates = self._candidates(training)
        cache = self.memory.cache if training else None
        kept = [None] * len(prompts) if cache is None else cache.get(prompts)
        lend = partial(self.memory.reference.lent, first=not training)
        drawn = self._draw(prompts, rng, training)

        def open_context(rows: list[int]) -> RolloutContext:
            return RolloutContext(
                self.rollout, policy, lend, prompts.select(rows), [kept[row] for row in rows], self.timer
            )

        def write(rows: list[int]) -> Written:
            index = torch.as_tensor(rows, device=prompts.ids.device)
            uniforms = drawn.sides.map(lambda side: [numbers[index] for numbers in side])
            return _written(open_context(rows), sampler, uniforms)

        groups = self.rollout.groups(prompts, policy)
        if self.writer is None:
            completions, logps = _together([write(rows) for rows in groups], groups)
        else:
            batch = rng.number if training else None
            completions = _by_engine(self.writer, batch, open_context, sampler, drawn.sides, groups)
            is_behind = self.writer.staleness(batch) > 0
            if upcoming is not None:
                self._begin(policy, self.writer, upcoming)
            logps = _scored(self.writer.engine, open_context, sampler, completions, groups, is_behind=is_behind)
        third = None
        if bonus_sampler is not None and drawn.bonus is not None:
            third = _bonus_sample(open_context, bonus_sampler, drawn.bonus, groups)
        self._count(prompts, completions, third)
        ranking = self.scorer.ranking(prompts, completions)
        if ranking is None:
            scored = self.scorer.score(prompts, completions, [None if entry is None else entry.score for entry in kept])
            missing = missing_rows(kept)
            if cache is not None and missing:
                fresh = completions.by_sampler[0].select(missing)
                cache.put(prompts.select(missing), fresh, scored.raw.by_sampler[0, missing])
            places = candidates.select(scored.scores, one_writer=sampler.is_policy)
            scores = chosen_values(scored.scores, places)
        else:
            places, scored = self._judged(ranking, candidates, sampler)
            scores = scored.scores.map(lambda side: side[0])
        uniforms = None if drawn.labels is None else drawn.labels.to(scores.by_policy)
        labels = self.label_rule.label(scored.preferences(scores), uniforms)
        written = chosen_completions(completions, places)
        return Experience(
            prompts=prompts,
            completions=written,
            scores=scores,
            labels=labels.labels,
            reference_logps=chosen_values(logps, places),
            silent=labels.silent,
            answered=scored.answered,
            sample=third,
            previous_logps=written.map(lambda side: side.logps) if training and self.keeps_previous else None,
            comparisons=None if ranking is None else ranking.comparisons.to(logps.by_policy.device),
        )

    def _judged(self, ranking: Ranking, candidates: Candidates, sampler: Sampler) -> tuple[Pair[Tensor], PairScores]:
        """Choose a pair for each prompt by a judge's ranking, and return its places and the judge's answer about it."""
        device = ranking.prompts.ids.device
        with self.timer("reward", device):
            standings = ranking.standings(candidates.judging, candidates.budget)
            places = candidates.select(standings, one_writer=sampler.is_policy).map(lambda side: side.to(device))
            return places, self.scorer.of_answers(ranking.answers(places).to(device))

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
        lend = partial(self.memory.reference.lent, first=not training)
        completions = Pair(self.rollout.given(prompts, chosen), self.rollout.given(prompts, rejected))

        def open_context(rows: list[int]) -> RolloutContext:
            return RolloutContext(self.rollout, policy, lend, prompts.select(rows), [None] * len(rows), self.timer)

        groups = self.rollout.groups(prompts, policy)
        logps = _by_reference(open_context, [completions.by_policy, completions.by_sampler], groups)
        self._count(prompts, completions.map(lambda side: [side]), None)
        certain = torch.ones(len(prompts), device=prompts.ids.device)
        return Experience(
            prompts=prompts,
            completions=completions,
            scores=Pair(certain, 1 - certain),
            labels=certain,
            reference_logps=Pair(*logps),
            silent=torch.zeros_like(certain, dtype=torch.bool),
            offline=torch.ones_like(certain, dtype=torch.bool),
        )

    def _candidates(self, training: bool) -> Candidates:
        return self.candidates if training else Candidates()

    def _draw(self, prompts: Prompts, rng: RolloutRNG, training: bool) -> Draws:
        """Draw the random numbers of a batch."""
        of_sampler, of_policy = (
            [self.rollout.uniforms(prompts, rng) for _ in range(self._candidates(training).count)] for _ in range(2)
        )
        labels = rng.uniforms(len(prompts), 2) if training else None
        has_bonus = training and self.memory.bonus_sampler is not None
        return Draws(Pair(of_policy, of_sampler), labels, self.rollout.uniforms(prompts, rng) if has_bonus else None)

    def _begin(self, policy: nn.Module, writer: EngineWriter, upcoming: Upcoming) -> None:
        """Have the engine begin to write the next batch."""
        sides = self._draw(upcoming.prompts, upcoming.rng, True).sides
        asked = _requests(writer.engine, self.memory.sampler, sides)
        with self.timer("policy_rollout", upcoming.prompts.ids.device):
            writer.start(policy, upcoming.prompts, asked, upcoming.rng.number, wanted=upcoming.wanted)

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

    def _count(self, prompts: Prompts, completions: Pair[list[Completions]], third: BonusSample | None) -> None:
        others = [] if third is None else [third.completions]
        tokens = sum(sum(some.counts) for some in (*completions.by_policy, *completions.by_sampler, *others))
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


def _written(context: RolloutContext, sampler: Sampler, uniforms: Pair[list[Tensor]]) -> Written:
    """Generate both sides' completions, and score with the reference those that it did not sample itself."""
    by_sampler = sampler.write(context, uniforms.by_sampler)
    completions = Pair(context.generate_with_policy(uniforms.by_policy), by_sampler)
    if sampler.is_reference:
        own = torch.stack(context.reference_logps(completions.by_policy))
        return completions, Pair(own, torch.stack([some.logps for some in by_sampler]))
    everything = torch.stack(context.reference_logps([*completions.by_policy, *by_sampler]))
    return completions, Pair(*everything.chunk(2))


def _bonus_sample(
    open_context: Callable[[list[int]], RolloutContext],
    sampler: Sampler,
    uniforms: Tensor,
    groups: Sequence[list[int]],
) -> BonusSample:
    """Generate a third completion of each prompt, on which the exploration term is, and score it with the reference."""
    written, logps = [], []
    for rows in groups:
        context = open_context(rows)
        (some,) = sampler.write(context, [uniforms[torch.as_tensor(rows, device=uniforms.device)]])
        written.append(some)
        logps.append(some.logps if sampler.is_reference else context.reference_logps([some])[0])
    return BonusSample(gather(written, groups), torch.cat(logps)[order_of(groups)])


def _requests(engine: RolloutEngine, sampler: Sampler, uniforms: Pair[list[Tensor]]) -> list[GenerationRequest]:
    """Return what an engine is asked for: the policy's completions, and the sampler's if it has the sampler, too."""
    asked = [GenerationRequest("policy", uniforms.by_policy)]
    if sampler.is_policy or (sampler.is_reference and engine.has_reference):
        asked.append(GenerationRequest("policy" if sampler.is_policy else "reference", uniforms.by_sampler))
    return asked


def _by_engine(
    writer: EngineWriter,
    batch: int | None,
    open_context: Callable[[list[int]], RolloutContext],
    sampler: Sampler,
    uniforms: Pair[list[Tensor]],
    groups: Sequence[list[int]],
) -> Pair[list[Completions]]:
    """Generate completions of all prompts; those of a sampler that the engine does not have are written here."""
    context = open_context(sorted(row for rows in groups for row in rows))
    with context.timer("policy_rollout", context.device):
        asked = _requests(writer.engine, sampler, uniforms)
        by_policy, *others = writer.write(context.policy, context.prompts, asked, batch)
    if others:
        return Pair(by_policy, others[0])
    parts = []
    for rows in groups:
        index = torch.as_tensor(rows, device=context.device)
        parts.append(sampler.write(open_context(rows), [numbers[index] for numbers in uniforms.by_sampler]))
    return Pair(by_policy, [gather(candidate, groups) for candidate in zip(*parts, strict=True)])


def _scored(
    engine: RolloutEngine,
    open_context: Callable[[list[int]], RolloutContext],
    sampler: Sampler,
    completions: Pair[list[Completions]],
    groups: Sequence[list[int]],
    *,
    is_behind: bool,
) -> Pair[Tensor]:
    """Score an engine's completions with the reference, (K, B) per side, and check that it used the right weights."""
    both = [*completions.by_policy, *completions.by_sampler]
    logps = Pair(*_by_reference(open_context, both, groups).chunk(2))
    if sampler.is_reference and engine.has_reference:
        engine.compare("reference", completions.by_sampler, logps.by_sampler)
    # Only this check needs the policy's log-probabilities, so a few completions are enough.
    rows = groups[0][:COMPARED]
    some = [candidate.select(rows) for candidate in completions.by_policy[:1]]
    engine.compare("policy", some, torch.stack(open_context(rows).policy_logps(some)), is_behind=is_behind)
    return logps


def _by_reference(
    open_context: Callable[[list[int]], RolloutContext],
    completions: Sequence[Completions],
    groups: Sequence[list[int]],
) -> Tensor:
    """Return the reference's log-probability of K times B completions, (K, B), read in groups of prompts."""
    parts = [
        torch.stack(open_context(rows).reference_logps([some.select(rows) for some in completions])) for rows in groups
    ]
    return torch.cat(parts, 1)[:, order_of(groups)]


def _together(parts: Sequence[Written], groups: Sequence[Sequence[int]]) -> Written:
    """Join the completions and log-probabilities of groups of prompts, in the order of the prompts."""
    order = order_of(groups)

    def completions(sides: list[list[Completions]]) -> list[Completions]:
        return [gather(candidate, groups) for candidate in zip(*sides, strict=True)]

    def logps(sides: list[Tensor]) -> Tensor:
        return torch.cat(sides, 1)[:, order]

    return (
        Pair(completions([each.by_policy for each, _ in parts]), completions([each.by_sampler for each, _ in parts])),
        Pair(logps([each.by_policy for _, each in parts]), logps([each.by_sampler for _, each in parts])),
    )
