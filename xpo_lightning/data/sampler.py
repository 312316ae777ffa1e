"""Orders of prompts that depend only on a seed and the number of the epoch, not on global random state."""

import random
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import lru_cache
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


def rows_of_turn(length: int, size: int, turn: int, share: ProcessShard, seed: int | None) -> list[int]:
    """Return the rows of a batch in an endless row of passes over a data set, which depend on nothing else.

    Processes take turns, as in `PromptOrder`.

    Args:
        length: Number of rows of the data set.
        size: Rows in a batch of each process.
        turn: Number of the batch.
        share: The share of this process.
        seed: Seed of the order of each pass; None keeps the order of the data set.
    """
    first = turn * size * share.num_replicas + share.rank
    places = range(first, first + size * share.num_replicas, share.num_replicas)
    passes = (divmod(place, length) for place in places)
    return [_order_of_pass(length, number, seed)[index] for number, index in passes]


@lru_cache(maxsize=2)  # A batch may be in two passes; a large data set is not shuffled anew for each batch.
def _order_of_pass(length: int, number: int, seed: int | None) -> list[int]:
    order = list(range(length))
    if seed is not None:
        random.Random(f"{seed} pairs {number}").shuffle(order)
    return order


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
