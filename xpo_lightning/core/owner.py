"""Identifies the process that is writing a file, and tells whether that process still runs."""

import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ABANDONED_AFTER = 3600.0
"""Seconds without a change after which a file counts as abandoned, if its process cannot be looked up here."""
_TAG = re.compile(r"(?P<host>[\w-]+)-(?P<pid>\d+)-(?P<started>\d+)")


@dataclass(frozen=True)
class Owner:
    """A process, distinguished from all others that ever had its process id.

    Args:
        host: Name of the machine; letters, digits, '_' and '-'.
        pid: Process id.
        started: When it started, in kernel ticks since boot; 0 if the system does not say.
    """

    host: str
    pid: int
    started: int

    def __str__(self) -> str:
        """Return the owner as part of a file name."""
        return f"{self.host}-{self.pid}-{self.started}"

    @staticmethod
    def read(text: str) -> "Owner | None":
        """Parse the output of `str`; return None if the text is no owner."""
        found = _TAG.fullmatch(text)
        return None if found is None else Owner(found["host"], int(found["pid"]), int(found["started"]))

    def is_gone(self, path: Path) -> bool:
        """Tell whether the process has ended.

        Args:
            path: The file or folder that it was writing; for a process on another machine, its age decides.
        """
        return not self.is_here() if self.host == _host() else is_old(path)

    def is_here(self) -> bool:
        """Tell whether the process runs on this machine."""
        return self.host == _host() and self.started == _started(self.pid) and _is_running(self.pid)


def this_process() -> Owner:
    """Return the current process."""
    return Owner(_host(), os.getpid(), _started(os.getpid()))


def is_old(path: Path) -> bool:
    """Tell whether a file, or a folder and everything in it, has not changed for `ABANDONED_AFTER`."""
    changes = [0.0]
    for one in (path, *path.rglob("*")):
        with suppress(OSError):  # Another process may be removing it.
            changes.append(one.stat().st_mtime)
    return time.time() - max(changes) > ABANDONED_AFTER


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname(), flags=re.ASCII)[:40] or "_"


def _started(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    state, *others = status.rpartition(")")[2].split()
    return -1 if state in "ZX" else int(others[18])  # An ended process stays listed until its parent waits for it.


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # It belongs to another user.
        return True
    return True
