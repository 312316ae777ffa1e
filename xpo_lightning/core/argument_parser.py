"""Error reporting that all command line parsers share."""

import os
import re
import sys
from typing import Any, NoReturn

from xpo_lightning.core.errors import did_you_mean, exit_with_error, input_error_in

_UNKNOWN_KEY = re.compile(r"(?:unrecognized arguments: --|does not accept option '|^Option ')([\w.]+)")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)$")


class OneLineErrors:
    """Reports wrong arguments in one line, without the usage text; a mixin, listed before the parser class."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with one line; if bad input caused the error, show only the bad input."""
        cause = input_error_in(ex)
        if cause is None and os.environ.get("JSONARGPARSE_DEBUG"):
            parser: Any = super()
            parser.error(message, ex)
        exit_with_error(str(cause or message + _advice(getattr(ex, "subcommand_parser", None) or self, message)))


def _advice(parser: Any, message: str) -> str:
    """Say what was probably meant by a mistyped key or class name."""
    unknown_class = _UNKNOWN_CLASS.search(message)
    if unknown_class is not None:
        return did_you_mean(unknown_class[1], sys.modules["xpo_lightning"].__all__)
    found = _UNKNOWN_KEY.search(message)
    if found is None:
        return ""
    keys = {action.dest for action in parser._actions}
    return did_you_mean(found[1], keys)
