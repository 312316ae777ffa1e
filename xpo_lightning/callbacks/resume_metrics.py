"""`RunContinuation`: a resumed run leaves the metrics file of one that was never stopped."""

from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from xpo_lightning.callbacks.base import folder_id, goes_on_in, is_fast_dev_run, run_folder
from xpo_lightning.checkpointing.csv_logger import ResumableCSVLogger
from xpo_lightning.checkpointing.io import is_remote
from xpo_lightning.checkpointing.run_lock import FolderLock
from xpo_lightning.core.fault_tolerance.guard import Guard

KEY = "xpo_metrics_files"
Row = tuple[dict[str, Any], int]
"""Metrics by name, and their step."""


class RunContinuation(Callback):
    """Lets a resumed run go on in the metrics file of the run that was stopped.

    A checkpoint notes how many rows each `ResumableCSVLogger` has written, and holds the row of the step that it was
    made at, which Lightning logs only afterwards. A run that is resumed in the same folder cuts `metrics.csv` to that:
    rows of steps that will be done again go. In another folder it begins a new file. What other loggers have sent
    away cannot be taken back; they are told to send it before each checkpoint.

    While a run is at work, its folder is locked (`.run.lock`): another does not go on in it.
    """

    _lock: FolderLock | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lock the run's folder; who would go on in it looks at that before the run begins."""
        folder = run_folder(trainer)
        if is_fast_dev_run(trainer) or is_remote(str(folder)):
            return
        self._lock = FolderLock(folder)
        with Guard().together():
            if trainer.is_global_zero:
                self._lock.take()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unlock it."""
        self._unlock()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unlock it."""
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have the loggers write what they hold, and note how much that is."""
        row = _row_to_come(trainer)  # May be reduced over processes, so all of them ask.
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        checkpoint[KEY] = [
            {"folder": folder_id(logger.log_dir), "rows": logger.rows_written, "row_to_come": row}
            for logger in _files(trainer)
        ]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Cut the files, if this is a run that goes on in their folder."""
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        for logger, saved in zip(_files(trainer), checkpoint.get(KEY, []), strict=False):
            if goes_on_in(logger.log_dir, saved["folder"], trainer):
                logger.keep_rows(saved["rows"])
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
    """Read what Lightning is about to log of the batch that ends just now; None in between."""
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
