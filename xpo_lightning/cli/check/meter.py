"""Seconds and memory of what is tried out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures parts of a check.

    Args:
        device: Where the models are, or will be.

    Attributes:
        seconds: Of each part.
        peaks: The most memory of each part since `start`, in bytes above what there was then; a part is missing where
            the system does not tell. Memory of the process on a CPU, of tensors on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._before: int | None = None

    def start(self) -> None:
        """Measure memory from now on."""
        self._before = self._now()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure what happens inside."""
        self._forget_peak()
        begun = time.perf_counter()
        yield
        peak = self._peak()
        self.seconds[part] = time.perf_counter() - begun
        if peak is not None and self._before is not None:
            self.peaks[part] = max(0, peak - self._before)

    def _now(self) -> int | None:
        return torch.cuda.memory_allocated(self.device) if self._on_gpu else _of_process("VmRSS")

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self._on_gpu else _of_process("VmHWM")

    def _forget_peak(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # Without it, the peak is that of the whole process: too high rather than too low.
                _RESET.write_text("5")

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"


def memory_of(device: torch.device) -> int | None:
    """Return how many bytes a device has in all: a GPU its own, a CPU what is not in use; None where nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _of_process(name: str) -> int | None:
    return _field(_STATUS, name)


def _field(file: Path, name: str) -> int | None:
    """Read a field in kB, as Linux writes them, and return bytes."""
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
