"""Base class of the ways in which a policy's weights get from this process into a vLLM server."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from xpo_lightning.core.atomic_files import remove, replacing_folder
from xpo_lightning.core.errors import InputError
from xpo_lightning.rollout.vllm.client import Check, VLLMServer
from xpo_lightning.rollout.vllm.protocol import Answer, BaseModel

Ask = Callable[[list[dict[str, Any]]], list[Answer]]
"""Requests completions from a server, all at once."""
ROUNDING = 0.25
"""Nats per token by which log-probabilities of the same weights may differ."""
PROMPT, TOKEN, TOKENS = [1, 2, 3, 4], 5, 16
"""The prompt of trial completions, the one token that they repeat, and how often."""


class PolicyTransfer(ABC):
    """Saves a policy's weights to a folder, under a new name each time, and has servers load them from there.

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

    @abstractmethod
    def mark(self, policy: nn.Module) -> str:
        """Return a hash of the weights that are sent; two states of a policy have two hashes."""

    @abstractmethod
    def save(self, policy: nn.Module) -> str:
        """Save the policy's current weights, and return their new name.

        Raises:
            InputError: They cannot be written.
        """

    @abstractmethod
    def load(self, server: VLLMServer, name: str, check: Check) -> None:
        """Have a server load saved weights.

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
