"""What every parser of the command line does with an error."""

import os
import re
import sys
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from xpo_lightning.core.errors import did_you_mean, exit_with_error, input_error_in

_UNKNOWN_KEY = re.compile(r"(?:unrecognized arguments: --|does not accept option '|^Option ')([\w.]+)")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)$")


class OneLineErrors:
    """Says what is wrong with arguments in one line, without a page of usage; goes before a parser among its bases.

    Attributes:
        config_files: The files that the command line names, to say in which of them a mistyped key is.
    """

    config_files: ClassVar[list[str]] = []

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program; of an error that began with bad input, only that is shown."""
        cause = input_error_in(ex)
        if cause is None and os.environ.get("JSONARGPARSE_DEBUG"):
            parser: Any = super()
            parser.error(message, ex)
        exit_with_error(str(cause or message + _advice(getattr(ex, "subcommand_parser", None) or self, message)))


def _advice(parser: Any, message: str) -> str:
    """Say where a mistyped key or class name is, and what was probably meant."""
    unknown_class = _UNKNOWN_CLASS.search(message)
    if unknown_class is not None:
        return did_you_mean(unknown_class[1], sys.modules["xpo_lightning"].__all__)
    found = _UNKNOWN_KEY.search(message)
    if found is None:
        return ""
    keys = {action.dest for action in parser._actions}
    return _file_with(found[1]) + did_you_mean(found[1], keys)


def _file_with(key: str) -> str:
    """Name the config file and the line that have a key; the last file wins, as its values do."""
    leaf = re.compile(rf"\s*(?:- )?{re.escape(key.rpartition('.')[2])}\s*:")
    for name in reversed(OneLineErrors.config_files):
        path = Path(name)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if leaf.match(line):
                return f" (in {name}, line {number})"
    return ""
