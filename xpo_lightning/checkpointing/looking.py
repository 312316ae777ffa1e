"""Lets `validate` and `predict` write into the folder of the run that they look at, instead of opening a version."""

from pathlib import Path

from lightning.pytorch import Trainer

from xpo_lightning.checkpointing.csv_logger import ResumableCSVLogger
from xpo_lightning.checkpointing.io import is_remote
from xpo_lightning.checkpointing.resume import WORDS, VersionedLogger
from xpo_lightning.core.run_folders import run_of_checkpoint


def write_beside_the_run(trainer: Trainer, verb: str, checkpoint: str | None) -> None:
    """Let the loggers, and all that writes into the run's folder, use a folder named for the verb in it.

    Without a checkpoint of a run, that folder is in the loggers' own. `metrics.csv` gets a row for each validation.

    Args:
        trainer: The trainer, whose loggers have not begun.
        verb: `validate` or `predict`.
        checkpoint: The checkpoint that is looked at.
    """
    is_local = checkpoint is not None and checkpoint not in WORDS and not is_remote(checkpoint)
    run = run_of_checkpoint(Path(str(checkpoint))) if is_local else None
    for logger in trainer.loggers:
        if isinstance(logger, VersionedLogger) and not is_remote(logger.root_dir):
            folder = str(run or logger.root_dir)
            vars(logger).update(_save_dir=folder, _root_dir=folder, _name="", _version=verb)
        if isinstance(logger, ResumableCSVLogger):
            logger.appends = True
    if not trainer.loggers and not is_remote(trainer.default_root_dir):
        vars(trainer)["_default_root_dir"] = str(Path(run or trainer.default_root_dir) / verb)
