"""Stores numbered lines, in memory or in a file; the last lines can be removed again."""

import glob
import hashlib
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path

from xpo_lightning.core.atomic_files import clear_leftovers, explaining_write_errors, part_of
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.sqlite import opened

Sizes = list[tuple[int, int]]
"""Tokens of each prompt, and of the longer one of its completions."""


class PairStore(ABC):
    """Keeps lines by number; the first line ever added has number 0.

    Attributes:
        begin: Number of the first kept line.
        sizes: For the pair of each kept line, the tokens of its prompt and of its longer completion.
    """

    def __init__(self) -> None:
        self.begin = 0
        self.sizes: Sizes = []

    @property
    def end(self) -> int:
        """Number of the next line."""
        return self.begin + len(self.sizes)

    def append(self, lines: Sequence[str], sizes: Sizes) -> None:
        """Add lines at the end."""
        self._write(self.end, lines, sizes)
        self.sizes = self.sizes + sizes

    def keep(self, begin: int, end: int) -> None:
        """Forget all lines but those from number `begin` to before `end`."""
        self.sizes = self.sizes[begin - self.begin : end - self.begin]
        self._forget(begin, end)
        self.begin = begin

    @abstractmethod
    def get(self, numbers: Sequence[int]) -> list[str]:
        """Return the lines of these numbers."""

    def digest(self, end: int) -> str:
        """Hash the line before number `end`, to recognise the file of another run; "" if no such line is kept."""
        return hashlib.sha256(self.get([end - 1])[0].encode()).hexdigest() if end > self.begin else ""

    @abstractmethod
    def _write(self, number: int, lines: Sequence[str], sizes: Sizes) -> None: ...

    @abstractmethod
    def _forget(self, begin: int, end: int) -> None: ...


class MemoryStore(PairStore):
    """Lines in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def get(self, numbers: Sequence[int]) -> list[str]:
        """See `PairStore.get`."""
        return [self.lines[number - self.begin] for number in numbers]

    def _write(self, number: int, lines: Sequence[str], sizes: Sizes) -> None:
        self.lines = self.lines + list(lines)

    def _forget(self, begin: int, end: int) -> None:
        self.lines = self.lines[begin - self.begin : end - self.begin]


class FileStore(PairStore):
    """Lines in an SQLite file.

    It never deletes lines before `begin` from the file, because a run may resume from an earlier checkpoint.

    Args:
        path: The file; created if it does not exist.
        begin: Number of the first line to use.

    Raises:
        InputError: The file cannot be used.
    """

    def __init__(self, path: Path, begin: int = 0) -> None:
        super().__init__()
        self.path, self.begin = path, begin
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        with self._open() as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS pairs (number INTEGER PRIMARY KEY, prompt INT, completion INT, line TEXT)"
            )
            wanted = "SELECT prompt, completion FROM pairs WHERE number >= ? ORDER BY number"
            self.sizes = connection.execute(wanted, (begin,)).fetchall()
        if not all(isinstance(size, int) and size >= 0 for pair in self.sizes for size in pair):
            raise self._unusable(ValueError("the size of a pair is damaged"))

    def copied(self, path: Path) -> "FileStore":
        """Copy all lines into another file, which appears only when complete, and return its store."""
        clear_leftovers(path.parent, glob.escape(path.name))
        part = part_of(path)
        FileStore(part)  # Creates the folder.
        with explaining_write_errors(path):
            with self._open() as connection, closing(sqlite3.connect(part)) as copy:
                connection.backup(copy)
            part.replace(path)
        return FileStore(path, self.begin)

    def get(self, numbers: Sequence[int]) -> list[str]:
        """See `PairStore.get`."""
        with self._open() as connection:
            select = "SELECT line FROM pairs WHERE number = ?"
            found = [connection.execute(select, (one,)).fetchone() for one in numbers]
        lines = [row[0] for row in found if row is not None and isinstance(row[0], str)]
        if len(lines) < len(numbers):
            raise self._unusable(ValueError("a pair is missing or damaged"))
        return lines

    def _write(self, number: int, lines: Sequence[str], sizes: Sizes) -> None:
        rows = [(number + row, *sizes[row], line) for row, line in enumerate(lines)]
        with self._open() as connection:
            connection.executemany("INSERT OR REPLACE INTO pairs VALUES (?, ?, ?, ?)", rows)

    def _forget(self, begin: int, end: int) -> None:
        with self._open() as connection:
            connection.execute("DELETE FROM pairs WHERE number >= ?", (end,))

    def _unusable(self, error: Exception) -> InputError:
        return InputError(
            f"model.buffer: '{self.path}' cannot be used ({error}); see that its folder can be written, or "
            f"raise model.buffer.memory_pairs"
        )

    def _open(self) -> AbstractContextManager[sqlite3.Connection]:
        return opened(self.path, self._unusable)
