"""Which of several ways to compute something is taken: the fastest that was found right for rows of a length."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info

W = TypeVar("W")
STEP = 128
"""Tokens by which longer rows are tried."""
LEAST = 10
"""Tokens of the shortest rows that a way is tried on; one that is wrong for them is not taken at all."""


class Ladder(Generic[W]):
    """Ways from the fastest down to one that is right for whatever can be computed at all.

    A way is tried on rows of some length before longer ones are given to it. Where it fails, it may still be right up
    to a window or another mark, and longer rows alone take the next way.

    Args:
        title: What is computed, for the message on a way that fails.
        ways: The ways.
        fault: Tries a way on rows of up to a length; says what is wrong with it, or returns None.
        longest: Most tokens of a row, None where there is no limit.
        marks: Lengths up to which a way may be right that is wrong beyond.
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
        """Return the way for a batch whose longest row has so many tokens."""
        if length > self._reach and len(self._ways) > 1:
            self.extend(length if self.longest is None else min(self.longest, -(-length // STEP) * STEP))
        return next((way for limit, way in self._found if length <= limit), self._ways[0])

    @property
    def surest(self) -> W:
        """The way for the longest rows that were tried."""
        return self._ways[0]

    @torch.inference_mode(False)
    def extend(self, reach: int) -> None:
        """Try ways on rows of up to so many tokens, until one is right; with gradients even within a validation."""
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
        """Find the mark up to which the first way is right, where that is further than a faster one is."""
        known = max([right, LEAST, *(limit for limit, _ in self._found)])
        between = [mark for mark in sorted(self.marks, reverse=True) if known < mark < wrong]
        return next((mark for mark in between if self.fault(self._ways[0], mark) is None), right)
