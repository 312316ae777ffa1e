"""What the processes of a run tell each other."""

from typing import TypeVar

import torch

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """Collect a picklable value from every process, by rank; all processes must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
