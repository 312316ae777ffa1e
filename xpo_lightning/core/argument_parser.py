"""Error reporting that all command line parsers share."""

import os
import re
import sys
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from xpo_lightning.core.errors import did_you_mean, exit_with_error, input_error_in

_UNKNOWN_KEY = re.compile(r"(?:unrecognized arguments: --|does not accept option '|^Option ')([\w.]+)")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)$")


class OneLineErrors:
    """Reports wrong arguments in one line, without the usage text; a mixin, listed before the parser class.

    Attributes:
        config_files: The config files on the command line, to say which of them holds a mistyped key.
    """

    config_files: ClassVar[list[str]] = []

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with one line; if bad input caused the error, show only the bad input."""
        cause = input_error_in(ex)
        if cause is None and os.environ.get("JSONARGPARSE_DEBUG"):
            parser: Any = super()
            parser.error(message, ex)
        exit_with_error(str(cause or message + _advice(getattr(ex, "subcommand_parser", None) or self, message)))


def _advice(parser: Any, message: str) -> str:
    """Say where a mistyped key is, and what was probably meant by a mistyped key or class name."""
    unknown_class = _UNKNOWN_CLASS.search(message)
    if unknown_class is not None:
        return did_you_mean(unknown_class[1], sys.modules["xpo_lightning"].__all__)
    found = _UNKNOWN_KEY.search(message)
    if found is None:
        return ""
    keys = {action.dest for action in parser._actions}
    return _file_with(found[1]) + did_you_mean(found[1], keys)


def _file_with(key: str) -> str:
    """Return the config file and line that hold a key; of several files, the last, whose values count."""
    leaf = re.compile(rf"\s*(?:- )?{re.escape(key.rpartition('.')[2])}\s*:")
    for name in reversed(OneLineErrors.config_files):
        path = Path(name)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if leaf.match(line):
                return f" (in {name}, line {number})"
    return ""
