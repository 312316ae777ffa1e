"""`GracefulStop`: a run that is asked to stop saves what it has."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from xpo_lightning.callbacks.run import is_fast_dev_run, run_folder, say
from xpo_lightning.errors import InputError
from xpo_lightning.guard.guarding import StopAsked
from xpo_lightning.module import XPOLightningModule

FILE_NAME = "stopped.ckpt"


class GracefulStop(Callback):
    """Ends a run cleanly on SIGTERM, or when Ctrl-C is pressed: it saves a checkpoint to go on from.

    A step that has not changed a weight yet is broken off, and taken anew by the run that resumes; a step that has is
    finished first. On several processes, all stop together, whichever is asked. The checkpoint is `stopped.ckpt`, in
    the folder of the run's other checkpoints; a run without checkpoints (`trainer.enable_checkpointing: false`) saves
    none. The exit status is 143 after SIGTERM and 130 after Ctrl-C. Ctrl-C pressed a second time leaves at once,
    without saving. The command line adds this callback to every run.
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
        """Save, if the run was asked to stop."""
        if not isinstance(exception, StopAsked):
            return
        if self._folder is not None and not trainer.sanity_checking:  # Nothing has been trained then.
            path = self._folder / FILE_NAME
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:
                say(f"Stopped at step {trainer.global_step}; --ckpt_path last goes on from {path}")

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
