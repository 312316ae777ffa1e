"""Compares the arguments of a call from Python with their types, as the command line does with what it parses."""

import collections.abc
import types
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.option_kinds import in_words, kinds_of


def check_arguments(function: Any, arguments: Mapping[str, Any], prefix: str) -> None:
    """Refuse an argument of another type than the function's annotation says, a number as text above all.

    Args:
        function: The function.
        arguments: Its arguments by name; other names are left out of account.
        prefix: What the message puts before a name, for example `model.`.

    Raises:
        InputError: An argument has another type; the message names it.
    """
    hints = get_type_hints(function)
    for name, value in arguments.items():
        if name in hints and not fits(value, hints[name]):
            wanted = in_words(kinds_of(hints[name]))
            raise InputError(f"{prefix}{name} must be {wanted}, but is {value!r:.60}, a {type(value).__name__}")


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value has a type, as far as types of options go."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is collections.abc.Callable:
        return callable(value)
    if origin in (list, Sequence, Iterable):
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
