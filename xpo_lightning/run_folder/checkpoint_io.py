"""Checkpoint files that survive kills, full disks and diverged weights, and that are checked before they are read."""

import contextlib
import os
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from xpo_lightning.errors import InputError

ADVICE = "give another file, or `--ckpt_path last` for the newest one that is whole"


class CrashSafeCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint only by a complete one, and never loads code.

    A local file is written as a hidden part beside its target, synced to the disk, and then renamed: whatever happens
    meanwhile, the file of before is there. Other places (`s3://` and the like) are left to Lightning, but for web
    addresses, which are refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self._swept: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint, or leave everything as it was.

        Args:
            checkpoint: What to save; its `state_dict` must be finite.
            path: Where to.
            storage_options: Not supported, as in Lightning.

        Raises:
            InputError: A weight is not finite, or the file system refuses the file.
        """
        _check_finite(checkpoint.get("state_dict", {}), path)
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.parent not in self._swept:
                remove_parts(target.parent)
                self._swept.add(target.parent)
            _replace(target, checkpoint)
        except OSError as error:
            raise InputError(
                f"checkpoint '{path}' could not be written: {error.strerror or error}; the checkpoints before it are "
                f"intact: make room, or fix the folder, and go on with `--ckpt_path last`"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain values, once its checksums are found right.

        Args:
            path: The file.
            map_location: Where tensors go, as in `torch.load`.
            weights_only: None or True; what else a file holds is never loaded.

        Raises:
            InputError: The file is missing, damaged, on the web, or holds other objects; or they were asked for.
        """
        check_safe(path, weights_only)
        if is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        try:
            return read_checkpoint(Path(path), map_location)
        except InputError as error:
            raise InputError(f"ckpt_path: {error}; {ADVICE}") from error


def is_remote(path: str | Path) -> bool:
    """Tell whether a path is an address rather than a local file."""
    return "://" in str(path)


def check_safe(path: str | Path, weights_only: bool | None) -> None:
    """Refuse to load what could run code or could be an old copy.

    Raises:
        InputError: A web address, or `weights_only` is false.
    """
    if weights_only is False:
        raise InputError("weights_only=false would run code that a checkpoint holds; leave it out")
    if str(path).startswith(("http://", "https://")):
        raise InputError(f"ckpt_path: '{path}' is a web address; download it, and give the local file")


def read_checkpoint(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """Read a local checkpoint after checking all of its bytes, which `torch.load` does not.

    Args:
        path: The file.
        map_location: Where tensors go, as in `torch.load`.
        mmap: Read tensors when they are used.

    Raises:
        InputError: It is missing, damaged, no checkpoint, or holds objects that could run code.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint '{path}'")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        loaded: Any = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # The bytes are arbitrary, and so is what the readers make of them.
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign is not None:
            raise InputError(f"'{path}' holds {foreign[1]}, which could run code, and is not loaded") from error
        reason = "it is empty" if path.stat().st_size == 0 else str(error) or type(error).__name__
        raise InputError(f"'{path}' is no checkpoint, or a damaged one ({reason:.160})") from error
    if not isinstance(loaded, dict):
        raise InputError(f"'{path}' is no checkpoint: it holds a {type(loaded).__name__}")
    return loaded


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder; nobody may be saving there meanwhile."""
    for part in folder.glob(".*.ckpt.part"):
        with contextlib.suppress(OSError):  # A leftover does no harm.
            part.unlink()


class _Sink:
    """Takes the bytes of a checkpoint, and keeps the first error for later.

    Raised through torch's C++ writer, an error comes out as another one, and may end the process.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: BaseException | None = None

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except BaseException as error:
                self._error = error
        return len(data)

    def flush(self) -> None:  # torch calls it; the file is flushed after it.
        if self._error is not None:
            raise self._error


def _replace(target: Path, checkpoint: dict[str, Any]) -> None:
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as file:
            sink = _Sink(file)
            torch.save(checkpoint, cast("BinaryIO", sink))
            sink.flush()
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # Some file systems cannot sync a folder.
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _check_finite(state: dict[str, Any], path: str | Path) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not _is_finite(value):
            raise InputError(
                f"checkpoint '{path}' is not written, because '{name}' holds nan or inf; the checkpoints before it are "
                f"intact: lower model.learning_rate or set model.max_grad_norm, and go on with `--ckpt_path last`"
            )


def _is_finite(value: Tensor) -> bool:
    if value.numel() == 0:
        return True
    # Two numbers tell, without a copy; torch has neither test for its 8-bit floats.
    extremes = torch.stack(torch.aminmax(value.float() if value.element_size() == 1 else value))
    return bool(torch.isfinite(extremes).all())
