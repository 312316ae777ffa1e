"""The gradient of an optimizer step, added up micro-batch by micro-batch."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from xpo_lightning.batch import RawPrompt
from xpo_lightning.errors import NonFiniteError
from xpo_lightning.guard.guarding import Stop, check_finite, shown
from xpo_lightning.guard.midway import gathered_midway
from xpo_lightning.objective import Objective
from xpo_lightning.optimization import Optimization
from xpo_lightning.phases import PhaseTimer
from xpo_lightning.sharding import gradients_together, is_sharded
from xpo_lightning.updates import Pairs

CONSEQUENCE = "no step was taken on them, and no weight was changed"


class Trained(Protocol):
    """What `add_gradients` needs of a module; `XPOLightningModule` has it."""

    objective: Objective
    optimization: Optimization
    policy: nn.Module
    timer: PhaseTimer

    @property
    def trainer(self) -> Trainer:
        """The trainer, which knows the processes."""

    def manual_backward(self, loss: Tensor) -> None:
        """Run the backward pass."""

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the weights that are trained."""


def add_gradients(
    module: Trained, pairs: Pairs, micro_batches: list[list[int]], weights: dict[str, float], stop: Stop | None
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Add up the gradient of the mean objective of some pairs.

    Args:
        module: What is trained.
        pairs: Where the pairs are.
        micro_batches: Their rows, as many at once as fit.
        weights: Alpha and beta.
        stop: Looked at between micro-batches, unless it is None.

    Returns:
        The gradient's norm before it was clipped, and the metrics of each micro-batch.

    Raises:
        NonFiniteError: The objective of a pair or the gradient is not finite.
        StopAsked: The run is asked to stop.
    """
    timer, trainer = module.timer, module.trainer
    count, most = sum(map(len, micro_batches)), len(micro_batches)
    sharded = is_sharded(module.policy)
    if sharded:  # Each pass gathers weights, so all processes must take as many.
        most = max(gathered_midway(most))
    numbers: list[dict[str, Tensor]] = []
    prompts: list[RawPrompt] = []
    # A process alone must not break off between gradients that all processes add up.
    alone = trainer.world_size == 1
    for place in range(most):
        if stop is not None and alone:
            stop.check()
        counts = place < len(micro_batches)
        experience = pairs.select(micro_batches[min(place, len(micro_batches) - 1)])
        device = experience.labels.device
        with timer("policy_forward", device):
            losses, measured = module.objective(module.policy, experience, **weights)
        with timer("backward", device), _together(module.policy, trainer, place == most - 1):
            module.manual_backward(losses.sum() / count * counts)
        if counts:
            numbers.append(measured)
            prompts += experience.prompts.raw
    losses = torch.cat([measured["loss/total"] for measured in numbers])
    check_finite([("the loss", losses)], prompts, CONSEQUENCE)
    with timer("optimizer", losses.device):
        norm = module.optimization.clip(module.trained_parameters())
    if not norm.isfinite():
        raise NonFiniteError(f"the norm of the gradient is {float(norm)} for {shown(prompts)}; {CONSEQUENCE}")
    return norm, numbers


def _together(policy: nn.Module, trainer: Trainer, is_last: bool) -> AbstractContextManager[Any]:
    """Let processes add up their gradients with the last micro-batch only: they may differ in how many they have."""
    if is_sharded(policy):
        return gradients_together(policy, is_last=is_last)
    strategy = trainer.strategy
    return nullcontext() if is_last or not isinstance(strategy, ParallelStrategy) else strategy.block_backward_sync()
