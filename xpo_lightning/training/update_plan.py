"""Assigns pairs to optimizer steps, and the pairs of a step to micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from xpo_lightning.core.batch import Experience
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.rng import RolloutRNG


class Pairs(Protocol):
    """Source of the pairs of an update: an `Experience`, or a view of the replay buffer."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Tokens of each prompt, and of the longest one of its completions."""

    def select(self, rows: Sequence[int]) -> Experience:
        """Return the pairs of these rows."""


FEW_PAIRS = 8
"""Most pairs in a micro-batch while neither an option nor a measurement limits it."""


@dataclass(frozen=True)
class UpdatePlan:
    """Assigns the pairs of an update to optimizer steps and micro-batches.

    Args:
        micro_batch_size: Most pairs in a micro-batch; None for no limit.
        micro_batch_tokens: Most tokens in a micro-batch, padding included; a longer pair is a micro-batch by itself.
            None for no limit. If both are None, see `within`.
        updates_per_rollout: Optimizer steps in each pass over the pairs.
        epochs_per_rollout: Passes over the pairs.
        completions: Completions of each pair: 2, or 3 if the exploration term has one of its own.
    """

    micro_batch_size: int | None
    micro_batch_tokens: int | None
    updates_per_rollout: int
    epochs_per_rollout: int
    completions: int = 2

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        for name, value in vars(self).items():
            check_range(f"model.{name}", value, least=1)

    @property
    def step_count(self) -> int:
        """Optimizer steps per batch, if an update has at least `updates_per_rollout` pairs."""
        return self.updates_per_rollout * self.epochs_per_rollout

    @property
    def is_open(self) -> bool:
        """Tell whether no option limits a micro-batch."""
        return self.micro_batch_size is None and self.micro_batch_tokens is None

    def within(self, tokens: int | None) -> "UpdatePlan":
        """Return the plan with this limit of tokens per micro-batch, unless an option already limits micro-batches."""
        return replace(self, micro_batch_tokens=tokens) if self.is_open else self

    def most_pairs(self, prompt: int, completion: int) -> int:
        """Return the most pairs of a micro-batch, at least 1, given the tokens of the longest prompt and completion."""
        tokens = self._tokens(prompt, completion)
        pairs = FEW_PAIRS if self.is_open else self.micro_batch_size
        limits = [pairs, None if self.micro_batch_tokens is None else self.micro_batch_tokens // tokens]
        return max(1, min(limit for limit in limits if limit is not None))

    def steps(self, pairs: Pairs, rng: RolloutRNG) -> Iterator[list[list[int]]]:
        """Yield the micro-batches of each optimizer step; several steps per pass get the pairs in random order."""
        sizes = pairs.sizes
        for _ in range(self.epochs_per_rollout):
            rows = list(range(len(sizes)))
            if self.updates_per_rollout > 1:
                rows = rng.permutation(len(sizes))
            steps = min(self.updates_per_rollout, len(sizes))
            for step in range(steps):
                part = slice(step * len(sizes) // steps, (step + 1) * len(sizes) // steps)
                yield self.micro_batches(sizes, rows[part])

    def micro_batches(self, sizes: Sequence[tuple[int, int]], rows: Sequence[int]) -> list[list[int]]:
        """Put pairs of similar length together, the longest first: memory runs out at once or never.

        Args:
            sizes: Tokens of each prompt, and of the longest one of its completions.
            rows: The pairs to put together.
        """
        groups: list[list[int]] = []
        for row in sorted(rows, key=lambda row: (-sizes[row][0], -sizes[row][1])):
            longest_prompt = sizes[groups[-1][0]][0] if groups else 0
            if groups and self._fits(longest_prompt, [sizes[member][1] for member in [*groups[-1], row]]):
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    def most_tokens(self, sizes: Sequence[tuple[int, int]], micro_batches: Sequence[Sequence[int]]) -> int:
        """Count the tokens of the largest micro-batch, padding included.

        Args:
            sizes: Tokens of each prompt, and of the longest one of its completions.
            micro_batches: The rows of each micro-batch.
        """

        def tokens(rows: Sequence[int]) -> int:
            prompts, completions = zip(*(sizes[row] for row in rows), strict=True)
            return len(rows) * self._tokens(max(prompts), max(completions))

        return max(map(tokens, micro_batches))

    def _tokens(self, prompt: int, completion: int) -> int:
        """Count the tokens of a pair whose completions are padded to the longest."""
        return prompt + self.completions * completion

    def _fits(self, prompt: int, completions: list[int]) -> bool:
        """Tell whether pairs padded to the longest prompt and the longest completion are within the limits."""
        return len(completions) <= self.most_pairs(prompt, max(completions))
