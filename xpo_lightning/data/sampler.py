"""Orders that depend on a seed and the epoch's number only, not on global random state."""

import random
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TypeVar, cast

from torch.utils.data import DistributedSampler

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessShard:
    """Which part of the prompts one training process takes.

    Args:
        rank: Which process this is.
        num_replicas: How many there are.
    """

    rank: int = 0
    num_replicas: int = 1


class PromptOrder(DistributedSampler[int]):
    """The order of the training prompts in one process.

    Processes take turns, so that their batches together are those of one process with the larger batch. Lightning calls
    `set_epoch` before each epoch. It leaves a `DistributedSampler` alone, where it would replace another sampler by one
    that shuffles by a seed of its own, asked or not.

    Attributes:
        skipped: How many of this process's prompts the next pass leaves out; a resumed run has had them.
    """

    skipped: int = 0

    def __iter__(self) -> Iterator[int]:
        """Start a pass over this process's share; the first prompts fill up what is missing to equal shares."""
        order = list(range(len(cast(Sized, self.dataset))))
        if self.shuffle:
            epoch_generator(self.seed, self.epoch).shuffle(order)
        begin = self.rank + self.skipped * self.num_replicas
        return islice(cycle(order), begin, max(begin, self.total_size), self.num_replicas)


def epoch_generator(seed: int, epoch: int) -> random.Random:
    """Return what decides the order of one epoch."""
    return random.Random(f"{seed} {epoch}")


def shuffle_buffered(items: Iterable[T], size: int, generator: random.Random) -> Iterator[T]:
    """Yield items in an order drawn from a buffer of `size` of them; with size 1, in their own order."""
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
