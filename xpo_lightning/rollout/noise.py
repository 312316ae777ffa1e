"""The randomness of a batch: a function of a few numbers, with no state that a checkpoint would have to keep."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Noise:
    """Random numbers for one batch of prompts: for its rollouts, and for the order of its pairs.

    It is drawn on the CPU, so that it does not depend on the device either.

    Args:
        seed: Seed of the run.
        purpose: Tells training from validation and prediction, so that none disturbs another.
        number: Number of the batch.
        rank: Which of the processes that share the batch this is. Process r of n has rows r, r + n, r + 2n, ... of the
            batch that they are together; it draws the numbers of the whole batch and takes its rows', so that a prompt
            gets the same completion on any number of processes, and no two processes the same numbers.
        world_size: How many processes there are.
    """

    seed: int
    purpose: int = 0
    number: int = 0
    rank: int = 0
    world_size: int = 1
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Seed the source."""
        mixed = hash((self.seed, self.purpose, self.number)) % 2**63
        self._generator = torch.Generator().manual_seed(mixed)

    def uniforms(self, rows: int, width: int) -> Tensor:
        """Draw numbers in [0, 1), float64, for so many rows of this process, of shape (rows, width)."""
        shape = (rows * self.world_size, width)
        return torch.rand(shape, dtype=torch.float64, generator=self._generator)[self.rank :: self.world_size]

    def permutation(self, count: int) -> list[int]:
        """Draw an order of so many things."""
        return torch.randperm(count, generator=self._generator).tolist()
