"""Writes checkpoint files that survive kills, full disks and diverged weights, and checks them before reading."""

import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.tensor import DTensor

from xpo_lightning.checkpointing.torch_sink import TorchSink
from xpo_lightning.core.atomic_files import clear_leftovers, replacing_file
from xpo_lightning.core.errors import InputError

ADVICE = "give another file, or `--ckpt_path last` for the newest one that is whole"


class CrashSafeCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint only by a complete one, and never loads code.

    It writes a local file under a hidden name beside its target, syncs it to the disk, and then renames it: whatever
    happens meanwhile, the previous file stays intact. Remote places (`s3://` and the like) are left to Lightning;
    loading from a web address is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self._swept: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint, or leave everything as it was.

        Args:
            checkpoint: What to save; its `state_dict` must be finite.
            path: The file to write.
            storage_options: Not supported, as in Lightning.

        Raises:
            InputError: A weight is not finite, or the file system refuses the file.
        """
        check_finite(checkpoint.get("state_dict", {}), path)
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            if target.parent not in self._swept:
                clear_leftovers(target.parent, "*.ckpt")
                self._swept.add(target.parent)
            with replacing_file(target, "wb") as file:
                sink = TorchSink(file)
                torch.save(checkpoint, cast("BinaryIO", sink))
                sink.flush()
        except InputError as error:
            raise InputError(f"checkpoint {error}, and go on with `--ckpt_path last`") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain values, after checking a local file's checksums.

        Args:
            path: The file.
            map_location: Device of the tensors, as in `torch.load`.
            weights_only: None or True; objects other than tensors and plain values are never loaded.

        Raises:
            InputError: The file is missing, damaged, on the web, or holds other objects; or `weights_only` is false.
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
    """Refuse loading that could run code, and web addresses, whose download could be an old copy.

    Raises:
        InputError: The path is a web address, or `weights_only` is false.
    """
    if weights_only is False:
        raise InputError("weights_only=false would run code that a checkpoint holds; leave it out")
    if str(path).startswith(("http://", "https://")):
        raise InputError(f"ckpt_path: '{path}' is a web address; download it, and give the local file")


def read_checkpoint(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """Read a local checkpoint after checking all of its bytes, which `torch.load` does not.

    Args:
        path: The file.
        map_location: Device of the tensors, as in `torch.load`.
        mmap: Read tensors only when they are used.

    Raises:
        InputError: The file is missing, damaged, no checkpoint, or holds objects that could run code.
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


def check_finite(state: dict[str, Any], path: str | Path) -> None:
    """Refuse to save weights that are not finite; each rank checks its own shard of a sharded weight.

    Raises:
        InputError: A weight is not finite.
    """
    for name, part in state.items():
        value = part.to_local() if isinstance(part, DTensor) else part
        if isinstance(value, Tensor) and value.is_floating_point() and not _is_finite(value):
            raise InputError(
                f"checkpoint '{path}' is not written, because '{name}' holds nan or inf; the checkpoints before it are "
                f"intact: lower model.learning_rate or set model.max_grad_norm, and go on with `--ckpt_path last`"
            )


def _is_finite(value: Tensor) -> bool:
    if value.numel() == 0:
        return True
    # The extremes are enough, and need no copy of the weight. Torch tests no 8-bit floats, so those are converted.
    extremes = torch.stack(torch.aminmax(value.float() if value.element_size() == 1 else value))
    return bool(torch.isfinite(extremes).all())
