"""The optimizer, its learning rate over steps, and the length of a run."""

import math
from collections.abc import Callable
from functools import partial

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from xpo_lightning.errors import InputError
from xpo_lightning.schedules import LearningRateShape, learning_rate_factor

DEFAULT_LEARNING_RATE = 5e-7


def default_optimizer(learning_rate: float | None) -> Callable[[list[nn.Parameter]], Optimizer]:
    """Make AdamW without weight decay, which would confound exploration: it pulls towards the uniform policy."""
    return partial(AdamW, lr=DEFAULT_LEARNING_RATE if learning_rate is None else learning_rate, weight_decay=0.0)


class WarmupThenDecay(LambdaLR):
    """The learning rate of `learning_rate_factor`, for a run whose length is known only once it starts.

    Asking the trainer for its length while optimizers are configured would lose the data loader's position on resume,
    so the length is given by `begin`, before the first step.

    Args:
        optimizer: Its groups' learning rates are the peak.
        shape: How the rate falls after the warm-up.
        warmup_ratio: Warm-up as a share of the run.
        warmup_steps: Warm-up in optimizer steps, in place of a share.
    """

    def __init__(
        self, optimizer: Optimizer, shape: LearningRateShape, warmup_ratio: float, warmup_steps: int | None
    ) -> None:
        self.shape, self.warmup_ratio, self.warmup_steps = shape, warmup_ratio, warmup_steps
        self.total_steps: int | None = None
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate that this step takes."""
        return learning_rate_factor(step, self.shape, self.warmup_ratio, self.warmup_steps, self.total_steps)

    def begin(self, total_steps: int | None) -> None:
        """Set the length of the run, in optimizer steps, and with it the rate of the next step.

        Raises:
            InputError: The run has no known end, and the rate depends on it.
        """
        depends = self.shape != "constant" or (self.warmup_steps is None and self.warmup_ratio > 0)
        if total_steps is None and depends:
            raise InputError(
                "model.lr_schedule and model.warmup_ratio need the length of the run, which is not known here: "
                "set trainer.max_steps, or model.lr_schedule: constant with model.warmup_steps"
            )
        self.total_steps = total_steps
        factor = self.factor(self.last_epoch)
        for group, peak in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = peak * factor


def total_steps(trainer: Trainer, steps_per_batch: int) -> int | None:
    """Count the optimizer steps of a run that has started.

    Args:
        trainer: The trainer, its loaders set up.
        steps_per_batch: Optimizer steps taken for each batch.

    Returns:
        The number of steps, or None where neither the data nor the trainer ends the run.
    """
    lengths = [trainer.max_steps] if trainer.max_steps > 0 else []
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    if epochs >= 0 and math.isfinite(trainer.num_training_batches):
        lengths.append(epochs * int(trainer.num_training_batches) * steps_per_batch)
    return min(lengths) if lengths else None
