"""Checks what a run needs besides models and data: writable folders, free disk space, servers that answer."""

import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from xpo_lightning.callbacks import Baseline, PolicyExport
from xpo_lightning.checkpointing.io import is_remote
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.environment import proxy_of
from xpo_lightning.models.saving import check_exportable
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.rewards.base import Feedback

PATIENCE = 5.0  # seconds to wait for a server to accept a connection
_PORTS = {"http": 80, "https": 443}


def check_validation(trainer: Trainer, has_prompts: bool) -> None:
    """Refuse callbacks that need a validation, in a run without one.

    Raises:
        InputError: A callback needs a validation.
    """
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    validates = has_prompts and trainer.enable_validation
    for callback in [] if validates else callbacks:
        monitor = getattr(callback, "monitor", None) if isinstance(callback, ModelCheckpoint | EarlyStopping) else None
        if isinstance(callback, Baseline) or str(monitor).startswith("eval/"):
            what = f" watches {monitor}" if monitor else " logs a validation"
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__}{what}, but there are no validation prompts; set "
                f"data.validation_source, data.validation_split or data.validation_size, or remove it"
            )


def check_servers(reward: Feedback) -> None:
    """Refuse servers that accept no connection; requests to them would be retried for minutes.

    Raises:
        InputError: A server accepts no connection.
    """
    for part in reward.modules():
        url = getattr(part, "url", None)
        if not isinstance(url, str) or proxy_of(url):
            continue
        address = urlsplit(url)
        try:
            socket.create_connection((address.hostname or "", address.port or _PORTS[address.scheme]), PATIENCE).close()
        except OSError as error:
            place = f"{address.scheme}://{address.netloc.rpartition('@')[2]}"
            raise InputError(
                f"model.reward.init_args.url: nothing answers at {place} for {type(part).__name__} ({error}); "
                f"start the server, or mend the address"
            ) from error


def check_loaded(trainer: Trainer, module: XPOLightningModule) -> None:
    """Refuse a policy that cannot be exported, and a reference cache that was filled with other settings.

    Raises:
        InputError: The policy or the cache cannot be used.
    """
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, PolicyExport):
            check_exportable(module.policy, callback.merges(module.policy))
    where = module.reference_cache
    if where is not None and where != "memory" and (Path(where) / f"reference-{module.global_rank}.sqlite").is_file():
        module.collector.open_cache(where, module.reference_identity, trainer)
        module.memory.cache = None  # The dry step must not write into it.


@dataclass(frozen=True)
class Disk:
    """The disk that checkpoints go to.

    Args:
        folder: The folder of the checkpoints.
        free: Free bytes on its disk.
        kept: Checkpoints that the run keeps at a time; infinite if it keeps all of them.
    """

    folder: Path
    free: int
    kept: float


def check_folders(trainer: Trainer, reference_cache: str | None) -> None:
    """Refuse folders that cannot be written to; create nothing.

    Raises:
        InputError: A folder cannot be written to.
    """
    named: list[tuple[str, str | Path | None]] = [
        ("trainer.default_root_dir", trainer.default_root_dir),
        ("model.reference_cache", reference_cache),
    ]
    named += [("trainer.logger", logger.save_dir) for logger in trainer.loggers]
    named += [("trainer.callbacks", callback.dirpath) for callback in _checkpoints(trainer)]
    for key, folder in named:
        if folder not in (None, "", "memory") and not is_remote(str(folder)):
            _check_writable(key, Path(str(folder)))


def disk(trainer: Trainer) -> Disk | None:
    """Return the disk that checkpoints go to; None if there are none, or they go to another machine."""
    callbacks = _checkpoints(trainer)
    if not callbacks:
        return None
    of_loggers = [logger.save_dir for logger in trainer.loggers if logger.save_dir]
    folder = str(callbacks[0].dirpath or (of_loggers or [trainer.default_root_dir])[0])
    if is_remote(folder):
        return None
    kept = sum(_kept(callback) for callback in callbacks)
    return Disk(Path(folder), shutil.disk_usage(_existing(Path(folder))).free, kept)


def check_room(disk: Disk | None, size: int) -> None:
    """Refuse a disk without room for one checkpoint.

    Args:
        disk: The disk.
        size: Bytes of a checkpoint.

    Raises:
        InputError: The disk has too little free space.
    """
    if disk is not None and disk.kept and size > disk.free:
        raise InputError(
            f"trainer.default_root_dir: a checkpoint takes about {size / 2**20:,.0f} MiB, and '{disk.folder}' has "
            f"{disk.free / 2**20:,.0f} MiB free; make room, give another folder, or set trainer.enable_checkpointing "
            f"to false"
        )


def _kept(callback: Any) -> float:
    of_best = float("inf") if callback.save_top_k == -1 else callback.save_top_k
    return float(of_best + bool(callback.save_last))


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _check_writable(key: str, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:  # It has no name, so it cannot be left behind.
            file.write(b"x")
    except OSError as error:
        raise InputError(
            f"{key}: nothing can be written in '{folder}' ({type(error).__name__}: {error}); give another folder"
        ) from error


def _existing(folder: Path) -> Path:
    """Return the path itself if it exists, else its nearest parent that does."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
