"""Lets the processes of a Lightning run learn that one of them has failed or is gone."""

import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from xpo_lightning.core.distributed import is_distributed, origin_of
from xpo_lightning.core.explanations import explanation
from xpo_lightning.core.fault_tolerance.connecting import connect
from xpo_lightning.core.fault_tolerance.lifeline import GRACE, Lifeline


def watch(trainer: Trainer) -> None:
    """Connect a run's processes by a `Lifeline` until the run ends (collective); does nothing if already connected."""
    if not is_distributed():
        return
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, _Raising) and callback.is_watching for callback in callbacks):
        return
    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, _Raising | _Leaving)]
    line = connect(is_one_machine=trainer.num_nodes == 1)
    if line is None:
        rank_zero_warn(
            "The processes cannot connect beside torch.distributed: if one is killed, the others may wait for it until "
            "the strategy's timeout. Let the machines of the run connect to each other on all ports."
        )
        return
    _stand_down_observer()
    callbacks.insert(0, _Raising(line))  # First, because other callbacks may wait for other processes at an error.
    callbacks.append(_Leaving(line))


class _Raising(Callback):
    """Tells the other processes of an error that they do not know of yet."""

    def __init__(self, line: Lifeline) -> None:
        self.line = line

    @property
    def is_watching(self) -> bool:
        return not self.line.has_left

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if origin_of(exception) is None:
            message = explanation(exception) or f"{type(exception).__name__}: {exception}"
            is_interrupt = isinstance(exception, KeyboardInterrupt)
            self.line.fail(_exit_status(exception), message, at_once=is_interrupt)


class _Leaving(Callback):
    """Leaves the lifeline when the processes do nothing more together."""

    def __init__(self, line: Lifeline) -> None:
        self.line = line

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.line.leave(patience=0 if trainer.global_rank else 2 * GRACE)  # The first process is the last to end.

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.line.leave()


def _exit_status(error: BaseException) -> int:
    """Return the exit status of the command line after an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) and error.code else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if explanation(error) else 1


def _stand_down_observer() -> None:
    """Keep Lightning's observer from killing rank 0, and losing its exit status, when another process has ended."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._run = lambda: True  # type: ignore[attr-defined]
