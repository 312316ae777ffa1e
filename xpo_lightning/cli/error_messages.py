"""Turns errors into one line for the command line, which names the option that is wrong."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException

from xpo_lightning.core.errors import InputError, input_error_in


@contextmanager
def explaining_trainer_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn Lightning's errors about its options, and errors of the given kinds, into an `InputError`."""
    handled: tuple[type[Exception], ...] = (MisconfigurationException, *kinds)
    try:
        yield
    except handled as error:
        raise (input_error_in(error) or InputError(f"trainer: {error}")) from error


def refuse_nulls(parser: Any, config: Any) -> None:
    """Refuse null for options that do not allow it; jsonargparse accepts it everywhere.

    Raises:
        InputError: An option is null.
    """
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint in (None, Any) or type(None) in get_args(hint) or action.default is None:
            continue
        if config.get(action.dest, 0) is None:
            raise InputError(f"{action.dest} must not be null; remove the line, to take the default")


def reason(error: Exception) -> str:
    """Return why a config cannot be built: the error of the given `class_path`, if there is one, else the full text."""
    problem = re.search(r"Problem with given class_path ('[^']+'):\s*(.+)", str(error))
    return f"{problem[1]}: {problem[2]}" if problem else str(error)


_JARGON = {
    r"^Parser key \"([^\"]*)\":": r"\1:",
    r"- Expected a path but .*? either not accessible or invalid\s*": "",
    r"Does not validate against any of the Union subtypes\s+Subtypes: .*?Errors:": "",
    r"Subclass types expect one of:.*?(?=Given value|$)": "",
    r"Given value type: .*?(?=Given value:|$)": "",
    r"Type collections\.abc\.Callable\[.*?\] expects a function or a callable class:": "there is no such function:",
    r"<class '(?:[\w.]*\.)?(\w+)'>": r"\1",
}


def plain(message: str) -> str:
    """Put a message of the parser into plain words: without its types, and without all that it tried."""
    message = reason(ValueError(message))
    for jargon, words in _JARGON.items():
        message = re.sub(jargon, words, message, flags=re.DOTALL)
    return message.strip()
