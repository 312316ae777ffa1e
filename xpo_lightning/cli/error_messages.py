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


def refuse_values_for_groups(parser: Any, config: Any, file: str = "") -> None:
    """Refuse a value in place of a group of options, which a later option of the group would silently replace.

    Args:
        parser: The parser of a run.
        config: The parsed config.
        file: The file of the config, if any.

    Raises:
        InputError: A group has a value instead of options.
    """
    names = [action.dest for action in parser._actions]
    for action in parser._actions:
        group = action.dest
        if hasattr(action, "_typehint") or not any(name.startswith(f"{group}.") for name in names):
            continue
        value = config.get(group, {})
        if not hasattr(value, "get"):
            raise InputError(
                f"{group} must be a group of options, but is {value!r:.60}" + (f" (in {file})" if file else "")
            )


def reason(error: Exception) -> str:
    """Return why a config cannot be built: the error of the given `class_path`, if there is one, else the full text."""
    problem = re.search(r"Problem with given class_path ('[^']+'):\s*(.+)", str(error))
    return f"{problem[1]}: {problem[2]}" if problem else str(error)
