"""Chooses, of several ways to compute something, the fastest that is right for rows of a given length."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info

W = TypeVar("W")
STEP = 128
"""Longer rows are probed at multiples of this many tokens."""
LEAST = 10
"""Tokens of the shortest rows that a way is probed on; a way that is wrong for them is not used at all."""


class Ladder(Generic[W]):
    """Several ways to compute something, ordered from the fastest to one that is right for every model.

    A way is probed on rows of some length before it is used for rows of that length. A way that fails may still be
    right up to a mark, such as the length of a window; then only longer rows take the next way.

    Args:
        title: What is computed, for the message on a way that fails.
        ways: The ways, the fastest first.
        fault: Probes a way on rows of up to a length; returns what is wrong with it, or None.
        longest: Most tokens of a row, None without a limit.
        marks: Lengths up to which a way may be right although it is wrong beyond.
    """

    def __init__(
        self,
        title: str,
        ways: Sequence[W],
        fault: Callable[[W, int], str | None],
        longest: int | None,
        marks: Sequence[int],
    ) -> None:
        self.title, self.fault, self.longest, self.marks = title, fault, longest, marks
        self._ways, self._reach = list(ways), 0
        self._found: list[tuple[int, W]] = []

    def way(self, length: int) -> W:
        """Return the way for a batch whose longest row has `length` tokens."""
        if length > self._reach and len(self._ways) > 1:
            self.extend(length if self.longest is None else min(self.longest, -(-length // STEP) * STEP))
        return next((way for limit, way in self._found if length <= limit), self._ways[0])

    @property
    def surest(self) -> W:
        """The way for the longest rows that were probed."""
        return self._ways[0]

    @torch.inference_mode(False)
    def extend(self, reach: int) -> None:
        """Probe ways on rows of up to `reach` tokens until one is right; gradients work even during validation."""
        verified, first = self._reach, None
        while len(self._ways) > 1 and (reason := self.fault(self._ways[0], reach)) is not None:
            limit = self._last_right(verified, reach)
            failed = self._ways.pop(0)
            if limit:
                self._found.append((limit, failed))
            rows = f"rows of over {limit} tokens" if limit else "rows"
            first, verified = first or (rows, f"{failed} they would be wrong ({reason})"), 0
        self._reach = reach
        if first is not None:
            rows, why = first
            rank_zero_info(f"{self.title}: {rows} go through {self._ways[0]}, which is slower; {why}")

    def _last_right(self, right: int, wrong: int) -> int:
        """Return the largest mark up to which the first way is right, if beyond the faster ways' limits, or `right`."""
        known = max([right, LEAST, *(limit for limit, _ in self._found)])
        between = [mark for mark in sorted(self.marks, reverse=True) if known < mark < wrong]
        return next((mark for mark in between if self.fault(self._ways[0], mark) is None), right)
