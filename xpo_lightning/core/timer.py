"""Measures where the time of a step goes: seconds per phase, and counts of events."""

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

    On a GPU, CUDA events mark the phases on its stream and are read only when needed, so that measuring does not
    synchronise.

    Attributes:
        counts: Number of occurrences of each event; phases are counted under their own names.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: Phase | Literal["step"], device: torch.device | str = "cpu") -> Iterator[None]:
        """Time a block as a phase; phases do not nest, except in the step."""
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
        """Reset all seconds and counts."""
        self.counts.clear()
        self._seconds.clear()
        self._pending.clear()

    def _add_up(self, finished_only: bool) -> None:
        """Add up pending phases, or only finished ones, so that they do not pile up if `seconds` is never called."""
        while self._pending and (not finished_only or self._pending[0][2].query()):
            phase, start, end = self._pending.pop(0)
            end.synchronize()
            self._seconds[phase] += start.elapsed_time(end) / 1000
