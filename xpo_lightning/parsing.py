"""What every parser of the command line does with an error."""

import os
from typing import Any, NoReturn

from xpo_lightning.complaints import input_error_in, stop


class OneLineErrors:
    """Says what is wrong with arguments in one line, without a page of usage; goes before a parser among its bases."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program; of an error that began with bad input, only that is shown."""
        cause = input_error_in(ex)
        if cause is None and os.environ.get("JSONARGPARSE_DEBUG"):
            parser: Any = super()
            parser.error(message, ex)
        stop(str(cause or message))
