"""Silences what other libraries print at each start and that says nothing of the run."""

import logging
import os

from transformers.utils.logging import disable_progress_bar

_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
_BANNERS = ("GPU available:", "TPU available:", "HPU available:", "💡 Tip:", "Seed set to", "Using bfloat16 Automatic")


def silence_banners() -> None:
    """Leave out the banners and tips of Lightning and the loading bars of transformers, unless `XPO_DEBUG` is set."""
    if os.environ.get("XPO_DEBUG"):
        return
    disable_progress_bar()
    for name in (*_LOGGERS, "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_no_banner)


def _is_no_banner(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_BANNERS)
