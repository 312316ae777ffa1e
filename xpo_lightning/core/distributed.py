"""Communication between the processes of a run."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@dataclass(frozen=True)
class Turn:
    """A call for work that all processes must take part in, gathered in place of a value.

    Args:
        number: Tells which work; of several, the lowest comes first.
    """

    number: int


_helpers: list[Callable[[int], None]] = []


@contextmanager
def helping(take_part: Callable[[int], None]) -> Iterator[None]:
    """Take part in the work that other processes call for, while this one waits for them inside a block.

    Args:
        take_part: Called with the number of the `Turn`.
    """
    _helpers.append(take_part)
    try:
        yield
    finally:
        _helpers.pop()


def take_turn(number: int) -> None:
    """Wait until all processes take part in a piece of work, inside guarded work and `helping` (collective).

    Args:
        number: Tells which work. Processes that call for the same do it at the same time.

    Raises:
        ConsequentError: See `all_gather_guarded`.
    """
    while (first := min(_turns(_gather_midway(Turn(number))))) != number:
        _take_part(first)


def all_gather_guarded(value: T) -> list[T]:
    """Gather a value inside guarded work, safely even if a rank has failed there already (collective).

    Args:
        value: Any picklable value.

    Returns:
        The values of all processes, in order of rank.

    Raises:
        ConsequentError: A process has left the guarded work, and sent its report in place of a value.
    """
    values = _gather_midway(value)
    while called := _turns(values):
        _take_part(min(called))
        values = _gather_midway(value)
    return values


def _gather_midway(value: Any) -> list[Any]:
    messages: list[Any] = all_gather(Midway(value))
    for rank, message in enumerate(messages):
        if not isinstance(message, Midway):
            what = message[1] if message else "it was done before the others were"
            raise ConsequentError(f"process {rank}: {what}")
    return [message.value for message in messages]


def _turns(values: list[Any]) -> list[int]:
    return [value.number for value in values if isinstance(value, Turn)]


def _take_part(number: int) -> None:
    if not _helpers:
        raise RuntimeError("another process calls for work that this one knows nothing of")
    _helpers[-1](number)


def mark_out_of_step(error: BaseException) -> None:
    """Record on an error that the other processes wait in the middle of something, where no report reaches them."""
    vars(error)["is_out_of_step"] = True


def is_out_of_step(error: BaseException) -> bool:
    """Tell whether an error was raised where no report reaches the other processes."""
    return bool(getattr(error, "is_out_of_step", False))
