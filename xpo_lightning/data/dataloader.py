"""Datasets and data loaders of prompts, indexed or streamed."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from xpo_lightning.core.errors import InputError
from xpo_lightning.data.preprocessing import PromptPreprocessor, Sample
from xpo_lightning.data.readers import LocatedRow
from xpo_lightning.data.sampler import ProcessShard, PromptOrder, epoch_generator, shuffle_buffered


class PromptDataset(Dataset[Sample]):
    """A map-style dataset of prompts, all checked and tokenized in advance.

    Args:
        rows: The rows.
        encoding: Turns rows into prompts.
        name: Name of the rows in messages.
        has_pairs: Whether the rows are preference pairs, whose completions are trained on as well.

    Raises:
        InputError: A row is malformed or too long, or no row is left.
    """

    def __init__(
        self, rows: Sequence[LocatedRow], encoding: PromptPreprocessor, name: str, has_pairs: bool = False
    ) -> None:
        self._rows = rows
        self._encoding = encoding
        self._kept: list[tuple[int, array[int]]] = []
        self._completions = sha256()
        for index, row, ids in encoding.encode(rows, name):
            # An array takes an eighth of the memory of a list of integers.
            self._kept.append((index, array("i", ids)))
            if has_pairs:
                self._completions.update(repr((row["chosen"], row["rejected"])).encode())

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._kept)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(ids) for _, ids in self._kept]

    def fingerprint(self) -> str:
        """Hash the token ids of all prompts, in order, and the completions of pairs."""
        digest = self._completions.copy()
        for _, ids in self._kept:
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids)
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        """Return one prompt, copied because a reward function may modify it."""
        row_index, ids = self._kept[index]
        _, row = self._rows[row_index]
        return self._encoding.sample(deepcopy(row), ids)


@dataclass(eq=False)
class PromptStream(IterableDataset[Sample]):
    """An iterable dataset of prompts, read, checked and tokenized during training.

    Every process reads all rows and keeps its share, so that all get equally many; a remainder is not used.

    Args:
        rows: The rows, which can be read repeatedly.
        encoding: Turns rows into prompts.
        name: Name of the rows in messages.
        buffer: How many prompts to choose the next one from; 1 keeps the order.
        seed: Seed of the order.
        share: The share of this process.
        epoch: Number of the epoch, which changes the order.
    """

    rows: Iterable[LocatedRow]
    encoding: PromptPreprocessor
    name: str
    buffer: int = 1
    seed: int = 0
    share: ProcessShard = field(default_factory=ProcessShard)
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


class TrainingLoader(DataLoader[Sample]):
    """Loads training prompts in a new order each epoch; a resumed run continues in the middle of an epoch.

    Attributes:
        position: Returns the epoch, its first batch to load, and the batch before which to stop, if any. It is called
            at the first batch of a pass, when a resumed run has its counters back.
        looks_ahead: Whether to load each batch before the one in front of it is used.
        upcoming: With `looks_ahead`, the batch after the present one; None at the end of a pass.
    """

    looks_ahead = False
    upcoming: Any = None
    position: Callable[[], tuple[int, int, int | None]]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start a pass, or continue one."""
        epoch, first, last = self.position()
        self._set_epoch(epoch, first)
        done = first
        try:
            batches = islice(super().__iter__(), *self._left(first, last))
            for batch in self._looking_ahead(batches) if self.looks_ahead else batches:
                done += 1
                yield batch
        except InputError as error:
            raise InputError(_without_traceback(str(error))) from error
        if done == 0 and self.drop_last and last != 0:
            raise InputError(f"data.drop_last: no prompts make a whole batch of data.batch_size={self.batch_size}")

    def _looking_ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        self.upcoming = next(batches, None)
        while self.upcoming is not None:
            batch, self.upcoming = self.upcoming, next(batches, None)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, since the trainer holds the position; tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing; see `state_dict`."""

    def _set_epoch(self, epoch: int, first: int) -> None:
        if isinstance(self.dataset, PromptStream):
            self.dataset.epoch = epoch
        elif isinstance(self.sampler, PromptOrder):
            self.sampler.set_epoch(epoch)
            self.sampler.skipped = first * (self.batch_size or 1)

    def _left(self, first: int, last: int | None) -> tuple[int, int | None]:
        """Return the range of batches to take; a stream starts at its beginning, `PromptOrder` where it resumes."""
        if isinstance(self.dataset, PromptStream):
            return first, last
        return 0, None if last is None else max(last - first, 0)


def look_ahead(loader: Any) -> None:
    """Have a loader of training prompts load each batch before the one in front of it is used.

    Raises:
        InputError: It is not a loader of `PromptDataModule`.
    """
    if not isinstance(loader, TrainingLoader):
        raise InputError(
            f"model.rollout.init_args.ahead=1 needs to know the next batch, which PromptDataModule's loader tells, and "
            f"{type(loader).__name__} does not; train on a PromptDataModule, or set it to 0"
        )
    loader.looks_ahead = True


def next_batch(loader: Any) -> Any:
    """Return the batch after the present one of a loader that looks ahead; None at the end of a pass."""
    return loader.upcoming if isinstance(loader, TrainingLoader) else None


def _without_traceback(message: str) -> str:
    """Strip the traceback from a message that a worker process sent."""
    if "Original Traceback" not in message:
        return message
    return message.strip().partition(f"\n{InputError.__module__}.{InputError.__name__}: ")[2] or message


@dataclass(frozen=True)
class Batching:
    """How prompts become batches.

    Args:
        size: Prompts per training batch.
        eval_size: Prompts per validation or prediction batch.
        shuffle: Whether to take training prompts in a new order each epoch.
        seed: Seed of the order.
        buffer: How many prompts of a stream to choose the next one from.
        num_workers: Number of worker processes that load batches.
        drop_last: Whether to drop a smaller last training batch.
    """

    size: int
    eval_size: int
    shuffle: bool
    seed: int
    buffer: int
    num_workers: int
    drop_last: bool

    def for_training(
        self,
        prompts: PromptDataset | PromptStream,
        share: ProcessShard,
        position: Callable[[], tuple[int, int, int | None]],
    ) -> DataLoader[Sample]:
        """Return a loader of training prompts; `position` is that of `TrainingLoader`."""
        if isinstance(prompts, PromptStream):
            stream = replace(prompts, seed=self.seed, buffer=self.buffer if self.shuffle else 1, share=share)
            loader = TrainingLoader(stream, batch_size=self.size, drop_last=self.drop_last, **self._common())
            loader.position = position
            return loader
        order = PromptOrder(prompts, share.num_replicas, share.rank, self.shuffle, self.seed)
        if self.drop_last and len(order) < self.size:
            raise InputError(
                f"data.drop_last: {len(order)} prompts make no whole batch of data.batch_size={self.size}; lower it"
            )
        loader = TrainingLoader(
            prompts, batch_size=self.size, sampler=order, drop_last=self.drop_last, **self._common()
        )
        loader.position = position
        return loader

    def in_order(self, prompts: PromptDataset | PromptStream, share: ProcessShard) -> DataLoader[Sample]:
        """Return a loader of prompts in their own order; Lightning distributes indexed ones over processes."""
        if isinstance(prompts, PromptStream):
            prompts = replace(prompts, share=share)
        return DataLoader(prompts, batch_size=self.eval_size, **self._common())

    def identity(self, prompts: PromptDataset | PromptStream, share: ProcessShard) -> dict[str, Any]:
        """Return everything that the order of the training prompts depends on, as plain values."""
        settings = asdict(self)
        batch_size, _, num_workers = (settings.pop(name) for name in ("size", "eval_size", "num_workers"))
        named = {"batch_size": batch_size, **settings, "processes": share.num_replicas}
        if isinstance(prompts, PromptStream):  # Each worker batches its own share, so their number matters.
            return {**named, "num_workers": num_workers}
        named.pop("buffer")
        return {**named, "prompts": len(prompts), "token_ids": prompts.fingerprint()}

    def _common(self) -> dict[str, Any]:
        # Without a generator of its own, a loader draws from the global one at the start of each pass.
        generator = torch.Generator().manual_seed(self.seed)
        return {"num_workers": self.num_workers, "collate_fn": collate, "generator": generator}


def collate(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Turn samples into a batch: one list per column, without tensors."""
    return {column: [sample[column] for sample in samples] for column in samples[0]}
