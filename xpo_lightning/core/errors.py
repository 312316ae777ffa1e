"""The one error that a user's own input can cause, and how a program ends with it."""

import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import NoReturn

LONGEST = 1000  # characters of a line


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


class ConsequentError(NonFiniteError):
    """Numbers that are not finite or not there, maybe because of another process, whose own error then comes first."""


def input_error_in(error: BaseException | None) -> InputError | None:
    """Find the bad input that an error began with."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def describe_error(error: BaseException) -> str:
    """Say what was raised, as `raised ValueError: no grader`; an error without a message is its name alone."""
    message = str(error)
    return f"raised {type(error).__name__}" + (f": {message}" if message else "")


def exit_with_error(message: str) -> NoReturn:
    """End the program with one line."""
    write_line(message)
    raise SystemExit(2) from None


def write_line(message: str) -> None:
    """Write an error in one line."""
    sys.stderr.write(f"xpo: error: {one_line(message)}\n")


def one_line(message: object) -> str:
    """Show a message on one line, a long one without its middle."""
    line = " ".join(str(message).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 300]} ... {line[-290:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Name the known word that is most like an unknown one, ready to follow a sentence; nothing where none is."""
    close = get_close_matches(word, list(known), 1)
    return f"; did you mean '{close[0]}'?" if close else ""
