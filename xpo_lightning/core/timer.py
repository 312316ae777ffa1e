"""Where the time of a step goes: seconds of each phase, and counts of what was done."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Phase = Literal[
    "reference_rollout",
    "policy_rollout",
    "reference_scoring",
    "reward",
    "policy_forward",
    "backward",
    "optimizer",
]


class PhaseTimer:
    """Adds up the seconds of each phase, and counts events.

    On a GPU, phases are marked with events on its stream and read when the seconds are asked for, so that measuring
    makes nobody wait.

    Attributes:
        counts: How often what happened; phases are counted under their own names.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: Phase | Literal["step"], device: torch.device | str = "cpu") -> Iterator[None]:
        """Time what happens inside; phases do not nest, except in the step."""
        self.counts[phase] += 1
        if torch.device(device).type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._pending.append((phase, start, end))
            self._add_up(finished_only=True)
        else:
            begun = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - begun

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since the last reset."""
        self._add_up(finished_only=False)
        return dict(self._seconds)

    def reset(self) -> None:
        """Forget all seconds and counts."""
        self.counts.clear()
        self._seconds.clear()
        self._pending.clear()

    def _add_up(self, finished_only: bool) -> None:
        """Add the phases that the device has gone through, so that they do not pile up where nobody asks."""
        while self._pending and (not finished_only or self._pending[0][2].query()):
            phase, start, end = self._pending.pop(0)
            end.synchronize()
            self._seconds[phase] += start.elapsed_time(end) / 1000
