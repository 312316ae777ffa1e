"""Chooses how OpenMP's threads wait for each other; it must be known before torch is loaded.

By default they spin for milliseconds at the end of each parallel loop. With another process on the machine the thread
that is waited for may not be running, and a step of a small model, which has thousands of such loops, takes up to
twenty times as long. Threads that sleep at once make it a fifth of that, but cost a quiet machine most of its speed.
"""

import os
import sys
import time
from pathlib import Path

SPIN_COUNT = 50_000
"""Turns that a thread waits on a quiet machine before it sleeps, a sixth of the default."""
BUSY_CORES = 0.5
"""Cores that other processes use on a machine that counts as busy."""
_WINDOW = 0.2
_OF_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_TIMES = Path("/proc/stat")


class OtherProcesses:
    """Measures how many cores other processes use, from the moment it is built."""

    def __init__(self) -> None:
        self._begun = self._now()

    def cores(self) -> float:
        """Return the cores in use by others, on average; 0 where the system does not say."""
        time.sleep(max(0.0, _WINDOW - (time.perf_counter() - self._begun[0])))
        seconds, busy, own = (now - then for now, then in zip(self._now(), self._begun, strict=True))
        return max(0.0, busy - own) / seconds

    def _now(self) -> tuple[float, float, float]:
        """Return the time, and the seconds of CPU time that all processes and this one have used."""
        ticks = [0] * 8
        if _TIMES.is_file():
            # user, nice, system, idle, iowait, irq, softirq, steal
            ticks = [int(word) for word in _TIMES.read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


def choose_waiting(others: OtherProcesses) -> dict[str, str]:
    """Return the environment variables that say how threads wait; none if the user has set one or torch is loaded.

    Results do not depend on it.

    Args:
        others: Has measured the machine since the command began.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _OF_USER) or not _TIMES.is_file():
        return {}
    if others.cores() > BUSY_CORES:
        return {"OMP_WAIT_POLICY": "passive"}
    return {"GOMP_SPINCOUNT": str(SPIN_COUNT)}
