"""Measures the seconds and the memory of the parts of a check."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from xpo_lightning.core.main_memory import available, forget_peak, peak, taken


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
        most = self._peak()
        self.seconds[part] = time.perf_counter() - begun
        if most is not None and self._before is not None:
            self.peaks[part] = max(0, most - self._before)

    def _now(self) -> int | None:
        return torch.cuda.memory_allocated(self.device) if self._on_gpu else taken()

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self._on_gpu else peak()

    def _forget_peak(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            forget_peak()

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"


def memory_of(device: torch.device) -> int | None:
    """Return a device's memory in bytes: all of a GPU's, or the machine's available memory; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return available()
