"""Text for a terminal: lines in columns, and text from models, whose control characters must not steer it."""

from collections.abc import Iterable


def aligned(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each name and its text; the texts begin in one column."""
    pairs = list(lines)
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{name:{width}}  {text}" for name, text in pairs]


def printable(text: str, keep: str = "\n") -> str:
    """Replace control characters, except those to keep, by the replacement character, and tabs by spaces."""
    return "".join(sign if sign.isprintable() or sign in keep else "\ufffd" for sign in text.replace("\t", " "))


def with_escapes(text: str) -> str:
    """Write control characters, except line breaks and tabs, as escapes."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else ascii(sign)[1:-1] for sign in text)
