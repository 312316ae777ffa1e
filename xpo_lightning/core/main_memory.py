"""Main memory: what this process takes of it, and what its machine has left."""

from contextlib import suppress
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MACHINE, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def taken() -> int | None:
    """Return the memory that this process takes, in bytes; None if the system does not say."""
    return _field(_STATUS, "VmRSS:")


def peak() -> int | None:
    """Return the most memory that this process has taken since `forget_peak`, in bytes; None if unknown."""
    return _field(_STATUS, "VmHWM:")


def forget_peak() -> None:
    """Begin a new peak; where the system cannot, it stays that since the process began: too high, not too low."""
    with suppress(OSError):
        _RESET.write_text("5")


def available(container: Path = _CONTAINER) -> int | None:
    """Return the memory that can be taken without swapping, in bytes; None if unknown.

    Args:
        container: Folder of the control group, whose limit may be below what the machine has.
    """
    machine = _field(_MACHINE, "MemAvailable:")
    with suppress(OSError, ValueError):
        limit = int((container / "memory.max").read_text())  # not a number if there is no limit
        left = limit - (_field(container / "memory.stat", "anon ", unit=1) or 0)
        return left if machine is None else min(left, machine)
    return machine


def _field(file: Path, name: str, unit: int = 1024) -> int | None:
    """Read the first number of the line that begins with a name; in kB, as Linux writes most, and return bytes."""
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * unit
    return None
