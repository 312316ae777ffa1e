"""Writes files and folders atomically: they appear under their names only once they are complete.

Work in progress is a hidden file or folder next to the target, with its owner in its name: `.last.ckpt.<owner>.part`.
A folder that is replaced is first renamed to `.last.ckpt.<owner>.old`. Once their owner is gone, both are leftovers,
which `clear_leftovers` removes or restores.
"""

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.owner import Owner, is_old, this_process

TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
"""How text files are opened: a lone surrogate, which UTF-8 cannot encode, becomes `\\udc80`, as JSON escapes it."""
_LEFTOVER = re.compile(r"\.(?P<name>.+?)(?:\.(?P<owner>[\w-]+-\d+-\d+))?\.(?P<state>part|old)", re.DOTALL)


@contextmanager
def replacing_file(target: Path, mode: str = "w", newline: str | None = None) -> Iterator[IO[Any]]:
    """Yield a file to write; it replaces `target` when the block succeeds, and is removed when the block fails.

    Args:
        target: The file. Its folder is made if it does not exist.
        mode: `w` for text, in UTF-8, or `wb` for bytes.
        newline: As in `open`.

    Raises:
        InputError: Writing failed; the former contents are intact.
    """
    part = part_of(target)
    with explaining_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target.parent, glob.escape(target.name))
        try:
            with part.open(mode, newline=newline, **({} if "b" in mode else TEXT)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except BaseException:
            remove(part)
            raise
    sync_folder(target.parent)


@contextmanager
def appending(target: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Yield a text file to append to; it is cut back to its former length when the block fails.

    Raises:
        InputError: Writing failed; the former contents are intact.
    """
    with explaining_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        size = target.stat().st_size if target.exists() else None
        try:
            with target.open("a", newline=newline, **TEXT) as file:
                yield file
        except BaseException:
            if size is None:
                remove(target)
            else:
                os.truncate(target, size)
            raise


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder; it replaces `target` when the block succeeds, and is removed when the block fails.

    Raises:
        InputError: Writing failed; the former contents are intact.
    """
    with explaining_write_errors(target):
        clear_leftovers(target.parent, glob.escape(target.name))
        part = part_of(target)
        try:
            part.mkdir(parents=True)
            yield part
            put_in_place(part, target)
        except BaseException:
            remove(part)
            raise


def part_of(target: Path) -> Path:
    """Return the hidden path under which this process writes a file or folder until it is complete."""
    return target.with_name(f".{target.name}.{this_process()}.part")


def put_in_place(part: Path, target: Path) -> None:
    """Replace a folder by a complete one; restore the old one if that fails."""
    old = part.with_suffix(".old")
    if target.exists():
        target.rename(old)
    try:
        part.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    remove(old)
    sync_folder(target.parent)


def clear_leftovers(folder: Path, names: str) -> None:
    """Remove incomplete files and folders of processes that are gone, and restore folders that they were replacing.

    Args:
        folder: The folder to search; it need not exist.
        names: Glob pattern of the targets' names.
    """
    for path in sorted(folder.glob(f".{names}.*")):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or not _is_abandoned(path, found["owner"]):
            continue
        target = folder / found["name"]
        if found["state"] == "old" and not target.exists():  # Its owner died between two renames.
            with suppress(OSError):
                path.rename(target)
        else:
            remove(path)


@contextmanager
def explaining_write_errors(path: Path) -> Iterator[None]:
    """Turn a write error into one line that names the file and the reason.

    Raises:
        InputError: The file could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise InputError(
            f"'{path}' could not be written: {why}; what was there before is intact: make room, or see that its folder "
            f"can be written"
        ) from error


def remove(path: Path) -> None:
    """Remove a file or a folder, and ignore errors: a leftover does no harm."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to the disk, if the file system can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _is_abandoned(path: Path, owner: str | None) -> bool:
    """Tell whether the owner of a leftover is gone; earlier versions wrote no owner, so then its age decides."""
    known = None if owner is None else Owner.read(owner)
    return is_old(path) if known is None else known.is_gone(path)
