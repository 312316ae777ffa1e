"""Randomness: the numbers that rollouts use, and the global random state that a checkpoint holds."""

import random
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """Purposes of random numbers; each has its own stream, independent of the others."""

    TRAINING = 0
    VALIDATION = 1
    PREDICTION = 2
    COMPARISON = 3  # of two policies; the second takes 4
    CHAT = 5  # with two policies; the second takes 6
    CHECK = 7
    BONUS = 8  # what the exploration bonus learns with
    SAMPLER = 9  # which earlier policy writes


@dataclass
class RolloutRNG:
    """Random numbers for one batch of prompts: for its rollouts, and for the order of its pairs.

    They are drawn on the CPU, so that they do not depend on the device.

    Args:
        seed: Seed of the run.
        stream: Purpose of the numbers, a `Stream`.
        number: Number of the batch.
        rank: Rank of this process. Rank r of n has rows r, r + n, r + 2n, ... of the global batch; it draws the numbers
            of the global batch and takes those of its rows, so that a prompt gets the same completion on any number of
            processes, and no two processes use the same numbers.
        world_size: Number of processes.
    """

    seed: int
    stream: int = Stream.TRAINING
    number: int = 0
    rank: int = 0
    world_size: int = 1
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Seed the generator."""
        mixed = hash((self.seed, int(self.stream), self.number)) % 2**63
        self._generator = torch.Generator().manual_seed(mixed)

    def uniforms(self, rows: int, width: int) -> Tensor:
        """Draw numbers in [0, 1), float64, for `rows` rows of this process, of shape (rows, width)."""
        shape = (rows * self.world_size, width)
        return torch.rand(shape, dtype=torch.float64, generator=self._generator)[self.rank :: self.world_size]

    def permutation(self, count: int) -> list[int]:
        """Draw a random permutation of `count` indices."""
        return torch.randperm(count, generator=self._generator).tolist()


def random_state() -> dict[str, Any]:
    """Return the random state of torch, its current GPU, numpy and Python; tensors, numbers, lists and tuples only."""
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
    """Restore a state that `random_state` returned; the GPU's state is left alone if it holds none."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
