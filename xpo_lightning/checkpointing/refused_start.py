"""Removes what a start leaves that was refused: an empty folder, or one with nothing but its config."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch import Trainer

from xpo_lightning.checkpointing import run_lock
from xpo_lightning.checkpointing.io import is_remote
from xpo_lightning.checkpointing.resume import VersionedLogger
from xpo_lightning.core.atomic_files import remove
from xpo_lightning.core.run_folders import CONFIG

OF_A_START = {CONFIG, "start.json", "hparams.yaml", run_lock.FILE_NAME}
"""Files that are written before the first validation and the first step."""


@contextmanager
def removing_refused_start(trainer: Trainer) -> Iterator[None]:
    """Run inside; if that fails before anything was measured or saved, remove the folders that it made.

    Args:
        trainer: The trainer, whose loggers have not begun.
    """
    loggers = [one for one in trainer.loggers if isinstance(one, VersionedLogger) and not is_remote(one.root_dir)]
    roots = [Path(folder).absolute() for folder in (*(one.root_dir for one in loggers), trainer.default_root_dir)]
    there = {path for root in roots for path in (root, *root.parents, *_inside(root)) if path.exists()}
    try:
        yield
    except BaseException:
        if trainer.is_global_zero:  # A version is chosen when a folder is made; other runs may have made theirs since.
            own = [Path(one.log_dir).absolute() for one in loggers if one._version is not None]
            for folder in (*own, *roots):
                _clean(folder, there)
        raise


def _inside(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []


def _clean(folder: Path, there: set[Path]) -> None:
    """Remove a new folder that holds nothing but files of a start, and new folders around it that are empty then."""
    if folder in there:
        return
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= OF_A_START:
        remove(folder)
    for parent in folder.parents:
        if parent in there:
            return
        with suppress(OSError):  # It is not empty, or is gone already.
            parent.rmdir()
