"""What the processes of a run tell each other."""

import os
import socket
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from xpo_lightning.core.errors import ConsequentError

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Where an error came up that all processes know of.

    Args:
        rank: The process.
        host: Its machine.
        is_here: Whether it is this process.
    """

    rank: int
    host: str
    is_here: bool


def world_size() -> int:
    """Return how many processes the run has."""
    is_initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_initialized else 1


def is_distributed() -> bool:
    """Tell whether the run has more than one process."""
    return world_size() > 1


def own_rank() -> int:
    """Return the number of this process."""
    return torch.distributed.get_rank() if is_distributed() else 0


def all_gather(value: T) -> list[T]:
    """Collect a picklable value from every process, by rank; all processes must call it."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def named(message: str) -> str:
    """Say which process a message is from, where there are several."""
    return f"process {own_rank()}: {message}" if is_distributed() else message


def set_origin(error: BaseException, origin: Origin) -> None:
    """Note where an error came up, which all processes know of."""
    vars(error)["origin"] = origin


def origin_of(error: BaseException) -> Origin | None:
    """Return where an error came up, if all processes know of it."""
    origin: Origin | None = getattr(error, "origin", None)
    return origin


def host() -> str:
    """Name this machine."""
    return socket.gethostname()


def speaks_for_host(other: str) -> bool:
    """Tell whether this process has to repeat what a process of another machine said, whose output is elsewhere."""
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return other != host() and local_rank == "0"


@dataclass(frozen=True)
class Midway:
    """A value from the middle of the work; the guard, if it is told this in place of a report, asks again."""

    value: Any


def all_gather_guarded(value: T) -> list[T]:
    """Collect a picklable value from every process, by rank; all must call it that do not fail before.

    Raises:
        ConsequentError: A process has left the work, and told what is wrong in place of its value.
    """
    messages: list[Any] = all_gather(Midway(value))
    for rank, message in enumerate(messages):
        if not isinstance(message, Midway):
            what = message[1] if message else "it was done before the others were"
            raise ConsequentError(f"process {rank}: {what}")
    return [message.value for message in messages]
