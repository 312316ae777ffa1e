"""Reads the rows of a data set, given its name."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.paths import existing_path, explaining_hub_errors, is_local, resolve
from xpo_lightning.data.implicit_prompts import PAIR, has_implicit_prompt, with_prompt
from xpo_lightning.data.preference_pairs import as_pair
from xpo_lightning.data.readers import (
    LocatedRow,
    explaining_row,
    load_parquet,
    numbered,
    read_csv,
    read_json,
    read_jsonl,
    stream_parquet,
)
from xpo_lightning.data.reasoning_tasks import PREFIX, read_task

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_TEXT_FILES: dict[str, Callable[[str], Iterator[LocatedRow]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
}
_SPLIT_OF_A_FILE = "train"
_BEGINNING = 2**16  # bytes


@dataclass(frozen=True)
class Source:
    """One split of one data set.

    Args:
        name: Hub id, local path, `package:name/path`, or `reasoning-gym:TASK`.
        split: The split.
        subset: Configuration of a hub data set.
        revision: Version of a hub data set.
        key: The configuration key that holds the name, for errors.
        split_key: The configuration key that holds the split, for errors.
        pair_column: The column with the prompts of preference pairs, if rows are to become such pairs.
        needs_pairs: Whether each row must be a preference pair; if not, other rows stay as they are.
    """

    name: str
    split: str = _SPLIT_OF_A_FILE
    subset: str | None = None
    revision: str | None = None
    key: str = "data.source"
    split_key: str = "data.split"
    pair_column: str | None = None
    needs_pairs: bool = False

    def identity(self) -> dict[str, Any]:
        """Return what tells two sources apart whose rows are not all at hand; of a file, its size and its beginning."""
        path = existing_path(self.name)
        if path is None or not path.is_file():
            return {"source": self.name, "split": self.split, "subset": self.subset, "revision": self.revision}
        with path.open("rb") as file:
            return {"bytes": path.stat().st_size, "beginning": hashlib.sha256(file.read(_BEGINNING)).hexdigest()}


@dataclass(frozen=True)
class Stream(Iterable[LocatedRow]):
    """Rows that are read again in each pass.

    Args:
        start: Starts a pass.
        limit: Stop after this many rows.
    """

    start: Callable[[], Iterator[LocatedRow]]
    limit: int | None = None

    def __iter__(self) -> Iterator[LocatedRow]:
        """Start a pass."""
        return islice(self.start(), self.limit)


@dataclass(frozen=True)
class _LazyRows(Sequence[LocatedRow]):
    """Rows that are made when they are read.

    Args:
        length: Number of rows.
        row: Makes the row of an index.
    """

    length: int
    row: Callable[[int], LocatedRow]

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> LocatedRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LocatedRow]: ...
    def __getitem__(self, index: int | slice) -> LocatedRow | Sequence[LocatedRow]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index >= len(self):  # how iteration over a sequence ends
            raise IndexError(index)
        return self.row(index)


def _arrow_rows(name: str, dataset: "Dataset") -> Sequence[LocatedRow]:
    """Return the rows of a data set, each decoded when it is read."""
    return _LazyRows(len(dataset), partial(_decoded_row, name, dataset))


def _decoded_row(name: str, dataset: "Dataset", index: int) -> LocatedRow:
    where = f"{name}, row {index + 1}"
    with explaining_row(where):
        return where, dataset[index]


def _prompted_row(rows: Sequence[LocatedRow], source: Source, index: int) -> LocatedRow:
    return _prompted(source, rows[index])


def _prompted(source: Source, located: LocatedRow) -> LocatedRow:
    """Give a preference pair its prompt, and take that out of its completions if the source is to have pairs."""
    where, row = located
    if source.pair_column is not None and (source.needs_pairs or row.keys() >= PAIR):
        return where, as_pair(row, source.pair_column, where)
    return where, with_prompt(row, where) if has_implicit_prompt(row.keys()) else row


def read(source: Source) -> Sequence[LocatedRow]:
    """Read all rows: text files into memory, anything else as an Arrow table.

    Raises:
        InputError: There is no such data set or split, or the file is broken.
    """
    rows = _read(source)
    has_pairs = source.pair_column is not None or (len(rows) > 0 and has_implicit_prompt(rows[0][1].keys()))
    return _LazyRows(len(rows), partial(_prompted_row, rows, source)) if has_pairs else rows


def _read(source: Source) -> Sequence[LocatedRow]:
    if source.name.startswith(PREFIX):
        return _task_rows(source)
    path = resolve(source.name, source.key)
    if not is_local(path):
        return _arrow_rows(_label(source), _load_from_hub(source, streaming=False))
    suffix = _checked_suffix(path, source)
    if suffix in _TEXT_FILES:
        return list(_TEXT_FILES[suffix](path))
    if suffix == ".parquet":
        return _arrow_rows(path, load_parquet(path))
    return _arrow_rows(_label(source), _load_from_directory(path, source))


def stream(source: Source, limit: int | None = None) -> Stream:
    """Prepare to read the rows one after the other, without holding them all.

    A `.json` file that is one array is read completely at the start of each pass, as JSON cannot be read in parts.

    Raises:
        InputError: There is no such data set or split. Broken rows are found when they are read.
    """
    rows = _stream(source, limit)
    return Stream(partial(map, partial(_prompted, source), rows))


def _stream(source: Source, limit: int | None) -> Stream:
    if source.name.startswith(PREFIX):
        return Stream(partial(iter, _task_rows(source)), limit)
    path = resolve(source.name, source.key)
    if not is_local(path):
        return Stream(partial(numbered, _label(source), _load_from_hub(source, streaming=True)), limit)
    suffix = _checked_suffix(path, source)
    if suffix in _TEXT_FILES:
        return Stream(partial(_TEXT_FILES[suffix], path), limit)
    if suffix == ".parquet":
        return Stream(partial(stream_parquet, path), limit)
    return Stream(partial(numbered, _label(source), _load_from_directory(path, source)), limit)


def _label(source: Source) -> str:
    return f"{source.name} (split {source.split})"


def _refuse_hub_options(source: Source, what: str) -> None:
    """Refuse options of hub data sets for a source that is none."""
    prefix = source.key.rpartition(".")[0]
    for option, value in (("subset", source.subset), ("revision", source.revision)):
        if value is not None:
            raise InputError(f"{prefix}.{option}: only hub data sets have one, and {source.key} {what}; remove it")


def _task_rows(source: Source) -> list[LocatedRow]:
    _refuse_hub_options(source, f"'{source.name}' is a task")
    if source.split != _SPLIT_OF_A_FILE:
        raise InputError(
            f"{source.split_key}: {source.key} '{source.name}' is a task and has no split '{source.split}'; remove it, "
            f"and give data.validation_source the task with another seed"
        )
    return read_task(source.name, source.key)


def _checked_suffix(path: str, source: Source) -> str:
    _refuse_hub_options(source, f"'{path}' is local")
    if Path(path).is_dir():
        return ""
    suffix = Path(path).suffix.lower()
    if suffix not in {*_TEXT_FILES, ".parquet"}:
        raise InputError(f"{source.key}: '{path}' is no data file; the suffix must be .jsonl, .json, .csv or .parquet")
    if source.split != _SPLIT_OF_A_FILE:
        raise InputError(
            f"{source.split_key}: '{path}' is one file and has no split '{source.split}'; it has {_SPLIT_OF_A_FILE}"
        )
    return suffix


def _load_from_directory(path: str, source: Source) -> "Dataset":
    import datasets  # noqa: PLC0415  (takes a second)
    import pyarrow  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415

    try:
        found: datasets.Dataset | datasets.DatasetDict = datasets.load_from_disk(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{source.key}: the directory '{path}' holds no data set that `save_to_disk` of datasets wrote; "
            f"name a file in it, or another directory"
        ) from error
    except IndexError as error:  # how datasets 5.2 takes a data set without rows
        raise InputError(f"{source.key}: '{path}': there are no rows") from error
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{source.key}: the data set in '{path}' cannot be read ({_one_line(error)})") from error
    splits = found if isinstance(found, datasets.DatasetDict) else {_SPLIT_OF_A_FILE: found}
    if source.split not in splits:
        existing = ", ".join(map(str, splits))
        raise InputError(f"{source.split_key}: '{path}' has no split '{source.split}'; it has {existing}")
    return splits[source.split]


def _load_from_hub(source: Source, streaming: bool) -> "Dataset | IterableDataset":
    import datasets  # noqa: PLC0415  (takes a second)

    with explaining_hub_errors(source.name, source.key):
        try:
            return datasets.load_dataset(
                source.name, source.subset, split=source.split, revision=source.revision, streaming=streaming
            )
        except ValueError as error:
            if "split" in str(error):
                raise InputError(f"{source.split_key}: '{source.name}': {_one_line(error)}") from error
            if "config" in str(error).lower():
                raise InputError(f"data.subset: '{source.name}': {_one_line(error)}") from error
            raise
        except (datasets.exceptions.DatasetsError, RuntimeError) as error:
            if isinstance(error, OSError):
                raise
            raise InputError(f"{source.key}: '{source.name}' cannot be read ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
