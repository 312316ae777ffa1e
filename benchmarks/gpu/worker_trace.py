"""Looks into one optimizer step of this package: kernels, operators, and where it waits for the device."""

import cProfile
import json
import pstats
import warnings
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.measuring import finish_device_work, read_prompts, read_spec
from benchmarks.speed.worker_ours import fit, make_module
from xpo_lightning import XPOLightningModule

WARM, TRACED, WATCHED, PROFILED = range(2), 2, 3, 4
"""Which steps warm up; and where kernels, waiting, and Python are looked at."""
ROWS = 40
ON_GPU = torch.cuda.is_available()


class StepTrace(Callback):
    """Looks at a step's kernels, at what waits for the device in the next, and at Python in the one after."""

    def __init__(self) -> None:
        self.kernels = profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU])
        self.python = cProfile.Profile()
        self._recording = warnings.catch_warnings(record=True)
        self.waits: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: XPOLightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to look."""
        finish_device_work()
        if batch_idx == TRACED:
            self.kernels.__enter__()
        if batch_idx == WATCHED:
            self._seen = self._recording.__enter__()
            warnings.simplefilter("always")
            _report_waiting("warn")
        if batch_idx == PROFILED:
            self.python.enable()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: XPOLightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what was seen."""
        self.python.disable()
        if batch_idx == WATCHED:
            _report_waiting("default")
            self._recording.__exit__(None, None, None)
            self.waits.update(f"{Path(each.filename).name}:{each.lineno}" for each in self._seen or ())
        finish_device_work()
        if batch_idx == TRACED:
            self.kernels.__exit__(None, None, None)

    def tables(self) -> str:
        """Write down the kernels and the functions that took longest."""
        averages = self.kernels.key_averages()
        by = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
        written = StringIO()
        pstats.Stats(self.python, stream=written).sort_stats("tottime").print_stats(ROWS)
        return averages.table(sort_by=by, row_limit=ROWS, max_name_column_width=70) + written.getvalue()


def _report_waiting(mode: str) -> None:
    if ON_GPU:
        torch.cuda.set_sync_debug_mode(mode)


def main() -> None:
    """Take a few steps, and print what they spend their time on."""
    spec = read_spec()
    warm, step = read_prompts(spec)
    torch.manual_seed(0)
    trace = StepTrace()
    fit(make_module(spec), [*(warm for _ in WARM), step, step, step], trace, spec.get("accelerator", "cpu"))
    print(json.dumps({"table": trace.tables(), "waits": dict(trace.waits.most_common())}))


if __name__ == "__main__":
    main()
