"""Helpers that callbacks share: the run's folder, and which validations count."""

from collections.abc import Mapping
from pathlib import Path

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.text import Text

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.printable import aligned
from xpo_lightning.module import XPOLightningModule


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run's files: the first logger's, or the trainer's root folder without one (collective).

    `setup` is a good place to call it, since all ranks run that.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def folder_id(folder: str | Path) -> str:
    """Return the absolute path of a folder, for `goes_on_in`."""
    return str(Path(folder).resolve())


def goes_on_in(folder: str | Path, saved: str, trainer: Trainer) -> bool:
    """Tell whether a resumed run continues in the folder that it had when its checkpoint was written.

    Args:
        folder: The run's folder now.
        saved: `folder_id` of the run's folder when the checkpoint was written.
        trainer: Gives the checkpoint's path: the folder may have been moved with the checkpoint in it.
    """
    here = Path(folder).resolve()
    return saved == str(here) or here in Path(trainer.ckpt_path or "").resolve().parents


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Tell whether this run is a `trainer.fast_dev_run`, which leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def runs_whole_sanity_check(trainer: Trainer) -> bool:
    """Tell whether the sanity check uses all validation data, as with `num_sanity_val_steps: -1`."""
    return trainer.num_sanity_val_steps == float("inf")


def counts_as_validation(trainer: Trainer) -> bool:
    """Tell whether the current validation uses all validation data, and is not just a short sanity check."""
    return not trainer.sanity_checking or runs_whole_sanity_check(trainer)


def our_module(callback: Callback, module: LightningModule) -> XPOLightningModule:
    """Return the module for a callback that works with no other.

    Raises:
        InputError: The module is no `XPOLightningModule`.
    """
    if not isinstance(module, XPOLightningModule):
        name = type(callback).__name__
        raise InputError(f"trainer.callbacks: {name} needs an XPOLightningModule, not {type(module).__name__}")
    return module


def print_line(text: str) -> None:
    """Print a line above the progress bar, without interpreting markup or wrapping paths."""
    rich.get_console().print(Text(text), soft_wrap=True)


def print_lines(lines: Mapping[str, str]) -> None:
    """Print a line for each name and its text, the texts in one column."""
    for line in aligned(lines.items()):
        print_line(line)


class FileWriter(Callback):
    """A callback that writes files into the run's folder.

    Attributes:
        folder: The run's folder, set by `setup`.
        written: Paths of the written files by kind, which `RunSummary` lists.
    """

    folder: Path

    def __init__(self) -> None:
        self.written: dict[str, Path] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's folder (collective)."""
        self.folder = run_folder(trainer)
