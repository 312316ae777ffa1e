"""Writes all completions that a batch of prompts needs, with an engine or in this process, and scores all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.core.timer import PhaseTimer
from xpo_lightning.rollout.context import LendReference, RolloutContext
from xpo_lightning.rollout.engine import GenerationRequest, RolloutEngine
from xpo_lightning.rollout.engine_writer import EngineWriter
from xpo_lightning.rollout.local import LocalRollout, gather, order_of
from xpo_lightning.rollout.reference_cache import Entry
from xpo_lightning.rollout.samplers import Sampler

COMPARED = 8
"""Most of the policy's completions per batch for which the engine's log-probabilities are compared with ours."""


@dataclass(frozen=True)
class Side:
    """Completions that are to be written: K of each prompt, by one sampler.

    Args:
        sampler: The writer.
        uniforms: Random numbers in [0, 1) for each completion of a prompt, float64. (B, max_new_tokens) each
    """

    sampler: Sampler
    uniforms: Sequence[Tensor]

    def write(self, context: RolloutContext, rows: Sequence[int]) -> list[Completions]:
        """Write the completions of these rows, whose prompts the context has."""
        index = torch.as_tensor(rows, device=context.device)
        return self.sampler.write(context, [numbers[index] for numbers in self.uniforms])

    @property
    def is_scored(self) -> bool:
        """Whether the reference writes the completions, so that it scores them while it samples."""
        return self.sampler.is_reference


@dataclass(frozen=True)
class GivenSide:
    """Completions that are written already: K times B."""

    completions: Sequence[Completions]
    is_scored: ClassVar[bool] = False

    def write(self, context: RolloutContext, rows: Sequence[int]) -> list[Completions]:
        """Return the completions of these rows."""
        return [some.select(rows) for some in self.completions]


@dataclass(frozen=True)
class ScoredSide:
    """Completions that are written and scored.

    Args:
        completions: K times B completions.
        reference_logps: The reference's log-probability of each, summed over its tokens, in nats. (K, B)
    """

    completions: list[Completions]
    reference_logps: Tensor


@dataclass(frozen=True)
class RolloutBatch:
    """What is to be written for a batch of prompts, and the models at hand.

    Args:
        policy: The policy, on the device of the prompts.
        lend_reference: Lends the reference, in eval mode.
        prompts: B prompts.
        sides: The completions, in the order in which they are written here.
        kept: The cached reference completion of each prompt, or None. Length B.
        number: Number of the training batch; None for prompts that are not trained on.
    """

    policy: nn.Module
    lend_reference: LendReference
    prompts: Prompts
    sides: Sequence[Side | GivenSide]
    kept: Sequence[Entry | None]
    number: int | None = None


class BatchWriter:
    """Writes completions with an engine or with the models of this process, which score all of them.

    Here, prompts are handled in groups: each model encodes the prompts of a group once, for all that it writes and
    scores, if the model allows it.

    Args:
        rollout: Samples completions with the models of this process.
        timer: Times the phases.
        by_engine: Has an engine write what it can; None if there is no engine.
    """

    def __init__(self, rollout: LocalRollout, timer: PhaseTimer, by_engine: EngineWriter | None = None) -> None:
        self.rollout, self.timer, self.by_engine = rollout, timer, by_engine

    def write(
        self, batch: RolloutBatch, upcoming: RolloutBatch | None = None, *, is_wanted: bool = True
    ) -> list[ScoredSide]:
        """Write the completions of a batch, and score them under the reference.

        Args:
            batch: The batch.
            upcoming: The training batch that the engine is to write meanwhile; None if it is not to write ahead.
            is_wanted: Whether this run trains on the upcoming batch.

        Returns:
            The completions of each side.
        """
        writer = self.by_engine
        if writer is None:
            return self.complete(batch)
        requests = _requests(writer.engine, batch.sides)
        with self.timer("policy_rollout", batch.prompts.ids.device):
            written = writer.write(batch.policy, batch.prompts, list(requests.values()), batch.number)
            if upcoming is not None and upcoming.number is not None:
                next_ones = list(_requests(writer.engine, upcoming.sides).values())
                writer.start(upcoming.policy, upcoming.prompts, next_ones, upcoming.number, wanted=is_wanted)
        given = dict(zip(requests, map(GivenSide, written), strict=True))
        sides = [given.get(place, side) for place, side in enumerate(batch.sides)]
        scored = self.complete(replace(batch, sides=sides))
        # The policy's own side is the last that it writes.
        self._compare(batch, {request.who: scored[place] for place, request in requests.items()}, writer)
        return scored

    def complete(self, batch: RolloutBatch) -> list[ScoredSide]:
        """Write the sides that are not given, and score all, in groups of prompts."""
        groups = self.rollout.groups(batch.prompts, batch.policy)
        parts = [_of_group(self._context(batch, rows), batch.sides, rows) for rows in groups]
        return [_joined(some, groups) for some in zip(*parts, strict=True)]

    def _context(self, batch: RolloutBatch, rows: Sequence[int]) -> RolloutContext:
        kept = [batch.kept[row] for row in rows]
        prompts = batch.prompts.select(rows)
        return RolloutContext(self.rollout, batch.policy, batch.lend_reference, prompts, kept, self.timer)

    def _compare(self, batch: RolloutBatch, written: Mapping[str, ScoredSide], writer: EngineWriter) -> None:
        """Check the engine's log-probabilities of what each model has written there: it must have the same weights."""
        if "reference" in written:
            by_reference = written["reference"]
            writer.engine.compare("reference", by_reference.completions, by_reference.reference_logps)
        # Only this check needs the policy's log-probabilities, so a few completions are enough.
        rows = self.rollout.groups(batch.prompts, batch.policy)[0][:COMPARED]
        some = [written["policy"].completions[0].select(rows)]
        logps = torch.stack(self._context(batch, rows).policy_logps(some))
        writer.engine.compare("policy", some, logps, is_behind=writer.staleness(batch.number) > 0)


def halves(side: ScoredSide) -> list[ScoredSide]:
    """Split what a sampler that writes both sides of each pair has written: the sampler's side, the policy's."""
    half = len(side.completions) // 2
    return [
        ScoredSide(side.completions[:half], side.reference_logps[:half]),
        ScoredSide(side.completions[half:], side.reference_logps[half:]),
    ]


def _requests(engine: RolloutEngine, sides: Sequence[Side | GivenSide]) -> dict[int, GenerationRequest]:
    """Return what an engine is asked for, by the place of the side: what the policy and a reference there write."""
    requests = {}
    for place, side in enumerate(sides):
        if isinstance(side, Side) and side.sampler.is_policy:
            requests[place] = GenerationRequest("policy", side.uniforms)
        elif isinstance(side, Side) and side.sampler.is_reference and engine.has_reference:
            requests[place] = GenerationRequest("reference", side.uniforms)
    return requests


def _of_group(context: RolloutContext, sides: Sequence[Side | GivenSide], rows: Sequence[int]) -> list[ScoredSide]:
    """Write all completions of a group of prompts; score with the reference those that it did not sample itself."""
    written = [side.write(context, rows) for side in sides]
    others = [some for side, each in zip(sides, written, strict=True) if not side.is_scored for some in each]
    logps = iter(context.reference_logps(others))
    return [
        ScoredSide(each, torch.stack([some.logps if side.is_scored else next(logps) for some in each]))
        for side, each in zip(sides, written, strict=True)
    ]


def _joined(parts: Sequence[ScoredSide], groups: Sequence[Sequence[int]]) -> ScoredSide:
    """Join the parts of a side that groups of prompts have, in the order of the prompts."""
    completions = zip(*(part.completions for part in parts), strict=True)
    logps = torch.cat([part.reference_logps for part in parts], 1)
    return ScoredSide([gather(some, groups) for some in completions], logps[:, order_of(groups)])
