"""Orders of prompts that depend only on a seed and the number of the epoch, not on global random state."""

import random
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TypeVar, cast

from torch.utils.data import DistributedSampler

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessShard:
    """The share of the prompts that one process takes.

    Args:
        rank: Rank of the process.
        num_replicas: Number of processes.
    """

    rank: int = 0
    num_replicas: int = 1


class PromptOrder(DistributedSampler[int]):
    """The order of the training prompts in one process.

    Processes take turns, so that their batches together equal those of one process with a larger batch. Lightning calls
    `set_epoch` before each epoch. It keeps a `DistributedSampler`, but would replace any other sampler by one that
    always shuffles, with its own seed.

    Attributes:
        skipped: How many of this process's prompts the next pass skips, because a resumed run has used them already.
    """

    skipped: int = 0

    def __iter__(self) -> Iterator[int]:
        """Start a pass over this process's share; the first prompts are repeated to make all shares equal."""
        order = list(range(len(cast(Sized, self.dataset))))
        if self.shuffle:
            epoch_generator(self.seed, self.epoch).shuffle(order)
        begin = self.rank + self.skipped * self.num_replicas
        return islice(cycle(order), begin, max(begin, self.total_size), self.num_replicas)


def epoch_generator(seed: int, epoch: int) -> random.Random:
    """Return the random generator for the order of one epoch."""
    return random.Random(f"{seed} {epoch}")


def shuffle_buffered(items: Iterable[T], size: int, generator: random.Random) -> Iterator[T]:
    """Yield items in random order, drawn from a buffer of `size` items; with size 1, in their own order."""
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        index = generator.randrange(size)
        yield buffer[index]
        buffer[index] = item
    generator.shuffle(buffer)
    yield from buffer
