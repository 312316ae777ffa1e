"""Locks a run's folder, so that no other run resumes in it at the same time."""

from pathlib import Path

from xpo_lightning.core.atomic_files import remove, replacing_file
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.owner import Owner, this_process

FILE_NAME = ".run.lock"


class FolderLock:
    """Records which process uses a folder; the lock of a process that has ended is ignored.

    Processes on other machines cannot be checked, so their locks are ignored too: a run whose machine was taken away
    can resume elsewhere at once.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE_NAME

    def check(self) -> None:
        """Refuse to resume in the folder while another run is at work in it, whose files this one would truncate.

        Raises:
            InputError: Another run is at work in the folder.
        """
        other = self._owner()
        if other is not None:
            raise InputError(
                f"ckpt_path: the run in '{self._file.parent}' is still at work, as process {other.pid} on "
                f"{other.host}; wait for it, or stop it (kill {other.pid}), and start this command again"
            )

    def take(self) -> None:
        """Lock the folder, unless another run is at work in it.

        Raises:
            InputError: The file system refuses the lock's file.
        """
        if self._owner() is None:
            with replacing_file(self._file) as file:
                file.write(str(this_process()))

    def release(self) -> None:
        """Unlock the folder, if this process locked it."""
        if self._read() == this_process():
            remove(self._file)

    def _owner(self) -> Owner | None:
        """Return the other process that is at work in the folder, or None."""
        owner = self._read()
        return None if owner is None or owner == this_process() or not owner.is_here() else owner

    def _read(self) -> Owner | None:
        try:
            return Owner.read(self._file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return None
