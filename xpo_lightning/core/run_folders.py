"""Finds a run by its folder, or by the folder that holds its versions."""

import re
from pathlib import Path

CONFIG = "config.yaml"
"""Name of the file in a run's folder that holds all its settings."""
_VERSION = re.compile(r"version_(\d+)")


def run_folders(folder: Path) -> list[Path]:
    """Return the folders that may be meant by a run's name: the folder itself, then its versions, the newest first.

    Args:
        folder: A folder that exists.
    """
    numbered = {int(found[1]): path for path in folder.iterdir() if (found := _VERSION.fullmatch(path.name))}
    return [folder, *(numbered[number] for number in sorted(numbered, reverse=True))]


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """Return the folder of the run that wrote a checkpoint; None if the checkpoint lies in no run's folder.

    Args:
        checkpoint: The checkpoint's file or folder.
    """
    beside = checkpoint.absolute().parent
    if beside.name == "checkpoints":
        return checkpoint.parent.parent
    return checkpoint.parent if (beside / CONFIG).is_file() else None
