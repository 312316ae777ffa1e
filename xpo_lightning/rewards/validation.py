"""Checks the output of rewards and judges: B finite numbers, or one clear error."""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from xpo_lightning.core.errors import InputError, NonFiniteError

SHOWN = 3
"""Maximum number of rows without a finite score that a message shows."""


def as_scores(values: object, expected: int, who: str) -> Tensor:
    """Check a reward's output and turn it into a tensor.

    Args:
        values: The reward's output: a tensor, a numpy array, or a list or tuple of numbers. True counts as 1 and
            False as 0, so that a function may return whether each completion is right.
        expected: B, the number of completions.
        who: Name of the reward in messages, for example the function's import path.

    Returns:
        The scores, float32, on the CPU. (B,)

    Raises:
        InputError: There are not B values, or one of them is not a number.
        NonFiniteError: Some are not finite in float32; the error has the indices of all these rows.
    """
    numbers = [_number(entry, row, who) for row, entry in enumerate(_entries(values, expected, who))]
    scores = torch.tensor(numbers, dtype=torch.float32)
    rows: list[int] = torch.nonzero(~scores.isfinite()).flatten().tolist()
    if rows:
        shown = [f"{numbers[row]} for row {row}" for row in rows[:SHOWN]]
        if len(rows) > SHOWN:
            shown.append(f"no finite number for {len(rows) - SHOWN} more rows")
        text = " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)
        raise NonFiniteError(f"{who} gave {text}; a score must be a finite float32 number", rows)
    return scores


def as_probabilities(values: object, expected: int, who: str) -> Tensor:
    """Check a judge's output and turn it into a tensor.

    Args:
        values: The judge's output, as in `as_scores`; None or NaN if it has no answer.
        expected: B, the number of pairs.
        who: Name of the judge in messages.

    Returns:
        Probabilities, float32, on the CPU; NaN for a pair without an answer. (B,)

    Raises:
        InputError: There are not B values, or one of them is not a probability.
    """
    entries = _entries(values, expected, who)
    numbers = [math.nan if entry is None else _number(entry, row, who) for row, entry in enumerate(entries)]
    for row, number in enumerate(numbers):
        if not (0 <= number <= 1 or math.isnan(number)):
            raise InputError(
                f"{who} gave {number} for row {row}; the probability that the first completion is better must be "
                f"between 0 and 1"
            )
    return torch.tensor(numbers, dtype=torch.float32)


def _entries(values: object, expected: int, who: str) -> Sequence[object]:
    wanted = f"expected {expected} numbers, one for each completion"
    if values is None:
        raise InputError(f"{who} returned None; {wanted}")
    if hasattr(values, "shape") and hasattr(values, "tolist"):
        if tuple(values.shape) != (expected,):
            raise InputError(f"{who} returned {_kind(values)} of shape {tuple(values.shape)}; {wanted}")
        return list(values.tolist())
    if not isinstance(values, list | tuple):
        raise InputError(f"{who} returned {_kind(values)}; {wanted}, as a list, tensor or numpy array")
    if len(values) != expected:
        raise InputError(f"{who} returned {_kind(values)} of length {len(values)}; {wanted}")
    return values


def _number(entry: object, row: int, who: str) -> float:
    if isinstance(entry, np.generic) or (isinstance(entry, Tensor) and entry.ndim == 0):
        entry = entry.item()
    if not isinstance(entry, Real):
        what = "None" if entry is None else f"{_kind(entry)} ({entry!r:.60})"
        raise InputError(f"{who} gave {what} for row {row}; a score must be a number")
    try:
        return float(entry)
    except OverflowError:
        return math.inf


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
