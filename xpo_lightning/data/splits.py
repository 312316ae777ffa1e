"""Subsets of a data set: its first rows, or rows held out for validation."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from xpo_lightning.core.errors import InputError
from xpo_lightning.data.readers import LocatedRow


@dataclass(frozen=True)
class RowSubset(Sequence[LocatedRow]):
    """A subset of rows.

    Args:
        rows: All rows.
        indices: Indices of the subset's rows, in order.
    """

    rows: Sequence[LocatedRow]
    indices: Sequence[int]

    def __len__(self) -> int:
        """Return the number of chosen rows."""
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> LocatedRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LocatedRow]: ...
    def __getitem__(self, index: int | slice) -> LocatedRow | Sequence[LocatedRow]:
        """Return one row, or a subset of these rows."""
        if isinstance(index, slice):
            return RowSubset(self.rows, self.indices[index])
        return self.rows[self.indices[index]]


def first_rows(rows: Sequence[LocatedRow], limit: int | None) -> Sequence[LocatedRow]:
    """Return the first `limit` rows, or all if it is None."""
    return RowSubset(rows, range(len(rows))[:limit])


def hold_out(rows: Sequence[LocatedRow], size: int | float, seed: int) -> tuple[RowSubset, RowSubset]:
    """Split rows at random into those to train on and those held out, each in the order of the file.

    Args:
        rows: The rows.
        size: How many rows to hold out or, if it is a float, their share.
        seed: Seed of the choice.

    Raises:
        InputError: No row would be held out, or none left.
    """
    number = round(size * len(rows)) if isinstance(size, float) else size
    if not 0 < number < len(rows):
        raise InputError(
            f"data.validation_size: {size} of {len(rows)} rows would hold out {number}; "
            f"it must leave at least one row for training and one for validation"
        )
    held_out = set(random.Random(seed).sample(range(len(rows)), number))
    kept = [index for index in range(len(rows)) if index not in held_out]
    return RowSubset(rows, kept), RowSubset(rows, sorted(held_out))
