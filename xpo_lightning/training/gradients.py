"""Accumulates the gradient of an optimizer step over its micro-batches."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.distributed import all_gather, is_distributed
from xpo_lightning.core.errors import ConsequentError
from xpo_lightning.core.fault_tolerance.guard import Stop, check_finite, format_prompts
from xpo_lightning.core.timer import PhaseTimer
from xpo_lightning.models.forward.cpu_attention import for_any_shape
from xpo_lightning.models.sharding import gradients_together, is_sharded
from xpo_lightning.training.objective import Objective
from xpo_lightning.training.optimizer import Optimization
from xpo_lightning.training.update_plan import Pairs

CONSEQUENCE = "no step was taken on them, and no weight was changed"


class Trained(Protocol):
    """Interface that `add_gradients` needs of a module; `XPOLightningModule` has it."""

    objective: Objective
    optimization: Optimization
    policy: nn.Module
    timer: PhaseTimer

    @property
    def trainer(self) -> Trainer:
        """The trainer, which knows the strategy and the world size."""

    def manual_backward(self, loss: Tensor) -> None:
        """Run the backward pass."""

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the weights that are trained."""


@dataclass(frozen=True)
class Summands:
    """Metrics and prompts of the pairs that this rank added to the gradient.

    Args:
        numbers: The metrics of each micro-batch.
        prompts: The prompts of the micro-batches, in the same order.
    """

    numbers: list[dict[str, Tensor]] = field(default_factory=list)
    prompts: list[RawPrompt] = field(default_factory=list)

    def check(self, norm: Tensor) -> Tensor:
        """Return the gradient's norm if it and the losses are finite; refuse them otherwise.

        Raises:
            NonFiniteError: A loss or the norm is not finite; the message shows the prompts.
        """
        losses = torch.cat([measured["loss/total"] for measured in self.numbers])
        check_finite([("the loss", losses)], self.prompts, CONSEQUENCE)
        if not norm.isfinite():
            others = " and prompts of the other processes" * is_distributed()
            raise ConsequentError(
                f"the norm of the gradient is {float(norm)} for {format_prompts(self.prompts)}{others}; {CONSEQUENCE}"
            )
        return norm


def add_gradients(
    module: Trained, pairs: Pairs, micro_batches: list[list[int]], weights: dict[str, float], stop: Stop | None
) -> Summands:
    """Accumulate the gradient of the mean objective of some pairs, over micro-batches and ranks (collective).

    Ranks wait for each other inside, so it must not run under the guard. Check the result after `clip_gradient`, which
    is a collective too.

    Args:
        module: The module that is trained.
        pairs: Source of the pairs.
        micro_batches: The rows of each micro-batch.
        weights: Alpha and beta.
        stop: Checked between micro-batches if the run has one process; None for no check.

    Returns:
        Metrics and prompts of this rank's pairs.

    Raises:
        StopAsked: The run has been asked to stop.
    """
    timer, trainer = module.timer, module.trainer
    count, most = sum(map(len, micro_batches)), len(micro_batches)
    if is_sharded(module.policy):  # Each pass gathers weights, so all ranks must run equally many.
        most = max(all_gather(most))
    added = Summands()
    # With several ranks, one must not stop by itself: the others would wait for its gradient.
    alone = trainer.world_size == 1
    for place in range(most):
        if stop is not None and alone:
            stop.check()
        counts = place < len(micro_batches)
        experience = pairs.select(micro_batches[min(place, len(micro_batches) - 1)])
        device = experience.labels.device
        with for_any_shape(device), timer("policy_forward", device):
            losses, measured = module.objective.evaluate(module.policy, experience, **weights)
        # The backward pass may recompute layers, so it runs under `for_any_shape` too.
        together = _together(module.policy, trainer, place == most - 1)
        with for_any_shape(device), timer("backward", device), together:
            module.manual_backward(losses.sum() / count * counts)
        if counts:
            added.numbers.append(measured)
            added.prompts.extend(experience.prompts.raw)
    return added


def clip_gradient(module: Trained) -> Tensor:
    """Clip the gradient to `max_grad_norm` (collective).

    Returns:
        The norm before clipping, the same on all ranks.
    """
    trained = module.trained_parameters()
    with module.timer("optimizer", trained[0].device):
        return module.optimization.clip(trained)


def _together(policy: nn.Module, trainer: Trainer, is_last: bool) -> AbstractContextManager[Any]:
    """Synchronise gradients on the last micro-batch only, or on each as `FSDP2Strategy` may be asked to."""
    if is_sharded(policy):
        return gradients_together(policy, is_last or getattr(trainer.strategy, "reduce_each_micro_batch", False))
    strategy = trainer.strategy
    return nullcontext() if is_last or not isinstance(strategy, ParallelStrategy) else strategy.block_backward_sync()
