"""Entry point of `xpo`: runs verbs that need no models without importing the libraries that take seconds to load."""

import logging
import os
import sys
from importlib import import_module

from xpo_lightning.cli import dispatch, known_options, mistakes
from xpo_lightning.cli.thread_waiting import OtherProcesses, choose_waiting
from xpo_lightning.core.errors import InputError, exit_with_error
from xpo_lightning.core.recipes import with_config_files


def main() -> None:
    """Run the command line."""
    # peft imports bitsandbytes if it is installed, which warns at each start about an optional speed-up for CPUs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
    words = sys.argv[1:]
    others = OtherProcesses()
    try:
        if dispatch.is_answered(words):
            return
        known = known_options.shipped(words[0])
        if known is not None:  # The same check, without the seconds that it takes to import what is checked.
            mistakes.check(with_config_files(words)[0], known)
        if words[0] in dispatch.LIGHT:
            dispatch.run(words[0], words[1:])
            return
    except InputError as error:
        exit_with_error(str(error))
    os.environ.update(choose_waiting(others))
    import_module("xpo_lightning.cli.lightning_cli").main()
