"""The run as callbacks see it: where its files go, and which validations count."""

from pathlib import Path

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.text import Text


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run's files: the first logger's, or the trainer's root folder where there is none.

    It asks all processes, so all must call it; `setup` is a good place.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def folder_id(folder: str | Path) -> str:
    """Name a folder for `goes_on_in`."""
    return str(Path(folder).resolve())


def goes_on_in(folder: str | Path, saved: str, trainer: Trainer) -> bool:
    """Tell whether a resumed run goes on in the folder it had when its checkpoint was written.

    Args:
        folder: A folder of the run as it is now.
        saved: `folder_id` of the same at that time.
        trainer: Knows where the checkpoint is: a folder may have been moved with the checkpoint in it.
    """
    here = Path(folder).resolve()
    return saved == str(here) or here in Path(trainer.ckpt_path or "").resolve().parents


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Tell whether this is `trainer.fast_dev_run`, which leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def runs_whole_sanity_check(trainer: Trainer) -> bool:
    """Tell whether the sanity check before training takes all validation data, as with `num_sanity_val_steps: -1`."""
    return trainer.num_sanity_val_steps == float("inf")


def counts_as_validation(trainer: Trainer) -> bool:
    """Tell whether the validation that runs now is a whole one, and no mere sanity check."""
    return not trainer.sanity_checking or runs_whole_sanity_check(trainer)


def print_line(text: str) -> None:
    """Print a line above the progress bar, as it is: nothing in it is taken for markup, and paths are not broken."""
    rich.get_console().print(Text(text), soft_wrap=True)


class FileWriter(Callback):
    """A callback that leaves files in the run's folder.

    Attributes:
        folder: The run's folder, known from `setup` on.
        written: What has been written, by what it is. `RunSummary` lists it.
    """

    folder: Path

    def __init__(self) -> None:
        self.written: dict[str, Path] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's folder, on all processes."""
        self.folder = run_folder(trainer)
