"""Files and folders that appear under their names once they are complete, and that nobody else touches before.

What is in progress is a hidden part beside its place, which has its owner in its name: `.last.ckpt.<owner>.part`. What
was there before is put aside as `.last.ckpt.<owner>.old`, where a folder has to make room. Both are leftovers once
their owner is gone, which `clear_leftovers` removes or takes up.
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
"""How text is written: half of a surrogate pair, which UTF-8 does not know, becomes `\\udc80`, as JSON escapes it."""
_LEFTOVER = re.compile(r"\.(?P<name>.+?)(?:\.(?P<owner>[\w-]+-\d+-\d+))?\.(?P<state>part|old)", re.DOTALL)


@contextmanager
def replacing_file(target: Path, mode: str = "w", newline: str | None = None) -> Iterator[IO[Any]]:
    """Give a file to write, which takes the place of `target` when the block is done, and vanishes when it fails.

    Args:
        target: The file. Its folder is made if there is none.
        mode: `w` for text, in UTF-8, or `wb` for bytes.
        newline: As in `open`.

    Raises:
        InputError: It cannot be written; what was there before is intact.
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
    """Give a text file to write on at its end, which is as long as before when the block fails.

    Raises:
        InputError: It cannot be written; what was there before is intact.
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
    """Give an empty folder, which takes the place of `target` when the block is done, and vanishes when it fails.

    Raises:
        InputError: It cannot be written; what was there before is intact.
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
    """Name the hidden part of a file or folder that this process has in progress."""
    return target.with_name(f".{target.name}.{this_process()}.part")


def put_in_place(part: Path, target: Path) -> None:
    """Let a folder that is complete take the place of another, which is back if that fails."""
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
    """Remove what processes that are gone have left half-written, and put back what they had put aside.

    Args:
        folder: Where; there need not be such a folder.
        names: Which files and folders it was to become, as a pattern.
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
    """Say in one line which file could not be written, and why.

    Raises:
        InputError: The file system refuses.
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
    """Remove a file or a folder, as far as that can be done: a leftover does no harm."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Have the names in a folder written to the disk; some file systems cannot."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _is_abandoned(path: Path, owner: str | None) -> bool:
    """Tell whether nobody is at a part any more; earlier versions gave none an owner."""
    known = None if owner is None else Owner.read(owner)
    return is_old(path) if known is None else known.is_gone(path)
