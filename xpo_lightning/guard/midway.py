"""What processes tell each other in the middle of a piece of guarded work, which some may have left by then."""

from dataclasses import dataclass
from typing import Any, TypeVar

from xpo_lightning.errors import ConsequentError
from xpo_lightning.guard.processes import gathered

T = TypeVar("T")


@dataclass(frozen=True)
class Midway:
    """A value from the middle of the work; the guard, if it is told this in place of a report, asks again."""

    value: Any


def gathered_midway(value: T) -> list[T]:
    """Collect a picklable value from every process, by rank; all must call it that do not fail before.

    Raises:
        ConsequentError: A process has left the work, and told what is wrong in place of its value.
    """
    messages: list[Any] = gathered(Midway(value))
    for rank, message in enumerate(messages):
        if not isinstance(message, Midway):
            what = message[1] if message else "it was done before the others were"
            raise ConsequentError(f"process {rank}: {what}")
    return [message.value for message in messages]
