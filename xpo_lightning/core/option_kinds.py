"""What an option takes: read from its type, put into words, and compared with what a user wrote.

A kind is a short text, so that a table of options can be kept in a file: `int`, `float`, `bool`, `str`, `null`, `any`,
`mapping`, `list <kind>`, `class <name>`, or a word that is allowed, in quotes.
"""

import re
import types
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_SIMPLE = {int: "int", float: "float", bool: "bool", str: "str", type(None): "null", Any: "any"}
_SIMPLE |= {Path: "str", timedelta: "any", dict: "mapping"}
_IN_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "any": "anything"}
_IN_WORDS |= {"mapping": "a mapping"}
_SCALARS = {
    "int": re.compile(r"[-+]?(\d[\d_]*|0x[\da-fA-F]+|0b[01]+)"),
    "float": re.compile(r"[-+]?((\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)?|\.inf|\.nan|inf|nan)", re.IGNORECASE),
    "bool": re.compile(r"true|false|yes|no|on|off", re.IGNORECASE),
    "null": re.compile(r"|~|null", re.IGNORECASE),
}


def kinds_of(hint: Any) -> list[str]:
    """Return the kinds of value that a type allows."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _SIMPLE:
        return [_SIMPLE[hint]]
    if origin is Literal:
        return [f"'{value}'" for value in inner]
    if origin in (Union, types.UnionType):
        return list(dict.fromkeys(kind for one in inner for kind in kinds_of(one)))
    if origin in (list, Iterable, Sequence, tuple, set):
        return [f"list {kind}" for kind in kinds_of(inner[0])] if inner else ["list any"]
    if origin is dict:
        return ["mapping"]
    if origin is Callable:
        made = kinds_of(inner[-1])
        return made if made[0].startswith("class ") else ["any"]
    return [f"class {hint.__name__}"] if isinstance(hint, type) else ["any"]


def classes_in(kinds: Iterable[str]) -> list[str]:
    """Return the names of the classes among kinds."""
    return [kind.removeprefix("class ") for kind in kinds if kind.startswith("class ")]


def elements_of(kinds: Iterable[str]) -> list[str]:
    """Return the kinds that the elements of a list may have."""
    return [kind.removeprefix("list ") for kind in kinds if kind.startswith("list ")]


def in_words(kinds: Sequence[str]) -> str:
    """Say what an option takes, for example `a number, a list of numbers or a Schedule`."""
    ordered = sorted(kinds, key=lambda kind: (kind == "null", "class " in kind))
    words = list(dict.fromkeys(map(_words_of, ordered)))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _words_of(kind: str) -> str:
    if kind.startswith("list "):
        one = _words_of(kind.removeprefix("list "))
        return f"a list of {one.removeprefix('a ') + 's' if one.startswith('a ') else one}"
    if kind.startswith("class "):
        name = kind.removeprefix("class ")
        return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
    return _IN_WORDS.get(kind, kind.strip("'"))


def takes_word(kinds: Iterable[str], word: str) -> bool:
    """Tell whether a word or number could be a value of these kinds; classes and lists are left out of account."""
    return any(
        kind in ("str", "any") or kind == f"'{word}'" or (kind in _SCALARS and _SCALARS[kind].fullmatch(word))
        for kind in kinds
    )
