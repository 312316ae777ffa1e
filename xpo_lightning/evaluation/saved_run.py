"""Finds the config and the checkpoint of a run by its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xpo_lightning.checkpointing.resume import Place, newest_checkpoint
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.paths import existing_path
from xpo_lightning.core.run_folders import CONFIG, run_folders, run_of_checkpoint
from xpo_lightning.evaluation.policies import REFERENCE, is_checkpoint
from xpo_lightning.evaluation.run_config import RunConfig, read_run_config
from xpo_lightning.models.saving import MODEL_FILES


@dataclass(frozen=True)
class SavedRun:
    """What a run has left to look at.

    Args:
        config: The run's `config.yaml`.
        checkpoint: The run's newest checkpoint.
    """

    config: Path
    checkpoint: Path


def find_saved_run(name: str) -> SavedRun:
    """Find the run of a folder.

    Args:
        name: The run's folder, or the folder of its versions: the newest that has a config and a checkpoint is taken.

    Raises:
        InputError: There is no such folder, or no run with a config and a checkpoint in it.
    """
    folder = existing_path(name)
    if folder is None or not folder.is_dir():
        raise InputError(f"RUN: there is no folder '{name}'; give a run's folder, as runs/quickstart/version_0")
    for run in run_folders(folder):
        point = newest_checkpoint("validate", [Place(str(run), "checkpoints")]) if (run / CONFIG).is_file() else None
        if point is not None:
            return SavedRun(run / CONFIG, point.path)
    raise InputError(
        f"RUN: neither '{name}' nor a version_0, version_1, ... in it has both a {CONFIG} and a checkpoint in "
        f"checkpoints/; name the run's files with --config and --ckpt_path"
    )


def checkpoint_and_config(name: str, config: str | None) -> tuple[str, str | None]:
    """Return the checkpoint that a run's folder stands for, and the config to read it with.

    Args:
        name: A policy as the command line names it; any but a run's folder is returned as it is.
        config: The config that was given; without one, that of the run's folder or of the checkpoint's run is taken.
    """
    path = existing_path(name)
    if path is None or name == REFERENCE:
        return name, config
    if is_checkpoint(name):
        run = run_of_checkpoint(path)
        found = None if run is None or not (run / CONFIG).is_file() else str(run / CONFIG)
        return name, config or found
    if not path.is_dir() or any((path / file).is_file() for file in MODEL_FILES):
        return name, config
    if not any((folder / CONFIG).is_file() for folder in run_folders(path)):
        return name, config
    saved = find_saved_run(name)
    return str(saved.checkpoint), config or str(saved.config)


def named_policies(names: Sequence[str], config: str | None) -> list[tuple[str, RunConfig | None]]:
    """Return each policy that a command line names: its checkpoint or its name as it is, and the run to read it with.

    Args:
        names: Policies as the command line names them.
        config: The config that was given, for all of them.
    """
    found = [checkpoint_and_config(name, config) for name in names]
    runs = {file: read_run_config(file) for file in dict.fromkeys(file for _, file in found if file is not None)}
    own = [(name, None if file is None else runs[file]) for name, file in found]
    first = next((run for _, run in own if run is not None), None)
    return [(name, first if name == REFERENCE else run) for name, run in own]
