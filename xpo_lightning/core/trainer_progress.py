"""Reads and repairs Lightning's loop counters, so that a checkpoint always describes a finished batch.

Lightning's own counters are the truth. A checkpoint may be written at any moment, even in the middle of a step or a
validation; it always describes the state after the last finished batch.
"""

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

Counters = dict[str, dict[str, int]]


def has_begun(trainer: Trainer) -> bool:
    """Tell whether training is under way, after the sanity check."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def batches_done(trainer: Trainer) -> int:
    """Return the number of training batches that the run has finished, over all epochs."""
    return _processed(trainer.fit_loop.epoch_loop.batch_progress.total)


def position(trainer: Any) -> tuple[int, int, int | None]:
    """Return where a training loader has to begin.

    Returns:
        The epoch, its first batch to load, and the batch before which it ends, or None if that is not known.
    """
    if not getattr(trainer, "training", False):
        return getattr(trainer, "current_epoch", 0), 0, None
    loop, most = trainer.fit_loop, trainer.num_training_batches
    last = int(most) if math.isfinite(most) else None
    return _processed(loop.epoch_progress.current), _processed(loop.epoch_loop.batch_progress.current), last


def validation_is_due(trainer: Trainer) -> bool:
    """Tell whether a validation is due after the last finished batch; it may have run already."""
    epochs, epoch_loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop
    batches, fetcher = epoch_loop.batch_progress.current, trainer.fit_loop._data_fetcher
    in_epoch, between_batches = _processed(epochs) < epochs.ready, 0 < _processed(batches) == batches.ready
    return in_epoch and between_batches and fetcher is not None and epoch_loop._should_check_val_fx(fetcher)


def normalize_loop_counters(fit_loop: dict[str, Any], trainer: Trainer) -> None:
    """Set a checkpoint's loop counters to those of the last finished batch.

    Lightning infers from small differences between counters in which hook a checkpoint was written, and resumes
    accordingly. It takes the wrong epoch if a checkpoint was written at the end of one with `max_steps` set, counts an
    interrupted batch as trained, and skips a validation that was due. With all counters equal it resumes with the next
    batch. When a run stops amid an epoch, because of `max_steps` or a callback, Lightning also counts the epoch as
    processed; a longer run goes on with its next batch.

    Args:
        fit_loop: State of Lightning's training loop, changed in place.
        trainer: The trainer whose state it is.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    is_left = epochs["current"]["processed"] == epochs["current"]["ready"]
    has_ended = batches["current"]["processed"] == 0 or trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    epoch_is_over = is_left and has_ended
    for counters in (epochs["total"], epochs["current"]):
        done = counters["processed"] - int(is_left and not has_ended)
        begun = done if epoch_is_over else done + 1
        counters.update(ready=begun, started=begun, processed=done, completed=done)
    if epoch_is_over:
        batches["current"]["processed"] = 0
    batches["is_last_batch"] = False
    validation: Counters = fit_loop["epoch_loop.val_loop.batch_progress"]
    validation["current"]["processed"] = validation["total"]["processed"] = 0
    for counters in (batches["total"], batches["current"], validation["total"], validation["current"]):
        counters.update(dict.fromkeys(counters, counters["processed"]))


def begin_batch(trainer: Trainer) -> None:
    """Set the step that loggers see to the number of finished batches; after resuming it would be off by one."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = batches_done(trainer)


def forget_logged(trainer: Trainer) -> None:
    """Keep Lightning from logging an earlier batch's values once more."""
    if trainer._results is not None:
        trainer._results.reset()


def before_training(trainer: Trainer, prepare: Callable[[], None]) -> None:
    """Call a function once all state is restored, before the training loop checks whether any step is left.

    Lightning has no hook there: it does not call `on_train_start` if no step is left.
    """
    loop = trainer.fit_loop
    run = loop.run

    def prepared_run() -> None:
        loop.run = run  # type: ignore[method-assign]
        prepare()
        run()

    loop.run = prepared_run  # type: ignore[method-assign]


def validate_now(trainer: Trainer) -> None:
    """Run the validation that was due when the run was interrupted."""
    trainer.fit_loop.setup_data()
    validation = trainer.fit_loop.epoch_loop.val_loop
    validation.restarting = False
    trainer.validating = True
    validation.run()
    trainer.training = True
    # Otherwise the epoch loop, resumed at the end of an epoch, would skip its next epoch as well.
    validation._has_run = False


def _processed(counters: Any) -> int:
    return int(counters.processed)
