"""`GracefulStop`: saves a checkpoint when a run is asked to stop."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from xpo_lightning.callbacks.base import is_fast_dev_run, our_module, print_line, run_folder
from xpo_lightning.core.errors import one_line
from xpo_lightning.core.fault_tolerance.guard import StopAsked
from xpo_lightning.core.trainer_progress import batches_done, has_begun

FILE_NAME = "stopped.ckpt"


class GracefulStop(Callback):
    """Ends a run cleanly on SIGTERM or Ctrl-C: it saves a checkpoint to resume from.

    It interrupts a step that has not changed a weight yet, which the resumed run takes again; it finishes a step that
    has. All processes of a run stop together, whichever gets the signal. The checkpoint is `stopped.ckpt`, in the
    folder of the run's other checkpoints; a run without checkpoints (`trainer.enable_checkpointing: false`) saves none.
    It is saved before any other callback learns of the end. If one of those then fails, such as a report on a full
    disk, its name is printed, and nothing else changes. A run of one process that ends with an error saves in the same
    way, if no weight was changed since its last finished batch. The exit status is 143 after SIGTERM and 130 after
    Ctrl-C. A second Ctrl-C leaves at once, without saving. The command line adds this callback to every run.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder of the checkpoints (collective), and put this callback first.

        Raises:
            InputError: The module is another one, which cannot be stopped in the middle of a step.
        """
        self._stop = our_module(self, pl_module).guard.stop
        self._stop.status = None
        self._folder = _checkpoint_folder(trainer) if stage == "fit" and not is_fast_dev_run(trainer) else None
        # It comes first when the run ends: callbacks that only show something must not use up the time for saving.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(one for one in callbacks if one is not self)]  # type: ignore[attr-defined]

    # Lightning sets its own handlers after `on_fit_start`; those wait for other ranks, which may be computing.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the signal handlers; Lightning restores the previous ones when the run ends."""
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGINT, self._on_interrupt)

    on_sanity_check_start = on_validation_start = on_predict_start = on_train_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if the run was asked to stop, or if an error allows it; then call the other callbacks.

        An exception in one of those neither undoes the checkpoint nor hides why the run ended.
        """
        if isinstance(exception, StopAsked):
            if self._folder is not None and not trainer.sanity_checking:  # Nothing has been trained then.
                self._save(trainer, self._folder)
        elif isinstance(exception, Exception) and self._can_save_after_error(trainer, pl_module):
            self._try_to_save(trainer)
        listed = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = list(listed)  # type: ignore[attr-defined]
        others = listed[listed.index(self) + 1 :]
        del listed[listed.index(self) + 1 :]  # Lightning is iterating over this list.
        for callback in sorted(others, key=lambda other: not isinstance(other, Checkpoint)):
            try:
                callback.on_exception(trainer, pl_module, exception)
            except Exception as error:  # Callbacks of users may raise anything.
                print_line(
                    f"{type(callback).__name__} failed as the run ended: {type(error).__name__}: {one_line(error)}"
                )

    def _can_save_after_error(self, trainer: Trainer, module: Any) -> bool:
        """Tell whether the weights are those of a finished batch, not saved yet, and no other rank must take part."""
        if self._folder is None or trainer.world_size > 1 or not has_begun(trainer) or not batches_done(trainer):
            return False
        saved = [getattr(one, "_last_global_step_saved", 0) for one in trainer.checkpoint_callbacks]
        return trainer.global_step not in saved and module.run_state.is_settled(trainer)

    def _try_to_save(self, trainer: Trainer) -> None:
        try:
            self._save(trainer, cast("Path", self._folder))
        except Exception as error:  # The error that ends the run must not be hidden.
            print_line(f"No checkpoint of step {trainer.global_step}: {one_line(error)}")

    def _save(self, trainer: Trainer, folder: Path) -> None:
        path = folder / FILE_NAME
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            print_line(f"Stopped at step {trainer.global_step}; --ckpt_path last goes on from {path}")

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._ask(143, "SIGTERM: stopping as soon as nothing is lost")

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._stop.status is not None:
            raise KeyboardInterrupt
        self._ask(130, "Stopping as soon as nothing is lost; press Ctrl-C again to leave at once")

    def _ask(self, status: int, message: str) -> None:
        if self._stop.status is None:
            self._stop.status = status
            sys.stderr.write(f"\n{message}\n")


def _checkpoint_folder(trainer: Trainer) -> Path | None:
    callbacks: list[Any] = trainer.checkpoint_callbacks
    folders = [callback.dirpath for callback in callbacks if isinstance(callback, ModelCheckpoint) and callback.dirpath]
    folder = run_folder(trainer)  # A collective, so all ranks call it before any returns.
    if not callbacks:
        return None
    return Path(folders[0]) if folders else folder / "checkpoints"
