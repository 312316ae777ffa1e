"""Distributed checkpoints: folders in which each rank has saved its own shards of the tensors.

Besides torch's files (`__<rank>_<number>.distcp`, `.metadata`) and Lightning's (`meta.pt`), a folder holds the
checksums of all of them. It appears under its name only when complete, and is loaded only if every byte is right.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from xpo_lightning.checkpointing.io import check_finite, read_checkpoint
from xpo_lightning.checkpointing.safe_unpickling import METADATA, PlainPlanner, PlainReader, read_metadata
from xpo_lightning.checkpointing.torch_sink import TorchSink
from xpo_lightning.core.atomic_files import (
    clear_leftovers,
    explaining_write_errors,
    part_of,
    put_in_place,
    remove,
    replacing_file,
)
from xpo_lightning.core.distributed import all_gather
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.guard import Guard

OTHERS, CHECKSUMS = "meta.pt", "checksums.json"
Checksums = dict[str, str]
"""The SHA-256 of files, by name."""


def save_folder(checkpoint: dict[str, Any], target: Path) -> None:
    """Write a distributed checkpoint, or leave everything as it was (collective).

    Args:
        checkpoint: What to save. Each rank has its own shards of `state_dict` and `optimizer_states`.
        target: The folder, the same on all ranks.

    Raises:
        InputError: A weight is not finite, or the file system refuses a file.
    """
    guard, first = Guard(), torch.distributed.get_rank() == 0
    part = all_gather(part_of(target))[0]
    with guard.together():
        check_finite(checkpoint["state_dict"], target)
    spread = {"state_dict": checkpoint["state_dict"]}
    spread |= {f"optimizer_{number}": state for number, state in enumerate(checkpoint.get("optimizer_states", []))}
    others = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}

    try:
        with guard.together():
            if first:
                clear_leftovers(target.parent, "*.ckpt")
                with explaining_write_errors(target):
                    part.mkdir(parents=True)
        with guard.together():
            _write(spread, others if first else None, part, target)
        with guard.together():
            own = _checksums(part, lambda name: _writer_of(name) == torch.distributed.get_rank())
        checksums = {name: value for sums in all_gather(own) for name, value in sums.items()}
        with guard.together():
            if first:
                with replacing_file(part / CHECKSUMS) as file:
                    file.write(_as_text(checksums))
                with explaining_write_errors(target):
                    put_in_place(part, target)
    except InputError as error:
        raise InputError(f"checkpoint {error}, and go on with `--ckpt_path last`") from error
    finally:
        if first:
            remove(part)


def read_folder(path: Path) -> dict[str, Any]:
    """Check every byte of a distributed checkpoint, and return its content except the tensors.

    Raises:
        InputError: It is incomplete, damaged, or could run code.
    """
    if not (path / METADATA).is_file():
        raise InputError(f"'{path}' is no checkpoint, or a distributed one that is not whole: it has no {METADATA}")
    _check_bytes(path)
    content = read_checkpoint(path / OTHERS)
    read_metadata(path)
    return content


def load_folder(path: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Load a distributed checkpoint into a sharded model and its optimizers (collective).

    Args:
        path: The folder.
        model: The sharded model, whose weights are replaced.
        optimizers: The optimizers, whose states are replaced.

    Returns:
        The checkpoint's content except the tensors.

    Raises:
        InputError: It is incomplete, damaged, could run code, or is not of this model.
    """
    with Guard().together():
        content = read_folder(path)
    try:
        weights = {"state_dict": get_model_state_dict(model)}
        load(weights, storage_reader=PlainReader(path), planner=PlainPlanner())
        model.load_state_dict(weights["state_dict"], strict=False)
        for number, optimizer in enumerate(optimizers):
            name = f"optimizer_{number}"
            state = {name: get_optimizer_state_dict(model, optimizer)}
            load(state, storage_reader=PlainReader(path), planner=PlainPlanner())
            set_optimizer_state_dict(
                model, optimizer, optim_state_dict=state[name], options=StateDictOptions(cpu_offload=True)
            )
    except CheckpointException as error:
        raise InputError(f"ckpt_path: '{path}' cannot be loaded ({_reason(error):.300})") from error
    return content


def _write(spread: dict[str, Any], others: dict[str, Any] | None, part: Path, target: Path) -> None:
    """Write all files but the checksums; the one rank that is given `others` writes them to `meta.pt`."""
    writer = FileSystemWriter(part)
    writer.fs = _SinkFiles()
    try:
        save(spread, storage_writer=writer)
    except CheckpointException as error:
        raise InputError(
            f"'{target}' could not be written: {_reason(error):.300}; what was there before is intact: make room"
        ) from error
    if others is not None:
        with replacing_file(part / OTHERS, "wb") as file:
            torch.save(others, file)


class _SinkFiles(FileSystem):
    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file that reports errors of writing, such as a full disk, unchanged; see `TorchSink`."""
        with super().create_stream(path, mode) as file:
            sink = TorchSink(cast("IO[bytes]", file))
            yield sink
            sink.flush()


def _reason(error: CheckpointException) -> str:
    """Return the error of the first rank that failed; torch's own text has the traceback of every rank."""
    return next((f"process {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items())), str(error))


def _writer_of(name: str) -> int:
    """Return the rank that wrote a file, and therefore computes its checksum."""
    return int(name.removeprefix("__").partition("_")[0]) if name.startswith("__") else 0


def _checksums(folder: Path, wanted: Callable[[str], bool]) -> Checksums:
    sums = {}
    for file in sorted(folder.iterdir()):
        if wanted(file.name):
            with file.open("rb") as stream:
                sums[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def _as_text(checksums: Checksums) -> str:
    return json.dumps(checksums, indent=0, sort_keys=True)


def _check_bytes(path: Path) -> None:
    """Compare all files of a folder with their checksums.

    Raises:
        InputError: A file is missing, was added, or was changed.
    """
    damaged = f"'{path}' is no checkpoint, or a damaged one"
    try:
        text = (path / CHECKSUMS).read_text(encoding="utf-8")
        saved = json.loads(text)
        if not isinstance(saved, dict) or _as_text(saved) != text:
            raise ValueError("not as it was written")
    except FileNotFoundError:
        raise InputError(f"{damaged}: it has no {CHECKSUMS}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{damaged} ({CHECKSUMS}: {error!s:.100})") from error
    try:
        found = _checksums(path, lambda name: name != CHECKSUMS)
    except OSError as error:
        raise InputError(f"{damaged} ({error})") from error
    for name in sorted(saved.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{damaged}: it has no {name}")
        if saved.get(name) != found[name]:
            raise InputError(f"{damaged} (wrong checksum of {name})")
