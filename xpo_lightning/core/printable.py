"""Text from models for a terminal: control characters must not be able to steer it."""


def printable(text: str, keep: str = "\n") -> str:
    """Replace control characters, except those to keep, by the replacement character, and tabs by spaces."""
    return "".join(sign if sign.isprintable() or sign in keep else "\ufffd" for sign in text.replace("\t", " "))


def with_escapes(text: str) -> str:
    """Write control characters, except line breaks and tabs, as escapes."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else ascii(sign)[1:-1] for sign in text)
