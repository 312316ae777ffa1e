"""Estimates the memory of each rank of a run under `FSDP2Strategy` from the shapes of its models.

`estimate.py` counts what a run on one device holds. This module counts the shard of each of N ranks, and the weights
that a rank holds unsharded: every model while completions are generated and scored, unless an engine generates them; a
few layers at a time in all other passes.
"""

from dataclasses import dataclass

from xpo_lightning.reporting.memory.estimate import MemoryEstimate, MemoryInputs
from xpo_lightning.reporting.memory.model_shape import layer_weight_count, root_weight_count

IN_FLIGHT = 3
"""Layers unsharded at a time in a pass: the current one, the next one, and the buffer that an all-gather fills."""


@dataclass(frozen=True)
class ShardedEstimate:
    """Memory of one of N ranks, in bytes.

    Args:
        parts: Its shards of the policy, the reference, the reward model and copies; they stay allocated while the
            models are unsharded. Without the reference's, if that is offloaded.
        gradients: Its shard of the gradient.
        optimizer: Its shard of the optimizer's state.
        whole: Weights unsharded for sampling and scoring: all of the three models or, where an engine samples, a few
            layers of the one that scores.
        writing: What sampling or scoring needs besides the weights, whichever is more.
        passing: Unsharded weights in forward and backward passes.
        summing: The gradient before ranks reduce it. Until the last micro-batch it is unsharded, unless ranks reduce
            it with each micro-batch.
        micro_batch: Activations of a micro-batch.
        update: Temporary memory of an optimizer step.
    """

    parts: int
    gradients: int
    optimizer: int
    whole: int
    writing: int
    passing: int
    summing: int
    micro_batch: int
    update: int

    @property
    def standing(self) -> int:
        """Memory that is allocated all the time."""
        return self.parts + self.gradients + self.optimizer

    @property
    def named(self) -> dict[str, int]:
        """What a step takes, by name."""
        return {
            "part of the models": self.parts,
            "of gradient and optimizer": self.gradients + self.optimizer,
            "whole weights while it writes or scores": self.whole,
            "completions or reward": self.writing,
            "micro-batch": self.passing + self.summing + self.micro_batch,
        }

    @property
    def rollout_peak(self) -> int:
        """Peak memory while completions are generated and scored."""
        return self.standing + self.whole + self.writing

    @property
    def update_peak(self) -> int:
        """Peak memory while the policy is updated."""
        return self.standing + max(self.passing + self.summing + self.micro_batch, self.update)

    @property
    def peak(self) -> int:
        """Peak memory of a step."""
        return max(self.rollout_peak, self.update_peak)


@dataclass(frozen=True)
class Sharding:
    """How a run is sharded.

    Args:
        processes: Number of ranks that share the weights, N.
        micro_batches: Micro-batches of an optimizer step. With one, ranks reduce gradients layer by layer as they come;
            with more, each rank first accumulates its own, unsharded.
        engine: Whether an engine writes the completions (`model.rollout`).
        reduces_each: `reduce_each_micro_batch` of the strategy.
        offloads: `offload_reference` of the strategy.
    """

    processes: int
    micro_batches: int = 2
    engine: bool = False
    reduces_each: bool = False
    offloads: bool = False


def estimate_sharded(plan: MemoryInputs, alone: MemoryEstimate, sharding: Sharding) -> ShardedEstimate:
    """Estimate the memory of each rank, from the second step on.

    Args:
        plan: Inputs of one rank: `rows`, for example, are those of one rank.
        alone: The estimate for these inputs without sharding.
        sharding: How the run is sharded.
    """
    processes = sharding.processes
    root, layer = _root_and_layer(plan, alone)
    trained_root = root if plan.trains_head else 0
    trained_layer = layer if plan.trains_head else alone.gradients // plan.policy.layers
    buffer = max(trained_root, trained_layer)  # gradients are copied into one buffer to be reduced
    passing = root + IN_FLIGHT * layer
    accumulates = sharding.micro_batches > 1 and not sharding.reduces_each
    kept = alone.models - (alone.reference if sharding.offloads else 0)
    return ShardedEstimate(
        parts=-(-kept // processes),
        gradients=-(-alone.gradients // processes),
        optimizer=-(-alone.optimizer // processes),
        whole=max(passing, _reward_in_passes(plan)) if sharding.engine else alone.models - alone.copies,
        writing=max(alone.rollout, alone.scoring),
        passing=passing,
        summing=(alone.gradients if accumulates else trained_root + trained_layer) + buffer,
        micro_batch=alone.micro_batch,
        update=-(-alone.update // processes),
    )


def _root_and_layer(plan: MemoryInputs, alone: MemoryEstimate) -> tuple[int, int]:
    """Return the bytes of the policy's weights outside of layers, and of a layer with its adapters."""
    root = int(root_weight_count(plan.policy) * plan.weight_bytes)
    return root, (alone.policy - root) // plan.policy.layers


def _reward_in_passes(plan: MemoryInputs) -> int:
    """Count the bytes of the reward model that are unsharded while it scores layer by layer."""
    if plan.reward is None:
        return 0
    weights = root_weight_count(plan.reward) + IN_FLIGHT * layer_weight_count(plan.reward)
    return int(weights * plan.reward_bytes)
