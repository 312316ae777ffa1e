"""Measures the seconds and the memory of the parts of a check."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures parts of a check.

    Args:
        device: Device that the models are on, or will be.

    Attributes:
        seconds: Seconds of each part.
        peaks: Peak memory of each part after `start`, in bytes above the memory at `start`; without parts for which the
            system gives no number. It is the memory of the process on a CPU, of tensors on a GPU.
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
        """Measure the time and the peak memory of the code inside."""
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
            with suppress(OSError):  # Without it, the peak is that since the process began: too high, not too low.
                _RESET.write_text("5")

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"


def memory_of(device: torch.device) -> int | None:
    """Return a device's memory in bytes: all of a GPU's, or the machine's available memory; None if unknown."""
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
