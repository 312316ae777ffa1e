"""Communication between the processes of a run."""

import os
import socket
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from xpo_lightning.core.errors import ConsequentError

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Where an error that all processes know of was raised.

    Args:
        rank: The process that raised it.
        host: The machine of that process.
        is_here: Whether this process raised it.
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
    """Return the rank of this process; 0 if there is only one."""
    return torch.distributed.get_rank() if is_distributed() else 0


def all_gather(value: T) -> list[T]:
    """Gather a picklable value from every process, in order of rank (collective)."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def named(message: str) -> str:
    """Prefix a message with this process's rank, if there are several processes."""
    return f"process {own_rank()}: {message}" if is_distributed() else message


def set_origin(error: BaseException, origin: Origin) -> None:
    """Record on an error where it was raised; this marks it as known to all processes."""
    vars(error)["origin"] = origin


def origin_of(error: BaseException) -> Origin | None:
    """Return where an error was raised, or None if not all processes know of it."""
    origin: Origin | None = getattr(error, "origin", None)
    return origin


def host() -> str:
    """Name this machine."""
    return socket.gethostname()


def speaks_for_host(other: str) -> bool:
    """Tell whether this process must repeat a message from another machine, whose output appears elsewhere."""
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return other != host() and local_rank == "0"


@dataclass(frozen=True)
class Midway:
    """A value gathered in the middle of guarded work; a guard that receives one in place of a report gathers again."""

    value: Any


def all_gather_guarded(value: T) -> list[T]:
    """Gather a value inside guarded work, safely even if a rank has failed there already (collective).

    Args:
        value: Any picklable value.

    Returns:
        The values of all processes, in order of rank.

    Raises:
        ConsequentError: A process has left the guarded work, and sent its report in place of a value.
    """
    messages: list[Any] = all_gather(Midway(value))
    for rank, message in enumerate(messages):
        if not isinstance(message, Midway):
            what = message[1] if message else "it was done before the others were"
            raise ConsequentError(f"process {rank}: {what}")
    return [message.value for message in messages]
