"""The growing data set of Algorithm 1 (arXiv 2405.21046, step 5): later updates train again on earlier batches' pairs.

The reference is frozen, so its log-probabilities are kept with the pairs.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from xpo_lightning.core.batch import Experience
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.training.replay_buffer.serialization import decoded, encoded
from xpo_lightning.training.replay_buffer.store import FileStore, MemoryStore, PairStore, Sizes


@dataclass(frozen=True)
class BufferOptions:
    """Which pairs the replay buffer keeps, and where.

    An update trains on all kept pairs, in `model.epochs_per_rollout` passes of `model.updates_per_rollout` optimizer
    steps each: more pairs make a step larger, and the number of steps stays the same.

    Args:
        keep: How many batches' pairs are kept: `all`, as in Algorithm 1, or the last n, the newest included.
        memory_pairs: Most pairs that a process keeps in memory; if there are more, it keeps all of them in a file in
            the run's folder, `pairs-<rank>-<run>.sqlite`, and reads them when needed. The file also keeps the pairs of
            older batches, so that a run can resume from an older checkpoint.

    Raises:
        InputError: A number is below 1.
    """

    keep: Literal["all"] | int = "all"
    memory_pairs: int = 10_000

    def __post_init__(self) -> None:
        """Check the options."""
        if self.keep != "all" and self.keep < 1:
            raise InputError(f"model.buffer.keep must be 'all' or at least 1, but is {self.keep}")
        check_range("model.buffer.memory_pairs", self.memory_pairs, least=1)


@dataclass(frozen=True)
class BufferView:
    """The kept pairs that an update trains on; has the part of `Experience`'s interface that an update needs.

    Args:
        store: The store of the pairs.
        begin: Number of the first pair.
        device: Device of the pairs that `select` returns.
    """

    store: PairStore
    begin: int
    device: torch.device

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.sizes)

    @property
    def sizes(self) -> Sizes:
        """Tokens of each prompt, and of the longer one of its completions."""
        return self.store.sizes[self.begin - self.store.begin :]

    def select(self, rows: Sequence[int]) -> Experience:
        """Return the pairs of these rows."""
        return decoded(self.store.get([self.begin + row for row in rows]), self.device)


class Buffer:
    """Keeps the pairs of earlier batches.

    Args:
        options: Which pairs are kept, and how many of them in memory.
        folder: The run's folder, for the file of pairs that exceed the memory limit.
        rank: Rank of this process.
    """

    def __init__(self, options: BufferOptions, folder: Path, rank: int = 0) -> None:
        # The name has a random part, because two runs may share a folder, one after the other or at once.
        self.options, self.path = options, folder / f"pairs-{rank}-{secrets.token_hex(4)}.sqlite"
        self.store: PairStore = MemoryStore()
        self.starts: list[int] = []  # number of the first pair of each kept batch
        self.settled = 0  # number after the last pair of the finished batches

    def add(self, experience: Experience) -> BufferView:
        """Add the pairs of a batch, and return all kept pairs; without `settle`, the next call drops this batch."""
        self.store.keep(self.store.begin, self.settled)
        self.starts = [*(start for start in self.starts if start < self.settled), self.settled]
        if len(self.store.sizes) + len(experience) > self.options.memory_pairs and isinstance(self.store, MemoryStore):
            self.store = self._on_disk(self.store)
        self.store.append(encoded(experience), experience.sizes)
        return BufferView(self.store, self.starts[-self._batches :][0], experience.labels.device)

    def settle(self) -> None:
        """Mark the batch as finished, and forget the pairs that the next one will not need."""
        self.settled = self.store.end
        if self.options.keep != "all":
            self.starts = self.starts[max(len(self.starts) - self.options.keep + 1, 0) :]
            self.store.keep(self.starts[0] if self.starts else self.settled, self.settled)

    @property
    def _batches(self) -> int:
        return len(self.starts) if self.options.keep == "all" else self.options.keep

    def state(self) -> dict[str, Any]:
        """Return the state after the last finished batch, for a resume: plain values."""
        kept: dict[str, Any] = {"begin": self.store.begin, "end": self.settled, "keep": self.options.keep}
        kept["digest"] = self.store.digest(self.settled)
        starts = [start for start in self.starts if start < self.settled]
        if not isinstance(self.store, MemoryStore):
            return {**kept, "starts": starts, "file": str(self.path.resolve())}
        count = self.settled - self.store.begin
        sizes = [list(size) for size in self.store.sizes[:count]]
        return {**kept, "starts": starts, "lines": self.store.lines[:count], "sizes": sizes}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            InputError: The file of pairs is missing or is another run's, or fewer batches were kept than the options
                ask for.
        """
        begin, end = state["begin"], state["end"]
        if state["keep"] != "all" and (self.options.keep == "all" or self.options.keep > state["keep"]):
            raise InputError(
                f"model.buffer.keep is {self.options.keep}, but the checkpoint was made with {state['keep']}, so the "
                f"pairs before are gone; resume with that, or with fewer"
            )
        if "file" in state:
            self.store = self._fetched(Path(state["file"]), begin)
        else:
            self.store = MemoryStore()
            self.store.begin = begin
            self.store.append(state["lines"], [(prompt, completion) for prompt, completion in state["sizes"]])
        if self.store.end < end or self.store.digest(end) != state["digest"]:
            raise InputError(
                f"ckpt_path: the checkpoint needs pairs {begin} to {end} of model.buffer, and '{self.path}' does not "
                f"have them, or those of a run that went on differently; put the file of that time there"
            )
        self.store.keep(begin, end)
        self.starts, self.settled = list(state["starts"]), end

    def _on_disk(self, memory: MemoryStore) -> FileStore:
        file = FileStore(self.path, memory.begin)
        file.append(memory.lines, memory.sizes)
        return file

    def _fetched(self, saved: Path, begin: int) -> FileStore:
        """Open a checkpoint's file of pairs; copy it into this run's folder if it is not there yet."""
        self.path = self.path.with_name(saved.name)
        if self.path.is_file():  # The run's own; its folder may have been moved.
            return FileStore(self.path, begin)
        if not saved.is_file():
            raise InputError(
                f"ckpt_path: the checkpoint needs the pairs that model.buffer kept in '{saved}', and there is no such "
                f"file, nor '{self.path}'; put it back"
            )
        return FileStore(saved, begin).copied(self.path)
