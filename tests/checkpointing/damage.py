"""Checkpoints that tests write, damage and read."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from xpo_lightning.core.owner import this_process

GONE = replace(this_process(), started=1)
"""A process that had the number of this one."""


def checkpoint_of(value: float, numbers: int = 8, step: int = 0) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((numbers,), value)}, "global_step": step, "optimizer_states": []}


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writes beyond a size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(_: bytes) -> bytes:
    return b""


def flip(data: bytes, place: int | None = None) -> bytes:
    place = len(data) // 2 if place is None else place
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
