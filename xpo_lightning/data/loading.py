"""Prompts as `torch.utils.data` serves them: indexed or streamed, in batches."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from xpo_lightning.data.encoding import Encoding, Sample
from xpo_lightning.data.files import Located
from xpo_lightning.data.order import PromptOrder, Share, epoch_generator, shuffle_buffered
from xpo_lightning.errors import InputError


class PromptDataset(Dataset[Sample]):
    """Prompts that were all checked and tokenized beforehand.

    Args:
        rows: The rows.
        encoding: How rows become prompts.
        name: What to call the rows in messages.

    Raises:
        InputError: A row is malformed or too long, or no row is left.
    """

    def __init__(self, rows: Sequence[Located], encoding: Encoding, name: str) -> None:
        self._rows = rows
        self._encoding = encoding
        # An array takes an eighth of the memory of a list of integers.
        self._kept = [(index, array("i", ids)) for index, _, ids in encoding.encode(rows, name)]

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        """Return one prompt; a copy, since a reward function may write to what it is given."""
        row_index, ids = self._kept[index]
        _, row = self._rows[row_index]
        return self._encoding.sample(deepcopy(row), ids)


@dataclass(eq=False)
class PromptStream(IterableDataset[Sample]):
    """Prompts that are read, checked and tokenized while they are used.

    Every process reads all rows and keeps its share, so that each gets equally many; what is left over is not used.

    Args:
        rows: The rows, which can be read repeatedly.
        encoding: How rows become prompts.
        name: What to call the rows in messages.
        buffer: How many prompts to choose the next one from; 1 keeps the order.
        seed: Seed of the order.
        share: Which part of the prompts this process takes.
        epoch: Changes the order.
    """

    rows: Iterable[Located]
    encoding: Encoding
    name: str
    buffer: int = 1
    seed: int = 0
    share: Share = field(default_factory=Share)
    epoch: int = 0

    def __iter__(self) -> Iterator[Sample]:
        """Start a pass."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        kept = self.encoding.encode(self.rows, self.name, report=worker == 0)
        samples = (self.encoding.sample(row, ids) for _, row, ids in kept)
        shuffled = shuffle_buffered(samples, self.buffer, epoch_generator(self.seed, self.epoch))
        for number, turn in enumerate(zip(*[shuffled] * self.share.num_replicas, strict=False)):
            if number % workers == worker:
                yield turn[self.share.rank]


class StreamLoader(DataLoader[Sample]):
    """Loads a `PromptStream`, in another order each epoch.

    Lightning tells epochs to samplers only, and a stream has none; so the loader asks.
    """

    stream: PromptStream
    current_epoch: Callable[[], int]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start a pass."""
        self.stream.epoch = self.current_epoch()
        try:
            yield from super().__iter__()
        except InputError as error:
            # From a worker process, it arrives with the worker's traceback in the message.
            raise InputError(str(error).strip().rpartition(f"{InputError.__name__}: ")[2]) from error


@dataclass(frozen=True)
class Batching:
    """How prompts become batches.

    Args:
        size: Prompts of a training batch.
        eval_size: Prompts of a validation or prediction batch.
        shuffle: Whether training prompts come in a new order each epoch.
        seed: Seed of the order.
        buffer: How many prompts of a stream to choose the next one from.
        num_workers: Processes that load.
        drop_last: Whether to leave out a smaller last training batch.
    """

    size: int
    eval_size: int
    shuffle: bool
    seed: int
    buffer: int
    num_workers: int
    drop_last: bool

    def for_training(
        self, prompts: PromptDataset | PromptStream, share: Share, current_epoch: Callable[[], int]
    ) -> DataLoader[Sample]:
        """Load training prompts."""
        if isinstance(prompts, PromptStream):
            stream = replace(prompts, seed=self.seed, buffer=self.buffer if self.shuffle else 1, share=share)
            loader = StreamLoader(stream, batch_size=self.size, drop_last=self.drop_last, **self._common())
            loader.stream, loader.current_epoch = stream, current_epoch
            return loader
        order = PromptOrder(prompts, share.num_replicas, share.rank, self.shuffle, self.seed)
        if self.drop_last and len(order) < self.size:
            raise InputError(
                f"data.drop_last: {len(order)} prompts make no whole batch of data.batch_size={self.size}; lower it"
            )
        return DataLoader(prompts, batch_size=self.size, sampler=order, drop_last=self.drop_last, **self._common())

    def in_order(self, prompts: PromptDataset | PromptStream, share: Share) -> DataLoader[Sample]:
        """Load prompts in their own order; Lightning shares indexed ones out among processes."""
        if isinstance(prompts, PromptStream):
            prompts = replace(prompts, share=share)
        return DataLoader(prompts, batch_size=self.eval_size, **self._common())

    def _common(self) -> dict[str, Any]:
        # Without a generator of its own, a loader draws from the global one at the start of each pass.
        generator = torch.Generator().manual_seed(self.seed)
        return {"num_workers": self.num_workers, "collate_fn": collate, "generator": generator}


def collate(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Turn samples into a batch: a list for each column, nothing made a tensor."""
    return {column: [sample[column] for sample in samples] for column in samples[0]}
