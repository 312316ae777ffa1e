"""Base classes of the ways in which a policy's weights get from this process into a vLLM server."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import Enum, auto
from pathlib import Path
from typing import Any

from torch import nn

from xpo_lightning.core.atomic_files import remove, replacing_folder
from xpo_lightning.core.distributed import all_gather_guarded, own_rank
from xpo_lightning.core.errors import InputError
from xpo_lightning.models.sharding import is_sharded
from xpo_lightning.rollout.vllm.client import Check, VLLMServer
from xpo_lightning.rollout.vllm.protocol import Answer, BaseModel

Ask = Callable[[list[dict[str, Any]]], list[Answer]]
"""Requests completions from a server, all at once."""
ROUNDING = 0.25
"""Nats per token by which log-probabilities of the same weights may differ."""
PROMPT, TOKEN, TOKENS = [1, 2, 3, 4], 5, 16
"""The prompt of trial completions, the one token that they repeat, and how often."""


class _Order(Enum):
    """What the first process asks the others for, if each has a shard of the policy."""

    GATHER = auto()
    CHANGE = auto()
    RESTORE = auto()


class PolicyTransfer(ABC):
    """Brings a policy's weights into servers, under a new name each time.

    The first process does so. If the policy is sharded, the others are in `follow` meanwhile: they take part when
    weights are gathered or changed, and in the passes of the model.
    """

    @abstractmethod
    def mark(self, policy: nn.Module) -> str:
        """Return a hash of the weights that are sent, another for each state of a policy (collective if sharded)."""

    @abstractmethod
    def save(self, policy: nn.Module) -> str:
        """Make the policy's current weights ready to be sent, and return their new name.

        Raises:
            InputError: They cannot be written.
        """

    @abstractmethod
    def take_part(self, policy: nn.Module) -> None:
        """Take part while the first process gathers the weights of a sharded policy in `save`."""

    def changed(self, policy: nn.Module) -> AbstractContextManager[None]:
        """Give the weights of this process other values for a block."""
        return nullcontext()

    def follow(self, policy: nn.Module) -> str:
        """Do what the first process asks for, until it tells the name of the weights that the servers have.

        Returns:
            That name.
        """
        order: Any = None
        with ExitStack() as changes:
            while not isinstance(order, str):
                order = all_gather_guarded(None)[0]
                if order is _Order.GATHER:
                    self.take_part(policy)
                elif order is _Order.CHANGE:
                    changes.enter_context(self.changed(policy))
                elif order is _Order.RESTORE:
                    changes.close()
        return order

    def begin_gathering(self, policy: nn.Module) -> None:
        """Have the other processes take part in `save`, if the policy is sharded."""
        self._order(policy, _Order.GATHER)

    @contextmanager
    def changed_on_all(self, policy: nn.Module) -> Iterator[None]:
        """Give the weights other values for a block, on all processes that have a shard of them."""
        self._order(policy, _Order.CHANGE)
        with self.changed(policy):
            yield
        self._order(policy, _Order.RESTORE)

    def _order(self, policy: nn.Module, order: _Order) -> None:
        if is_sharded(policy) and own_rank() == 0:
            all_gather_guarded(order)

    @abstractmethod
    def load(self, server: VLLMServer, name: str, check: Check) -> None:
        """Have a server load weights that are ready.

        Raises:
            InputError: The server does not load them.
        """

    @abstractmethod
    def ensure(self, server: VLLMServer, name: str, check: Check) -> str:
        """Return what identifies the copy of these weights in a server, which loads them if it lacks them.

        If it is the same before and after a server has written, the server wrote with these weights.

        Raises:
            InputError: The server does not load them, or does not say what it has.
        """

    @abstractmethod
    def served_name(self, base: str, name: str) -> str:
        """Return the model that a request for a completion of the policy names.

        Args:
            base: The server's base model.
            name: Name of the weights.
        """

    @abstractmethod
    def try_out(self, server: VLLMServer, policy: Any, base: BaseModel, ask: Ask, check: Check) -> None:
        """Refuse a server that would write with other weights than it has been sent.

        Raises:
            InputError: It would, or it could not be tried.
        """

    def forget(self, server: VLLMServer, name: str) -> None:  # noqa: B027  (a hook)
        """Have a server drop weights that are no longer needed, and ignore errors."""

    def remove(self, name: str) -> None:  # noqa: B027  (a hook)
        """Delete what was made ready under a name."""


class FolderTransfer(PolicyTransfer):
    """Saves a policy's weights to a folder, and has servers load them from there.

    Args:
        folder: Folder from which the servers load the weights; it is created if it does not exist.
        key: Key of the config that the folder is under, for messages.

    Raises:
        InputError: The path is empty, or is a file.
    """

    def __init__(self, folder: str, key: str) -> None:
        if not folder.strip():
            raise InputError(f"{key} is empty; give a folder that the server can read")
        self.path, self.key = Path(folder).expanduser().absolute(), key
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{key} must be a folder, but {self.path} is a file")

    def remove(self, name: str) -> None:
        """Delete the files of saved weights."""
        remove(self.path / name)

    @contextmanager
    def saving(self, name: str) -> Iterator[Path]:
        """Yield a folder to write weights to; it has its name once they are complete.

        Raises:
            InputError: They cannot be written.
        """
        try:
            with replacing_folder(self.path / name) as folder:
                yield folder
        except InputError as error:
            raise InputError(f"{self.key}: {error}") from error


def trial(base: BaseModel, name: str) -> dict[str, Any]:
    """Build a request for a completion that repeats one token, so that all completions can be compared.

    Args:
        base: The server's base model.
        name: The model that writes.
    """
    length = TOKENS if base.context is None else min(TOKENS, base.context - len(PROMPT))
    forced = {"allowed_token_ids": [TOKEN], "temperature": 0.0, "repetition_penalty": 1.0, "seed": 0}
    ends = {"max_tokens": length, "ignore_eos": True, "stop": [], "stop_token_ids": []}
    return {"model": name, "prompt": PROMPT, **forced, **ends, "logprobs": 0, "return_token_ids": True}


def gap(logps: list[float], others: list[float]) -> float:
    """Return the mean absolute difference between log-probabilities of the same tokens, in nats."""
    return sum(abs(one - other) for one, other in zip(logps, others, strict=True)) / len(logps)
