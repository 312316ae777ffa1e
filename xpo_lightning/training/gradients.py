"""The gradient of an optimizer step, added up micro-batch by micro-batch."""

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


@dataclass(frozen=True)
class Summands:
    """What was added up in this process.

    Args:
        numbers: The metrics of each micro-batch.
        prompts: The prompts, in the same order.
    """

    numbers: list[dict[str, Tensor]] = field(default_factory=list)
    prompts: list[RawPrompt] = field(default_factory=list)

    def check(self, norm: Tensor) -> Tensor:
        """Refuse losses or a gradient that are not finite; give its norm back otherwise.

        Raises:
            NonFiniteError: Some are not; the message shows their prompts.
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
    """Add up the gradient of the mean objective of some pairs, over micro-batches and processes.

    Processes wait for each other inside, so it must not be given to the guard. The result is to be checked once the
    gradient is clipped, for which they wait for each other too.

    Args:
        module: What is trained.
        pairs: Where the pairs are.
        micro_batches: Their rows, as many at once as fit.
        weights: Alpha and beta.
        stop: Looked at between micro-batches, unless it is None.

    Returns:
        What was added up here.

    Raises:
        StopAsked: The run is asked to stop.
    """
    timer, trainer = module.timer, module.trainer
    count, most = sum(map(len, micro_batches)), len(micro_batches)
    if is_sharded(module.policy):  # Each pass gathers weights, so all processes must take as many.
        most = max(all_gather(most))
    added = Summands()
    # A process alone must not break off between gradients that all processes add up.
    alone = trainer.world_size == 1
    for place in range(most):
        if stop is not None and alone:
            stop.check()
        counts = place < len(micro_batches)
        experience = pairs.select(micro_batches[min(place, len(micro_batches) - 1)])
        device = experience.labels.device
        with for_any_shape(device), timer("policy_forward", device):
            losses, measured = module.objective.evaluate(module.policy, experience, **weights)
        # Layers may be computed again in here.
        together = _together(module.policy, trainer, place == most - 1)
        with for_any_shape(device), timer("backward", device), together:
            module.manual_backward(losses.sum() / count * counts)
        if counts:
            added.numbers.append(measured)
            added.prompts.extend(experience.prompts.raw)
    return added


def clip_gradient(module: Trained) -> Tensor:
    """Scale the gradient down to the largest norm that is allowed; all processes must call it.

    Returns:
        The norm before that, the same on all processes.
    """
    trained = module.trained_parameters()
    with module.timer("optimizer", trained[0].device):
        return module.optimization.clip(trained)


def _together(policy: nn.Module, trainer: Trainer, is_last: bool) -> AbstractContextManager[Any]:
    """Let processes add up their gradients with the last micro-batch only: they may differ in how many they have."""
    if is_sharded(policy):
        return gradients_together(policy, is_last=is_last)
    strategy = trainer.strategy
    return nullcontext() if is_last or not isinstance(strategy, ParallelStrategy) else strategy.block_backward_sync()
