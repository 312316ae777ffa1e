"""Errors as a person at the command line sees them: one line, and the option that it is about."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException

from xpo_lightning.core.errors import InputError, input_error_in


@contextmanager
def explaining_trainer_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn what Lightning says of its options into an `InputError`; other kinds of errors too, where they are given."""
    handled: tuple[type[Exception], ...] = (MisconfigurationException, *kinds)
    try:
        yield
    except handled as error:
        raise (input_error_in(error) or InputError(f"trainer: {error}")) from error


def refuse_nulls(parser: Any, config: Any) -> None:
    """Refuse null where an option has no meaning for it; jsonargparse takes it everywhere.

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
    """Refuse a value where a group of options belongs; what sets one of its options would take its place unseen.

    Args:
        parser: The parser of a run.
        config: What it has parsed.
        file: The file that this is in, if any.

    Raises:
        InputError: There is such a value.
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
    """Say why a config cannot be built: of all that the parser tried, the class that was named and refused, if any."""
    problem = re.search(r"Problem with given class_path ('[^']+'):\s*(.+)", str(error))
    return f"{problem[1]}: {problem[2]}" if problem else str(error)
