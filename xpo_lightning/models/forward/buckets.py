"""Sizes that batches are rounded up to where a step is captured for each size."""

FEW_ROWS, COLUMNS = 64, 128
"""Up to so many rows the next power of two is taken, beyond a multiple of it; columns are a multiple of theirs."""


def rows_of_bucket(rows: int) -> int:
    """Return the rows that are computed where so many are wanted."""
    return 1 << (rows - 1).bit_length() if rows <= FEW_ROWS else -(-rows // FEW_ROWS) * FEW_ROWS


def columns_of_bucket(columns: int) -> int:
    """Return the columns that are there where so many are needed."""
    return -(-columns // COLUMNS) * COLUMNS
