"""Randomness: the numbers that rollouts are drawn from, and the global random state that a checkpoint holds."""

import random
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What random numbers are for; none of these disturbs another."""

    TRAINING = 0
    VALIDATION = 1
    PREDICTION = 2
    COMPARISON = 3  # of two policies; the second has the next number
    CHAT = 5  # with two policies; the second has the next number
    CHECK = 7


@dataclass
class RolloutRNG:
    """Random numbers for one batch of prompts: for its rollouts, and for the order of its pairs.

    It is drawn on the CPU, so that it does not depend on the device either.

    Args:
        seed: Seed of the run.
        stream: What they are for, a `Stream`.
        number: Number of the batch.
        rank: Which of the processes that share the batch this is. Process r of n has rows r, r + n, r + 2n, ... of the
            batch that they are together; it draws the numbers of the whole batch and takes its rows', so that a prompt
            gets the same completion on any number of processes, and no two processes the same numbers.
        world_size: How many processes there are.
    """

    seed: int
    stream: int = Stream.TRAINING
    number: int = 0
    rank: int = 0
    world_size: int = 1
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Seed the source."""
        mixed = hash((self.seed, int(self.stream), self.number)) % 2**63
        self._generator = torch.Generator().manual_seed(mixed)

    def uniforms(self, rows: int, width: int) -> Tensor:
        """Draw numbers in [0, 1), float64, for so many rows of this process, of shape (rows, width)."""
        shape = (rows * self.world_size, width)
        return torch.rand(shape, dtype=torch.float64, generator=self._generator)[self.rank :: self.world_size]

    def permutation(self, count: int) -> list[int]:
        """Draw an order of so many things."""
        return torch.randperm(count, generator=self._generator).tolist()


def random_state() -> dict[str, Any]:
    """Read the state of torch (with the current GPU's), numpy and Python; tensors, numbers, lists and tuples only."""
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to a state that `random_state` has read; a GPU's is left alone where there was none."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
