"""`RunContinuation`: gives a resumed run the same metrics file as a run that was never stopped."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from xpo_lightning.callbacks.base import folder_id, goes_on_in, is_fast_dev_run, run_folder
from xpo_lightning.checkpointing.csv_logger import ResumableCSVLogger
from xpo_lightning.checkpointing.io import is_remote
from xpo_lightning.checkpointing.run_lock import FolderLock
from xpo_lightning.core.fault_tolerance.guard import Guard
from xpo_lightning.core.run_events import drop_events_after

KEY = "xpo_metrics_files"
Row = tuple[dict[str, Any], int]
"""Metrics by name, and their step."""


class RunContinuation(Callback):
    """Lets a resumed run continue the metrics file of the run that was stopped.

    A checkpoint records how many rows each `ResumableCSVLogger` has written, and holds the row of its own step, which
    Lightning logs only afterwards. A run that is resumed in the same folder cuts `metrics.csv` to these rows, and so
    drops those of steps that it will take again. In another folder it begins a new file. Metrics that other loggers
    have already sent cannot be taken back; before each checkpoint, the callback tells them to send what they hold.

    While a run is at work, its folder is locked (`.run.lock`), so that no other run resumes in it.
    """

    _lock: FolderLock | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lock the run's folder; another run that would resume in it checks the lock before it begins."""
        folder = run_folder(trainer)
        if is_fast_dev_run(trainer) or is_remote(str(folder)):
            return
        self._lock = FolderLock(folder)
        with Guard().together():
            if trainer.is_global_zero:
                self._lock.take()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unlock the folder."""
        self._unlock()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unlock the folder."""
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the loggers write what they hold, and record the number of rows in the checkpoint."""
        row = _row_to_come(trainer)  # May be reduced over ranks, so every rank reads it.
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        checkpoint[KEY] = [
            {"folder": folder_id(logger.log_dir), "rows": logger.rows_written, "row_to_come": row}
            for logger in _files(trainer)
        ]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Cut the metrics files to the checkpoint's rows, if this run continues in their folder."""
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        for logger, saved in zip(_files(trainer), checkpoint.get(KEY, []), strict=False):
            if goes_on_in(logger.log_dir, saved["folder"], trainer):
                logger.keep_rows(saved["rows"])
                drop_events_after(Path(logger.log_dir), checkpoint["global_step"])
                if saved["row_to_come"] is not None:
                    metrics, step = saved["row_to_come"]
                    logger.log_metrics(metrics, step)
                    logger.save()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the file of another run, even if this one never logs."""
        for logger in _files(trainer):
            logger.begin()


def _files(trainer: Trainer) -> list[ResumableCSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, ResumableCSVLogger)]


def _row_to_come(trainer: Trainer) -> Row | None:
    """Return the row that Lightning is about to log for the batch that is ending; None if there is none."""
    connector, epoch_loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    batches: Any = epoch_loop.batch_progress.current
    ends = trainer.training and batches.completed < batches.processed
    automatic = trainer.lightning_module.automatic_optimization
    if not ends or not connector.should_update_logs or (automatic and epoch_loop._should_accumulate()):
        return None
    metrics: dict[str, Any] = convert_tensors_to_scalars(connector.metrics["log"])
    if not metrics:
        return None
    step = metrics.pop("step", None)
    if step is None:
        metrics.setdefault("epoch", trainer.current_epoch)
        step = epoch_loop._batches_that_stepped
    return metrics, int(step)
