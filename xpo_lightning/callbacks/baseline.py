"""`Baseline`: logs the validation of the untrained policy."""

from lightning.pytorch import Callback, LightningModule, Trainer

from xpo_lightning.callbacks.base import is_fast_dev_run, runs_whole_sanity_check
from xpo_lightning.core.errors import InputError


class Baseline(Callback):
    """Logs the validation of the untrained policy as step 0.

    It logs the metrics of the sanity check before training, which Lightning otherwise drops. So it costs nothing, but
    needs a sanity check on all validation data (`trainer.num_sanity_val_steps: -1`). A resumed run has no baseline of
    its own, and `trainer.fast_dev_run` has none at all.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer that would validate nothing, or only a part.

        Raises:
            InputError: The sanity check is off, partial, or without data.
        """
        if stage != "fit" or is_fast_dev_run(trainer):
            return
        if not trainer.enable_validation:
            raise InputError(
                "trainer.callbacks: Baseline needs validation prompts and trainer.limit_val_batches above 0; "
                "give them, or remove Baseline"
            )
        if not runs_whole_sanity_check(trainer):
            raise InputError(
                f"trainer.num_sanity_val_steps must be -1 for Baseline, but is {trainer.num_sanity_val_steps}; set it, "
                f"or remove Baseline from trainer.callbacks"
            )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the metrics to the loggers as step 0.

        Raises:
            InputError: There were no validation prompts.
        """
        if trainer.global_step > 0:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("eval/")}
        if not metrics:
            raise InputError("trainer.callbacks: Baseline found no validation prompts; give some, or remove Baseline")
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": 0}, step=0)
            logger.save()
