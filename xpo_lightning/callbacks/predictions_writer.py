"""`PredictionsWriter`: writes the pairs that `predict` samples to a file."""

import glob
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from xpo_lightning.callbacks.base import is_fast_dev_run, print_line, run_folder
from xpo_lightning.callbacks.pair_rows import Row, append_rows, pair_rows
from xpo_lightning.core.atomic_files import TEXT, clear_leftovers, explaining_write_errors, part_of
from xpo_lightning.core.batch import Experience
from xpo_lightning.core.errors import InputError


class PredictionsWriter(BasePredictionWriter):
    """Writes a JSON line for each prompt during `predict`: both completions, their scores and log-probabilities.

    `policy_logp` and `reference_logp` are each model's log-probability of its own completion in nats, at temperature
    1. Other columns of the row are under `columns`. The file gets its name when it is complete; a run that fails leaves
    `<file>.partial`.

    Args:
        file: Where to write; a relative path starts in the run's folder. Ranks beyond the first add their number to the
            name: `predictions.rank1.jsonl`.
    """

    def __init__(self, file: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        if not Path(file).name:
            raise InputError(f"trainer.callbacks: PredictionsWriter.file must name a file, but is {file!r}")
        self.file = file
        self._stream: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the path for this rank."""
        super().setup(trainer, pl_module, stage)
        path = run_folder(trainer) / self.file
        rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        self.path = path.with_name(f"{path.stem}{rank}{path.suffix}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file under its temporary name."""
        if not is_fast_dev_run(trainer):
            clear_leftovers(self.path.parent, glob.escape(self.path.name))
            self._part = part_of(self.path)
            with explaining_write_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self._part.open("w", **TEXT)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the rows of a batch."""
        if self._stream is not None:
            with explaining_write_errors(self.path):
                append_rows(self._stream, _prediction_rows(prediction))
                self._stream.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the complete file its name."""
        if self._stream is None:
            return
        with explaining_write_errors(self.path):
            os.fsync(self._stream.fileno())
            self._close(self.path)
        print_line(f"Predictions are in {self.path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the file, and keep it as `<file>.partial`."""
        if self._stream is not None:
            with suppress(OSError):
                self._close(self.path.with_name(f"{self.path.name}.partial"))

    def _close(self, path: Path) -> None:
        stream, self._stream = self._stream, None
        try:
            if stream is not None:
                stream.close()
        finally:
            self._part.replace(path)


def _prediction_rows(experience: Experience) -> list[Row]:
    rows = pair_rows(experience)
    own_logps = experience.completions.map(lambda side: side.logps.tolist())
    for number, row in enumerate(rows):
        row["policy_logp"], row["reference_logp"] = own_logps.by_policy[number], own_logps.by_sampler[number]
        if experience.prompts.columns:
            row["columns"] = {name: values[number] for name, values in experience.prompts.columns.items()}
    return rows
