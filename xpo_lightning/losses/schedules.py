"""Values that change over training: schedules of alpha and beta, and the learning rate's factor."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError


@dataclass(frozen=True)
class Progress:
    """A point of training.

    Args:
        step: Optimizer steps taken.
        epoch: Epochs finished.
        total_steps: Optimizer steps of the run, None if the run has no known end.
        batches: Batches (rollouts with the updates on them) finished.
    """

    step: int
    epoch: int
    total_steps: int | None
    batches: int = 0


FIRST_STEP = Progress(step=0, epoch=0, total_steps=1)
"""The start of any run, whatever its length."""


class Schedule(ABC):
    """A number that changes with the progress of training."""

    @abstractmethod
    def __call__(self, progress: Progress) -> float:
        """Return the value at a point of training.

        Args:
            progress: The point of training.
        """


class Constant(Schedule):
    """The same value throughout.

    Args:
        value: The value.
    """

    def __init__(self, value: float) -> None:
        _check_finite(value=value)
        self.value = value

    def __call__(self, progress: Progress) -> float:
        """See `Schedule`."""
        return self.value


class PerEpoch(Schedule):
    """One value for each epoch; the last one holds from its epoch on.

    Args:
        values: The values, first epoch first.
    """

    def __init__(self, values: list[float]) -> None:
        if not values:
            raise InputError("the per-epoch list of values of a schedule (model.alpha, model.beta) must not be empty")
        for value in values:
            _check_finite(values=value)
        self.values = [float(value) for value in values]

    def __call__(self, progress: Progress) -> float:
        """See `Schedule`."""
        return self.values[min(progress.epoch, len(self.values) - 1)]


class PerIteration(Schedule):
    """One value for each iteration; the last one holds from its iteration on.

    The paper's own runs have three iterations with alpha 1e-5, 5e-6 and 0 (arXiv 2405.21046, Appendix E).

    Args:
        values: The values, first iteration first.
        batches: Batches (rollouts with the updates on them) that make an iteration.
    """

    def __init__(self, values: list[float], batches: int = 1) -> None:
        if not values:
            raise InputError("the values of a PerIteration schedule (model.alpha, model.beta) must not be empty")
        for value in values:
            _check_finite(values=value)
        check_range("batches of a schedule (model.alpha, model.beta)", batches, least=1)
        self.values, self.batches = [float(value) for value in values], batches

    def __call__(self, progress: Progress) -> float:
        """See `Schedule`."""
        return self.values[min(progress.batches // self.batches, len(self.values) - 1)]


class Linear(Schedule):
    """A straight line over steps, from `start` to `end`, which then holds.

    Args:
        start: Value at the first step.
        end: Value from `steps` on.
        steps: Optimizer steps from `start` to `end`; the whole run where None.
    """

    def __init__(self, start: float, end: float, steps: int | None = None) -> None:
        check_range("steps of a schedule (model.alpha, model.beta)", steps, least=1)
        _check_finite(start=start, end=end)
        self.start, self.end, self.steps = start, end, steps

    def __call__(self, progress: Progress) -> float:
        """See `Schedule`."""
        return self.start + (self.end - self.start) * self.shape(_share_done(progress, self.steps))

    def shape(self, share: float) -> float:
        """Map the share of the steps done to the share of the change made.

        Args:
            share: In [0, 1].

        Returns:
            In [0, 1].
        """
        return share


class Cosine(Linear):
    """Half a cosine over steps, from `start` to `end`, which then holds.

    Args:
        start: Value at the first step.
        end: Value from `steps` on.
        steps: Optimizer steps from `start` to `end`; the whole run where None.
    """

    def shape(self, share: float) -> float:
        """See `Linear.shape`."""
        return (1 - math.cos(math.pi * share)) / 2


def as_schedule(value: float | list[float] | Schedule, key: str = "model.alpha") -> Schedule:
    """Turn a number, or a list with one number per epoch, into a schedule.

    Args:
        value: A number, one number per epoch, or a schedule, which is returned unchecked.
        key: The configuration key that holds it, for the error.

    Raises:
        InputError: A number is not finite, or the list is empty.
    """
    if isinstance(value, Schedule):
        return value
    if value == [] or not all(map(math.isfinite, _numbers(value))):
        raise InputError(f"{key} must be a finite number, or a list of them, one an epoch, but is {value}")
    if isinstance(value, list):
        return PerEpoch(value)
    return Constant(float(value))


def as_positive_schedule(value: float | list[float] | Schedule, key: str) -> Schedule:
    """Turn a number above 0, or a list with one per epoch, into a schedule.

    Args:
        value: A number, one number per epoch, or a schedule, which is returned unchecked.
        key: The configuration key that holds it, for the error.

    Raises:
        InputError: A number is not finite or not above 0, or the list is empty.
    """
    if any(number <= 0 for number in _numbers(value)):
        raise InputError(f"{key} must be above 0, but is {value}")
    return as_schedule(value, key)


def _numbers(value: float | list[float] | Schedule) -> list[float]:
    return value if isinstance(value, list) else [] if isinstance(value, Schedule) else [value]


def _check_finite(**arguments: float) -> None:
    for name, value in arguments.items():
        if not math.isfinite(value):
            raise InputError(f"{name} of a schedule (model.alpha, model.beta) must be finite, but is {value}")


LearningRateShape = Literal["linear", "cosine", "constant"]


def learning_rate_factor(
    step: int, shape: LearningRateShape, warmup_ratio: float, warmup_steps: int | None, total_steps: int | None
) -> float:
    """Return the share of the peak learning rate for optimizer step `step` (from 0).

    The rate rises linearly during the warm-up and reaches the peak at its last step. Its first step is already above 0,
    where transformers' schedules waste one step at 0. After the warm-up the rate falls to 0 at the end of the run,
    unless the shape is constant.

    Args:
        step: Optimizer steps taken before this one.
        shape: How the rate falls after the warm-up.
        warmup_ratio: Warm-up as a share of the run, rounded up to full steps. Ignored if `warmup_steps` is given.
        warmup_steps: Warm-up in steps.
        total_steps: Steps of the run. May be None for a constant shape whose warm-up is given in steps or absent.

    Returns:
        A factor in (0, 1], or 0 past the end.
    """
    if warmup_steps is None:
        warmup_steps = count_warmup_steps(warmup_ratio, total_steps or 0)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if shape == "constant" or total_steps is None:
        return 1.0
    share = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return 1 - share if shape == "linear" else (1 + math.cos(math.pi * share)) / 2


def count_warmup_steps(warmup_ratio: float, total_steps: int) -> int:
    """Return a share of a run in steps, rounded up.

    In floats 0.07 * 100 is above 7, so the ratio is first converted to the fraction that it stands for: 7/100.
    """
    return math.ceil(Fraction(warmup_ratio).limit_denominator(10**12) * total_steps)


def _share_done(progress: Progress, steps: int | None) -> float:
    steps = steps if steps is not None else progress.total_steps
    if steps is None:
        raise InputError(
            "a schedule over the whole run needs its length: set steps in the schedule, or trainer.max_steps"
        )
    return min(progress.step / steps, 1.0)
