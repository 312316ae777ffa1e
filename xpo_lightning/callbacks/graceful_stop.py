"""`GracefulStop`: a run that is asked to stop saves what it has."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from xpo_lightning.callbacks.base import is_fast_dev_run, print_line, run_folder
from xpo_lightning.core.errors import InputError, one_line
from xpo_lightning.core.fault_tolerance.guard import StopAsked
from xpo_lightning.core.trainer_progress import batches_done, has_begun
from xpo_lightning.module import XPOLightningModule

FILE_NAME = "stopped.ckpt"


class GracefulStop(Callback):
    """Ends a run cleanly on SIGTERM, or when Ctrl-C is pressed: it saves a checkpoint to go on from.

    A step that has not changed a weight yet is broken off, and taken anew by the run that resumes; a step that has is
    finished first. On several processes, all stop together, whichever is asked. The checkpoint is `stopped.ckpt`, in
    the folder of the run's other checkpoints; a run without checkpoints (`trainer.enable_checkpointing: false`) saves
    none. It is written before any other callback learns of the end. One that fails then, as one that has to write a
    report on a full disk, is named, and changes nothing. A run of one process that an error ends saves in the same way,
    if no weight was changed since its last finished batch. The exit status is 143 after SIGTERM and 130 after Ctrl-C.
    Ctrl-C pressed a second time leaves at once, without saving. The command line adds this callback to every run.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder of the checkpoints, on all processes.

        Raises:
            InputError: Another module, which cannot be stopped in the middle of a step.
        """
        if not isinstance(pl_module, XPOLightningModule):
            raise InputError(
                f"trainer.callbacks: GracefulStop stops an XPOLightningModule, not {type(pl_module).__name__}"
            )
        self._stop = pl_module.guard.stop
        self._stop.status = None
        self._folder = _checkpoint_folder(trainer) if stage == "fit" and not is_fast_dev_run(trainer) else None
        # The first to know when the run ends: nothing that only shows may take the time that is left to save.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(one for one in callbacks if one is not self)]  # type: ignore[attr-defined]

    # Lightning sets its own handlers after `on_fit_start`; theirs wait for other processes, which may be computing.
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        self._listen()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        self._listen()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        self._listen()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, if the run was asked to stop; then let the others know, none of which can undo that or hide why."""
        if isinstance(exception, StopAsked):
            if self._folder is not None and not trainer.sanity_checking:  # Nothing has been trained then.
                self._save(trainer, self._folder)
        elif isinstance(exception, Exception) and self._can_save_after_error(trainer, pl_module):
            self._try_to_save(trainer)
        listed = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = list(listed)  # type: ignore[attr-defined]
        others = listed[listed.index(self) + 1 :]
        del listed[listed.index(self) + 1 :]  # Lightning is going through this list.
        for callback in sorted(others, key=lambda other: not isinstance(other, Checkpoint)):
            try:
                callback.on_exception(trainer, pl_module, exception)
            except Exception as error:  # It may be anybody's.
                print_line(
                    f"{type(callback).__name__} failed as the run ended: {type(error).__name__}: {one_line(error)}"
                )

    def _can_save_after_error(self, trainer: Trainer, module: Any) -> bool:
        """Tell whether there is something to save that is of a finished batch, and no other process to wait for."""
        if self._folder is None or trainer.world_size > 1 or not has_begun(trainer) or not batches_done(trainer):
            return False
        saved = [getattr(one, "_last_global_step_saved", 0) for one in trainer.checkpoint_callbacks]
        return trainer.global_step not in saved and module.run_state.is_settled(trainer)

    def _try_to_save(self, trainer: Trainer) -> None:
        try:
            self._save(trainer, cast("Path", self._folder))
        except Exception as error:  # The one that the run ends with counts.
            print_line(f"No checkpoint of step {trainer.global_step}: {one_line(error)}")

    def _save(self, trainer: Trainer, folder: Path) -> None:
        path = folder / FILE_NAME
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            print_line(f"Stopped at step {trainer.global_step}; --ckpt_path last goes on from {path}")

    def _listen(self) -> None:
        """Set the handlers; Lightning puts back the ones before when the run ends."""
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGINT, self._on_interrupt)

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
    folder = run_folder(trainer)  # It asks all processes, so it comes first.
    if not callbacks:
        return None
    return Path(folders[0]) if folders else folder / "checkpoints"
