"""Builds the optimizer and its learning-rate schedule, and counts the optimizer steps of a run."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fingerprint import as_json, recorded_path
from xpo_lightning.losses.schedules import LearningRateShape, learning_rate_factor
from xpo_lightning.models.sharding import full_tensor

DEFAULT_LEARNING_RATE = 5e-7


@dataclass
class Optimization:
    """Builds the optimizer and its schedule; the fields are `XPOLightningModule`'s options of the same names.

    Raises:
        InputError: A value is out of range, or two options exclude each other.
    """

    learning_rate: float | None
    optimizer: OptimizerCallable | None
    lr_schedule: LearningRateShape | None
    warmup_ratio: float
    warmup_steps: int | None
    lr_scheduler: LRSchedulerCallable | None
    max_grad_norm: float | None

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("model.warmup_ratio", self.warmup_ratio, least=0, below=1)
        check_range("model.warmup_steps", self.warmup_steps, least=0)
        check_range("model.max_grad_norm", self.max_grad_norm, above=0, or_null=True)
        check_range("model.learning_rate", self.learning_rate, least=0)
        if self.warmup_steps is not None and self.warmup_ratio:
            raise InputError("model.warmup_steps and model.warmup_ratio exclude each other; set one")
        if self.optimizer is not None and self.learning_rate is not None:
            raise InputError("model.learning_rate is that of the built-in optimizer; set lr in model.optimizer instead")
        own = {name: getattr(self, name) for name in ("lr_schedule", "warmup_steps", "warmup_ratio")}
        given = [f"model.{name}" for name, value in own.items() if value]
        if self.lr_scheduler is not None and given:
            raise InputError(f"{', '.join(given)} cannot be set together with model.lr_scheduler; set one or the other")

    @property
    def peak(self) -> float:
        """Peak learning rate of the built-in optimizer."""
        return DEFAULT_LEARNING_RATE if self.learning_rate is None else self.learning_rate

    def build(self, trained: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
        """Build the optimizer and its schedule.

        The default is AdamW without weight decay: decay pulls towards the uniform policy, which would confound
        exploration.

        Args:
            trained: The weights to train.

        Raises:
            InputError: The optimizer or the scheduler is not supported, or refuses its arguments.
        """
        with _naming("model.optimizer"):
            optimizer = self.optimizer(trained) if self.optimizer else AdamW(trained, lr=self.peak, weight_decay=0.0)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InputError("model.optimizer: LBFGS evaluates the loss several times a step; it is not supported")
        if self.lr_scheduler is None:
            shape = self.lr_schedule or "linear"
            return optimizer, WarmupThenDecay(optimizer, shape, self.warmup_ratio, self.warmup_steps)
        with _naming("model.lr_scheduler"):
            scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise InputError("model.lr_scheduler: ReduceLROnPlateau needs a metric at each step; it is not supported")
        return optimizer, scheduler

    def identity(self, trained: list[nn.Parameter]) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed, because the saved state depends on them.

        A scheduler of `model.lr_scheduler` saves its own settings, and the optimizer's settings that it changes, in
        its state, and loading that state overrides the configuration; so with such a scheduler all settings are
        returned.
        """
        optimizer, scheduler = self.build(trained)
        own = isinstance(scheduler, WarmupThenDecay)
        groups = [_settings(group, flags_only=own) for group in optimizer.param_groups]
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        described = {"class": recorded_path(type(optimizer)), "weights": sizes, "groups": groups}
        named: dict[str, Any] = {"optimizer": described}
        if not own:
            named["lr_scheduler"] = {"class": recorded_path(type(scheduler)), **scheduler.state_dict()}
        return {"model": json.loads(as_json(named))}

    def take_settings(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Set an optimizer's settings to the configured ones, which loading its state replaced by the checkpoint's.

        The scheduler sets the learning rate. With a scheduler of `model.lr_scheduler`, the checkpoint's settings stay.
        """
        if not isinstance(scheduler, WarmupThenDecay):
            return
        fresh, _ = self.build([weight for group in optimizer.param_groups for weight in group["params"]])
        for group, configured in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group.update(_settings(configured))

    def clip(self, trained: list[nn.Parameter]) -> Tensor:
        """Clip the gradient to `max_grad_norm` and return its norm before clipping."""
        return full_tensor(clip_grad_norm_(trained, math.inf if self.max_grad_norm is None else self.max_grad_norm))


def _settings(group: dict[str, Any], flags_only: bool = False) -> dict[str, Any]:
    """Return a parameter group's settings except its learning rate; with `flags_only`, the booleans among them."""
    left_out = {"params", "lr"}
    return {
        name: value
        for name, value in group.items()
        if name not in left_out and (isinstance(value, bool) or not flags_only)
    }


@contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}: {error}") from error


class WarmupThenDecay(LambdaLR):
    """Applies `learning_rate_factor` in a run whose length is known only once it starts.

    `begin` sets the length before the first step: asking the trainer for it while optimizers are configured would set
    up the data loaders too early for a resume.

    Args:
        optimizer: The optimizer; the learning rates of its parameter groups are the peak.
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
        """Return the factor of the peak learning rate at this step."""
        return learning_rate_factor(step, self.shape, self.warmup_ratio, self.warmup_steps, self.total_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps taken, without the schedule's options: a resumed run may change them."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of steps taken."""
        self.last_epoch = state_dict["last_epoch"]

    def begin(self, total_steps: int | None) -> None:
        """Set the length of the run, in optimizer steps, and the learning rate of the next step.

        Raises:
            InputError: The learning rate depends on the length of the run, which is not known.
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
        trainer: The trainer, with its data loaders set up.
        steps_per_batch: Optimizer steps taken for each batch.

    Returns:
        The number of steps, or None if neither the data nor the trainer ends the run.
    """
    lengths = [trainer.max_steps] if trainer.max_steps > 0 else []
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    if epochs >= 0 and math.isfinite(trainer.num_training_batches):
        lengths.append(epochs * int(trainer.num_training_batches) * steps_per_batch)
    return min(lengths) if lengths else None
