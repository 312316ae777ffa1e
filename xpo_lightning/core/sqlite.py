"""Opens SQLite files anew for each use, so that none stays open."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from xpo_lightning.core.errors import InputError


@contextmanager
def opened(path: Path, unusable: Callable[[Exception], InputError]) -> Iterator[sqlite3.Connection]:
    """Yield a connection whose writes are one transaction: the file gets all of them or none.

    Args:
        path: The file; it is created if it does not exist.
        unusable: Makes the error to raise if SQLite cannot use the file.

    Raises:
        InputError: SQLite cannot use the file.
    """
    try:
        with closing(sqlite3.connect(path, timeout=60)) as connection, connection:
            yield connection
    except sqlite3.Error as error:
        raise unusable(error) from error
