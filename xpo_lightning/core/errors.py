"""The error for bad user input, and how a program ends with it."""

import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import NoReturn

LONGEST = 1000  # characters of a line


class InputError(ValueError):
    """Bad configuration, data, model or reward output.

    The message is one line for the user: it names the configuration key, the file and the row if they are known, and
    says what to do. The command line prints it without a traceback.
    """


class NonFiniteError(InputError):
    """A number that must be finite is not.

    Args:
        message: Names the source, the number and the row.
        rows: Index of every affected row in its batch.

    Attributes:
        rows: As given.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class ConsequentError(NonFiniteError):
    """Numbers are missing or not finite, perhaps because another process failed; that one's error takes priority."""


def input_error_in(error: BaseException | None) -> InputError | None:
    """Return the first `InputError` in an error's chain of causes, or None."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def describe_error(error: BaseException) -> str:
    """Describe an error, as in `raised ValueError: no grader`; without a message, by its class only."""
    message = str(error)
    return f"raised {type(error).__name__}" + (f": {message}" if message else "")


def exit_with_error(message: str) -> NoReturn:
    """End the program with one line."""
    write_line(message)
    raise SystemExit(2) from None


def write_line(message: str) -> None:
    """Write an error in one line; what is no text, such as bytes of a command line that are not UTF-8, as escapes."""
    line = one_line(message).encode(errors="backslashreplace").decode()
    sys.stderr.write(f"xpo: error: {line}\n")


def one_line(message: object) -> str:
    """Put a message on one line; cut the middle out of a long one."""
    line = " ".join(str(message).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 300]} ... {line[-290:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the known word closest to an unknown one, to be appended to a message; empty if none is close."""
    close = get_close_matches(word, list(known), 1)
    return f"; did you mean '{close[0]}'?" if close else ""
