"""A run that goes on in the folder where it was stopped."""

import re
import warnings
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from xpo_lightning.run_folder.csv_logger import ResumableCSVLogger

VersionedLogger = CSVLogger | TensorBoardLogger


def make_resumable(trainer: Trainer) -> None:
    """Let Lightning's own CSV loggers go on with their file, as `ResumableCSVLogger` does; they would delete it."""
    for logger in trainer.loggers:
        if type(logger) is CSVLogger and "://" not in logger.root_dir:
            logger.__class__ = ResumableCSVLogger  # It has the same attributes, and no experiment yet.


def continue_run(trainer: Trainer, checkpoint: Path) -> None:
    """Let the loggers go on in the version folder that a checkpoint is in, if it is in one of theirs.

    Lightning restores the state of `ModelCheckpoint` (which file is the best, and which to remove next) only there.

    Args:
        trainer: Its loggers have not begun.
        checkpoint: The file.
    """
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    folder = checkpoint.parent.parent.name
    number = re.fullmatch(r"version_(\d+)", folder)
    for logger in trainer.loggers:
        if number and isinstance(logger, VersionedLogger) and (Path(logger.root_dir) / folder).is_dir():
            logger._version = int(number[1]) if logger._version is None else logger._version


def version_folder(logger: VersionedLogger) -> str | None:
    """Name the folder of the version that the config asks for; asking the logger would give it a new one."""
    version = logger._version
    return f"version_{version}" if isinstance(version, int) else version
