"""Loads whole models in as many of a machine's processes at a time as its main memory has room for.

Under FSDP2 each process keeps a part of every weight, but loads whole models first. Eight processes that do so at the
same time take eight times the memory of the models.
"""

import sys
from collections import Counter
from collections.abc import Callable

from xpo_lightning.core.distributed import all_gather, host, own_rank
from xpo_lightning.core.main_memory import available, forget_peak, peak, taken
from xpo_lightning.models.forward.cpu import give_memory_back

ROOM = 0.8
"""Share of the available memory that loading may take."""


def load_in_turns(load: Callable[[], None]) -> None:
    """Load models in each process of a run: on each machine in one process, then in as many as fit (collective).

    Args:
        load: Loads models and keeps this process's part of them; it must not wait for other processes.
    """
    hosts = all_gather(host())
    turn = hosts[: own_rank()].count(host())
    most = max(Counter(hosts).values())
    at_once = min(most, *all_gather(_room_for(_load(load)) if turn == 0 else most))
    for first in range(1, most, at_once):
        if first <= turn < first + at_once:
            _load(load)
        all_gather(None)


def _load(load: Callable[[], None]) -> int | None:
    """Load, and return the bytes that it took meanwhile; None if unknown."""
    before = taken()
    forget_peak()
    load()
    most = peak()
    give_memory_back()
    return None if most is None or before is None else most - before


def _room_for(need: int | None) -> int:
    """Return how many processes have room for this many bytes each, at least one; all of them if that is unknown.

    The parts that all processes keep are as much again.
    """
    room = available()
    if need is None or room is None:
        return sys.maxsize
    return max(1, int(ROOM * room / max(need, 1)) - 1)
