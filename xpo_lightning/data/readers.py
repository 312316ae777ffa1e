"""Reads rows of files, each with its location, so that an error can name file and row."""

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpo_lightning.core.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
LocatedRow = tuple[str, Row]
"""A row, preceded by its location: `("prompts.jsonl, line 3", {"prompt": "..."})`."""


def read_jsonl(path: str) -> Iterator[LocatedRow]:
    """Read one JSON object per line. Blank lines are skipped, but counted."""
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _checked_row(_parse_json(line, where), where)


def read_json(path: str) -> Iterator[LocatedRow]:
    """Read a JSON array of objects, or one object per line."""
    first = next((line.lstrip() for _, line in _lines(path) if line.strip()), "")
    if not first.startswith("["):
        yield from read_jsonl(path)
        return
    text = "".join(line for _, line in _lines(path))
    for number, row in enumerate(_parse_json(text, path), 1):
        where = f"{path}, row {number}"
        yield where, _checked_row(row, where)


def read_csv(path: str) -> Iterator[LocatedRow]:
    """Read a comma-separated file whose first line names the columns. Every value stays text."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    numbers = count(1)
    header: list[str] | None = None
    try:
        for values in reader:
            if not values:
                continue
            if header is None:
                header = _checked_header(values, path)
            elif len(values) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num}: the header names {len(header)} columns, "
                    f"but this row has {len(values)} values; put values that contain commas in double quotes"
                )
            else:
                yield f"{path}, row {next(numbers)}", dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: the file cannot be parsed as CSV ({error})") from error


def stream_parquet(path: str) -> Iterator[LocatedRow]:
    """Read a Parquet file, one batch of rows at a time."""
    import pyarrow.parquet  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415  (takes a second)
    from datasets import Dataset  # noqa: PLC0415

    with explaining_parquet(path):
        file = pyarrow.parquet.ParquetFile(path)
    with file:
        tables = (pyarrow.Table.from_batches([batch]) for batch in file.iter_batches())
        yield from numbered(path, chain.from_iterable(map(Dataset, tables)))


def load_parquet(path: str) -> "Dataset":
    """Read a Parquet file into memory.

    The Arrow table is read directly: `Dataset.from_parquet` would first copy it into the Hugging Face cache.
    """
    import pyarrow.parquet  # noqa: PLC0415  (takes a second)
    from datasets import Dataset  # noqa: PLC0415

    with explaining_parquet(path):
        return Dataset(pyarrow.parquet.read_table(path))


def numbered(name: str, rows: Iterable[Row]) -> Iterator[LocatedRow]:
    """Yield rows one after the other, each with its location.

    Raises:
        InputError: A row cannot be read or decoded.
    """
    left = iter(rows)
    for number in count(1):
        where = f"{name}, row {number}"
        with explaining_row(where):
            row = next(left, None)
        if row is None:
            return
        yield where, row


# Damaged bytes and odd metadata make readers raise errors of every kind, so both of these catch them all.


@contextmanager
def explaining_row(where: str) -> Iterator[None]:
    """Raise an `InputError` that names the row if it cannot be read; it may hold invalid UTF-8 or an odd time, say."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{where}: the row cannot be read ({_reason(error)})") from error


@contextmanager
def explaining_parquet(path: str) -> Iterator[None]:
    """Raise an `InputError` that names the file if it cannot be read."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{path}: the file cannot be read as Parquet ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _lines(path: str) -> Iterator[tuple[int, str]]:
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: not valid UTF-8 ({error.reason}); save the file as UTF-8"
                ) from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise InputError(f"{where}: broken JSON ({error.msg} at {place})") from error
    except RecursionError as error:
        raise InputError(f"{where}: the JSON is nested too deeply to be read") from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits.
        raise InputError(f"{where}: the JSON cannot be read ({error})") from error


def _checked_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object that maps columns to values, but got {row!r:.60}")
    return row


def _checked_header(header: list[str], path: str) -> list[str]:
    if len(header) == 1:
        for separator in (";", "\t", "|"):
            if separator in header[0]:
                raise InputError(
                    f"{path}, line 1: the columns are separated by {separator!r}, and are read only if separated by "
                    f"commas; save the file with commas, or as .jsonl"
                )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{path}, line 1: the header names {', '.join(map(repr, twice)):.300} more than once")
    return header
