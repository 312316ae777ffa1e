"""Finds the checkpoint that a run resumes from, and the folder that it continues in."""

import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from xpo_lightning.checkpointing.csv_logger import ResumableCSVLogger
from xpo_lightning.checkpointing.io import ADVICE, check_safe, is_remote, read_checkpoint
from xpo_lightning.checkpointing.run_lock import FolderLock
from xpo_lightning.checkpointing.sharded_io import read_folder
from xpo_lightning.core.atomic_files import clear_leftovers
from xpo_lightning.core.errors import InputError

WORDS = ("best", "last", "hpc")


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that was read without an error.

    Args:
        path: The file or folder.
        content: Its content; tensors of a file are read when they are used, those of a folder are left out.
    """

    path: Path
    content: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Folders where a run writes checkpoints: those under `base` that match `pattern`."""

    base: str
    pattern: str = "."

    def __str__(self) -> str:
        """Return it as a path with wildcards."""
        return str(Path(self.base, self.pattern))

    def folders(self) -> Iterator[Path]:
        """Yield the folders that exist."""
        base = Path(self.base)
        yield from filter(Path.is_dir, [base] if self.pattern == "." else base.glob(self.pattern))


def check_request(verb: str, ckpt_path: str | None, weights_only: bool | None) -> None:
    """Check `--ckpt_path` as far as possible before anything is built.

    Args:
        verb: The command: `fit`, `validate` or `predict`.
        ckpt_path: A file, or one of `WORDS`.
        weights_only: The option of that name.

    Raises:
        InputError: The checkpoint or the value of `weights_only` cannot be used.
    """
    check_safe(ckpt_path or "", weights_only)
    if ckpt_path is None or ckpt_path in WORDS or is_remote(ckpt_path):
        return
    if re.match(r"registry(:|$)", ckpt_path):
        raise InputError(f"ckpt_path: '{ckpt_path}' is in a model registry; download it, and give the local file")
    clear_leftovers(Path(ckpt_path).parent, "*.ckpt")
    try:
        _read_usable(verb, Path(ckpt_path))
    except InputError as error:
        raise InputError(f"ckpt_path: {error}; {ADVICE}") from error


def resolve(verb: str, ckpt_path: str | None, trainer: Trainer) -> str | None:
    """Replace `last` by the newest checkpoint, and let a run that resumes from it continue in its folder.

    Args:
        verb: The command.
        ckpt_path: A file, or one of `WORDS`.
        trainer: The trainer, whose loggers and callbacks tell where the run writes.

    Returns:
        The `ckpt_path` for Lightning.

    Raises:
        InputError: No checkpoint can be used, `best` was asked for, or another run is at work in the folder.
    """
    if ckpt_path == "hpc" and not any(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")):
        raise InputError(
            f"ckpt_path=hpc: SLURM's requeueing has left no hpc_ckpt_*.ckpt in '{trainer.default_root_dir}'; {ADVICE}"
        )
    if ckpt_path not in ("best", "last"):
        return ckpt_path
    places = checkpoint_places(trainer)
    for folder in (folder for place in places for folder in place.folders()):
        clear_leftovers(folder, "*.ckpt")
    point = newest_checkpoint(verb, places)
    where = " or ".join(f"'{place}'" for place in places)
    if ckpt_path == "best":
        raise InputError(f"ckpt_path=best: only the process that trained knows the best one; {_best_of(point, where)}")
    if point is None:
        if verb != "fit":
            raise InputError(f"ckpt_path=last: there is no checkpoint in {where}; run `xpo fit`, or give a file")
        _say(f"there is no checkpoint in {where} yet, so the run starts from its beginning")
        return None
    _say(f"the newest checkpoint is '{point.path}', of step {point.content['global_step']}")
    if verb == "fit":
        FolderLock(point.path.parent.parent).check()
        continue_run(trainer, point.path)
    return str(point.path)


def checkpoint_places(trainer: Trainer) -> list[Place]:
    """Return the places where runs of this config write checkpoints, whatever their version number.

    Raises:
        InputError: A place is not on this machine.
    """
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks] or [None]
    places = dict.fromkeys(_default_place(trainer) if folder is None else Place(str(folder)) for folder in folders)
    for place in places:
        if is_remote(place.base):
            raise InputError(f"ckpt_path: '{place.base}' is not on this machine; give a file rather than a word")
    return list(places)


def newest_checkpoint(verb: str, places: list[Place]) -> ResumePoint | None:
    """Find the newest checkpoint that can be used, and name the ones passed over on standard error.

    Args:
        verb: The command that will use it.
        places: Where to look.

    Raises:
        InputError: There are checkpoints, but none can be used.
    """
    folders = {folder for place in places for folder in place.folders()}
    files = {file for folder in folders for file in folder.glob("*.ckpt")}
    faults: list[str] = []
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name, str(file)), reverse=True):
        try:
            point = ResumePoint(file, _read_usable(verb, file))
        except InputError as error:
            faults.append(str(error))
        else:
            _say_passed_over(faults)
            return point
    if faults:
        newest, *others = faults
        _say_passed_over(others)
        more = f"; nor any of the {len(others)} others, see above" if others else ""
        raise InputError(f"ckpt_path: no checkpoint can be used: {newest}{more}")
    return None


def _say_passed_over(faults: list[str]) -> None:
    for fault in faults:
        _say(f"passed over: {fault}")


def _read_usable(verb: str, path: Path) -> dict[str, Any]:
    if path.is_dir():
        return read_folder(path)
    content = read_checkpoint(path, mmap=True)
    for part in ("state_dict", "global_step"):
        if part not in content:
            raise InputError(f"'{path}' is no checkpoint of a run: it has no {part}")
    if verb == "fit" and "optimizer_states" not in content:
        raise InputError(f"'{path}' was saved with save_weights_only, and no training can go on from it")
    return content


def _default_place(trainer: Trainer) -> Place:
    """Return the place where `ModelCheckpoint` writes without a `dirpath`."""
    if not trainer.loggers:
        return Place(trainer.default_root_dir, "checkpoints")
    logger = trainer.loggers[0]
    if isinstance(logger, VersionedLogger):
        return Place(logger.root_dir, f"{version_folder(logger) or 'version_*'}/checkpoints")
    return Place(logger.save_dir or trainer.default_root_dir, "*/*/checkpoints")


def _best_of(point: ResumePoint | None, where: str) -> str:
    if point is None:
        return f"there is no checkpoint in {where}"
    states = point.content.get("callbacks", {}).values()
    best = [state["best_model_path"] for state in states if state.get("best_model_path")]
    return f"give its file: --ckpt_path {best[0] if best else point.path}"


@rank_zero_only
def _say(text: str) -> None:
    sys.stderr.write(f"xpo: {text}\n")


VersionedLogger = CSVLogger | TensorBoardLogger


def make_resumable(trainer: Trainer) -> None:
    """Make Lightning's own CSV loggers `ResumableCSVLogger`s, which continue a file that they would delete."""
    for logger in trainer.loggers:
        if type(logger) is CSVLogger and "://" not in logger.root_dir:
            logger.__class__ = ResumableCSVLogger  # It has the same attributes, and no experiment yet.


def continue_run(trainer: Trainer, checkpoint: Path) -> None:
    """Let the loggers continue in the version folder of a checkpoint, if it is one of theirs.

    Lightning restores the state of `ModelCheckpoint` (which file is the best, and which to remove next) only there.

    Args:
        trainer: The trainer, whose loggers have not begun.
        checkpoint: The checkpoint's file or folder.
    """
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    folder = checkpoint.parent.parent.name
    number = re.fullmatch(r"version_(\d+)", folder)
    for logger in trainer.loggers:
        if number and isinstance(logger, VersionedLogger) and (Path(logger.root_dir) / folder).is_dir():
            logger._version = int(number[1]) if logger._version is None else logger._version


def version_folder(logger: VersionedLogger) -> str | None:
    """Return the version folder that the config asks for, or None; the logger's own property would pick a new one."""
    version = logger._version
    return f"version_{version}" if isinstance(version, int) else version
