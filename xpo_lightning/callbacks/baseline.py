"""`Baseline`: logs the validation of the untrained policy."""

from lightning.pytorch import Callback, LightningModule, Trainer

from xpo_lightning.callbacks.base import is_fast_dev_run
from xpo_lightning.core.errors import InputError


class Baseline(Callback):
    """Logs the validation of the untrained policy as step 0.

    It makes Lightning's sanity check before training a validation on all validation data, whatever
    `trainer.num_sanity_val_steps` is, and logs its metrics, which Lightning otherwise drops. A resumed run has no
    baseline of its own, and `trainer.fast_dev_run` has none at all.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Extend the sanity check to all validation data.

        Raises:
            InputError: The trainer validates nothing.
        """
        if stage != "fit" or is_fast_dev_run(trainer):
            return
        if not trainer.enable_validation:
            raise InputError(
                "trainer.callbacks: Baseline needs validation prompts and trainer.limit_val_batches above 0; "
                "give them, or remove Baseline"
            )
        trainer.num_sanity_val_steps = float("inf")

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
