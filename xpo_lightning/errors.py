"""The one error that a user's own input can cause."""

from collections.abc import Sequence


class InputError(ValueError):
    """Bad configuration, data, model or reward output.

    The message is one line for the person who wrote the input: it names the configuration key, the file and the row
    where they are known, and says what to do. The command line prints it without a traceback.
    """


class NonFiniteError(InputError):
    """Numbers that must be finite, and are not.

    Args:
        message: What gave which number, and for which row.
        rows: Every row concerned, by its place in what was computed together.

    Attributes:
        rows: As given.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)
