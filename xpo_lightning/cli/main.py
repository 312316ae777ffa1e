"""Entry point of `xpo`: runs verbs that need no models without importing the libraries that take seconds to load."""

import logging
import sys
from importlib import import_module

from xpo_lightning.cli import dispatch
from xpo_lightning.core.errors import InputError, exit_with_error


def main() -> None:
    """Run the command line."""
    # peft imports bitsandbytes if it is installed, which warns at each start about an optional speed-up for CPUs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
    words = sys.argv[1:]
    if dispatch.is_answered(words):
        return
    if words[0] not in dispatch.LIGHT:
        import_module("xpo_lightning.cli.lightning_cli").main()
        return
    try:
        dispatch.run(words[0], words[1:])
    except InputError as error:
        exit_with_error(str(error))
