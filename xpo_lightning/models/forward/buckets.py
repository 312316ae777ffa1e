"""Rounds batch sizes up to a few buckets, because a step is captured for each size."""

FEW_ROWS, COLUMNS = 64, 128
"""Rows are rounded up to a power of two, above FEW_ROWS to a multiple of it; columns, to a multiple of COLUMNS."""


def rows_of_bucket(rows: int) -> int:
    """Round a number of rows up to its bucket."""
    return 1 << (rows - 1).bit_length() if rows <= FEW_ROWS else -(-rows // FEW_ROWS) * FEW_ROWS


def columns_of_bucket(columns: int) -> int:
    """Round a number of columns up to its bucket."""
    return -(-columns // COLUMNS) * COLUMNS
