"""Rows of local files, each with the place where it stands, so that an error can name file and row."""

import csv
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped,unused-ignore]
from datasets import Dataset

from xpo_lightning.errors import InputError

Row = dict[str, Any]
Located = tuple[str, Row]
"""A row, preceded by its place: `("prompts.jsonl, line 3", {"prompt": "..."})`."""


def read_jsonl(path: str) -> Iterator[Located]:
    """Read one JSON object a line. Blank lines are skipped, but counted."""
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _checked_row(_parse_json(line, where), where)


def read_json(path: str) -> Iterator[Located]:
    """Read a JSON array of objects, or one object a line."""
    first = next((line.lstrip() for _, line in _lines(path) if line.strip()), "")
    if not first.startswith("["):
        yield from read_jsonl(path)
        return
    text = "".join(line for _, line in _lines(path))
    for number, row in enumerate(_parse_json(text, path), 1):
        where = f"{path}, row {number}"
        yield where, _checked_row(row, where)


def read_csv(path: str) -> Iterator[Located]:
    """Read a comma-separated file whose first line names the columns. Every value is text, as the file has it."""
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


def stream_parquet(path: str) -> Iterator[Located]:
    """Read a Parquet file a batch of rows at a time."""
    numbers = count(1)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in Dataset(pyarrow.Table.from_batches([batch])):
                    yield f"{path}, row {next(numbers)}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable_parquet(path, error) from error


def load_parquet(path: str) -> Dataset:
    """Read a Parquet file into memory.

    The Arrow table is read directly: `Dataset.from_parquet` would first copy it into the Hugging Face cache.
    """
    try:
        return Dataset(pyarrow.parquet.read_table(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable_parquet(path, error) from error


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
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise InputError(f"{where}: broken JSON ({error.msg} at {place})") from error


def _checked_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object that maps columns to values, but got {row!r:.60}")
    return row


def _checked_header(header: list[str], path: str) -> list[str]:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{path}, line 1: the header names {', '.join(map(repr, twice))} more than once")
    return header


def _unreadable_parquet(path: str, error: Exception) -> InputError:
    return InputError(f"{path}: the file cannot be read as Parquet ({' '.join(str(error).split())[:160]})")
