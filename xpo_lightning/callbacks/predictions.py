"""`PredictionsWriter`: what `predict` samples, in a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from xpo_lightning.batch import Experience
from xpo_lightning.callbacks.rows import Row, append_rows, open_text, pair_rows
from xpo_lightning.callbacks.run import is_fast_dev_run, run_folder, say
from xpo_lightning.errors import InputError


class PredictionsWriter(BasePredictionWriter):
    """Writes a JSON line for each prompt during `predict`: both completions, their scores and log-probabilities.

    `policy_logp` and `reference_logp` are each writer's log-probability of its own completion in nats, at temperature
    1. Other columns of the row stand under `columns`. While it is written the file is called `<file>.partial`, so a run
    that broke leaves nothing under the final name.

    Args:
        file: Where to write; a relative path starts in the run's folder. Processes beyond the first put their number
            into the name: `predictions.rank1.jsonl`.
    """

    def __init__(self, file: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        if not Path(file).name:
            raise InputError(f"trainer.callbacks: PredictionsWriter.file must name a file, but is {file!r}")
        self.file = file
        self._stream: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the path."""
        super().setup(trainer, pl_module, stage)
        path = run_folder(trainer) / self.file
        rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        self.path = path.with_name(f"{path.stem}{rank}{path.suffix}")
        self._partial = self.path.with_name(self.path.name + ".partial")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file under its temporary name."""
        if not is_fast_dev_run(trainer):
            self._stream = open_text(self._partial, "w")

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
        """Write a batch."""
        if self._stream is not None:
            append_rows(self._stream, _prediction_rows(prediction))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        if self._stream is None:
            return
        self._close()
        self._partial.replace(self.path)
        say(f"Predictions are in {self.path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the file; what is in it stays under the temporary name."""
        self._close()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _prediction_rows(experience: Experience) -> list[Row]:
    rows = pair_rows(experience)
    own_logps = experience.completions.map(lambda side: side.logps.tolist())
    for number, row in enumerate(rows):
        row["policy_logp"], row["reference_logp"] = own_logps.by_policy[number], own_logps.by_sampler[number]
        if experience.prompts.columns:
            row["columns"] = {name: values[number] for name, values in experience.prompts.columns.items()}
    return rows
