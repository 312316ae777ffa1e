"""SQLite files that are opened for each use anew, so that nothing is left open anywhere."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from xpo_lightning.core.errors import InputError


@contextmanager
def opened(path: Path, unusable: Callable[[Exception], InputError]) -> Iterator[sqlite3.Connection]:
    """Lend a connection; what is written comes into the file as a whole, or not at all.

    Args:
        path: The file; it is made where there is none.
        unusable: Makes the error that is raised where SQLite cannot use it.

    Raises:
        InputError: That error.
    """
    try:
        with closing(sqlite3.connect(path, timeout=60)) as connection, connection:
            yield connection
    except sqlite3.Error as error:
        raise unusable(error) from error
