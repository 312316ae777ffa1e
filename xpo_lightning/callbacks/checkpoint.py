"""`RunCheckpoint`: Lightning's `ModelCheckpoint`, for a module that takes its optimizer steps itself."""

import re
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.trainer_progress import validation_is_due


class RunCheckpoint(ModelCheckpoint):
    """Saves checkpoints, as `lightning.pytorch.callbacks.ModelCheckpoint` with the same options does.

    It differs where Lightning's does not support a module that takes its optimizer steps itself: it honours
    `train_time_interval`; `every_n_train_steps` also saves if a batch takes several steps and passes a multiple of it;
    and a checkpoint that is due together with a validation is saved after it, with its metrics. And with `save_last:
    true`, the last checkpoint is saved whenever one is due, also if it is none of the best, and when training ends.

    Raises:
        InputError: The file's name would have a `/` in it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        inserted = self.filename if self.auto_insert_metric_name else re.sub(r"{.*?}", "", self.filename or "")
        if "/" in (inserted or ""):
            raise InputError(
                f"trainer.callbacks: RunCheckpoint.filename '{self.filename}' puts checkpoints into folders of their "
                f"own, where a resumed run does not look; for a metric, set auto_insert_metric_name to false and write "
                f"a filename as 'step={{step}}-win_rate={{eval/win_rate:.2f}}'"
            )
        self._steps_before = 0
        self._waits_for_validation = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the number of optimizer steps before the batch."""
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due, or wait for a validation that is due now too."""
        if self._is_due(trainer):
            self._last_time_checked = time.monotonic()
            self._waits_for_validation = validation_is_due(trainer)
            if not self._waits_for_validation:
                self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the checkpoint that waited for the validation, or what Lightning saves after one."""
        if self._waits_for_validation and not trainer.sanity_checking:
            self._waits_for_validation = False
            self._save(trainer)
        else:
            super().on_validation_end(trainer, pl_module)
            self._save_none_of_the_best(trainer, is_time=not self._should_save_on_train_epoch_end(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what Lightning saves then, unless the watched metric waits for the first validation."""
        no_validation_yet = not trainer.fit_loop.epoch_loop.val_loop._has_run
        if not (no_validation_yet and self.monitor is not None and self.monitor not in trainer.callback_metrics):
            super().on_train_epoch_end(trainer, pl_module)
            self._save_none_of_the_best(trainer, is_time=self._should_save_on_train_epoch_end(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last checkpoint, if training went on after it was saved."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        if self.save_last is True:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        else:
            super().on_train_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record that this step has been saved, unless a validation is to be made up for, and what is due after it."""
        if not checkpoint.get("xpo_run", {}).get("validate"):
            self._last_global_step_saved = checkpoint["global_step"]

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state, and whether a checkpoint waits for a validation."""
        return {**super().state_dict(), "waits_for_validation": self._waits_for_validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state_dict)
        self._waits_for_validation = state_dict.get("waits_for_validation", False)

    def _is_due(self, trainer: Trainer) -> bool:
        every, interval = self._every_n_train_steps, self._train_time_interval
        if every >= 1 and trainer.global_step // every > self._steps_before // every:
            return True
        if interval is None:
            return False
        since = time.monotonic() - (self._last_time_checked or 0)
        return bool(trainer.strategy.broadcast(since >= interval.total_seconds()))  # Clocks differ between processes.

    def _save_none_of_the_best(self, trainer: Trainer, *, is_time: bool) -> None:
        """Save the last checkpoint where one is due, and Lightning has saved none, as it was none of the best."""
        every = self._every_n_epochs
        is_due = is_time and every >= 1 and (trainer.current_epoch + 1) % every == 0
        if is_due and self.save_last is True and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        if self.monitor is not None and self.monitor not in candidates:
            self._waits_for_validation = True  # The metric has not been logged yet.
        elif not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
