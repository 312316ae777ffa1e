"""How much memory each process of a run under `FSDP2Strategy` takes, worked out from the shapes of its models.

`estimate.py` counts what a run holds; here is which of it each of N processes holds a part of, and when it holds all:
every model while completions are written and scored, a layer at a time in forward and backward passes.
"""

from dataclasses import dataclass

from xpo_lightning.reporting.memory.estimate import MemoryEstimate, MemoryInputs, estimate
from xpo_lightning.reporting.memory.model_shape import Shape, weight_count

IN_FLIGHT = 3
"""Layers that are whole at a time in a pass: the one at work, the next one, and the buffer that a gather fills."""


@dataclass(frozen=True)
class ShardedFootprint:
    """What one of N processes takes, in bytes.

    Args:
        parts: Its parts of the policy, the reference, the reward model and copies; there all the time, also while they
            are whole.
        gradients: Its part of the gradient.
        optimizer: Its part of what the optimizer keeps.
        whole: All weights of the three models, while they write and score.
        writing: What sampling needs beside them, or scoring, whichever is more.
        passing: Weights that are whole in forward and backward passes.
        summing: The gradient before processes add it up. Until the last micro-batch it is whole.
        micro_batch: Activations of a micro-batch.
        update: While the optimizer takes a step.
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
        """What is there all the time."""
        return self.parts + self.gradients + self.optimizer

    @property
    def rollout_peak(self) -> int:
        """The most while completions are written and scored."""
        return self.standing + self.whole + self.writing

    @property
    def update_peak(self) -> int:
        """The most while the policy is updated."""
        return self.standing + max(self.passing + self.summing + self.micro_batch, self.update)

    @property
    def peak(self) -> int:
        """The most that is there at a time."""
        return max(self.rollout_peak, self.update_peak)


def estimate_sharded(plan: MemoryInputs, processes: int, micro_batches: int = 2) -> ShardedFootprint:
    """Work out what each process takes, from the second step on.

    Args:
        plan: What one process does: `rows`, for example, are its own.
        processes: How many share the weights, N.
        micro_batches: Micro-batches of an optimizer step. With one, gradients are added up layer by layer as they come;
            with more, each process first adds up its own, whole.
    """
    alone = estimate(plan)
    models = alone.policy + alone.reference + alone.reward
    root, layer = _root_and_layer(plan, alone)
    trained_root = 0 if plan.lora_rank is not None else root
    trained_layer = alone.gradients // plan.policy.layers if plan.lora_rank is not None else layer
    buffer = max(trained_root, trained_layer)  # what processes add up is copied into one
    return ShardedFootprint(
        parts=-(-(models + alone.copies) // processes),
        gradients=-(-alone.gradients // processes),
        optimizer=-(-alone.optimizer // processes),
        whole=models,
        writing=max(alone.rollout, alone.scoring),
        passing=root + IN_FLIGHT * layer,
        summing=(alone.gradients if micro_batches > 1 else trained_root + trained_layer) + buffer,
        micro_batch=alone.micro_batch,
        update=-(-alone.update // processes),
    )


def root_weight_count(shape: Shape) -> int:
    """Count the weights outside of layers: the embedding, the vocabulary head, and the last norm."""
    return shape.vocabulary * shape.hidden * (1 if shape.tied else 2) + shape.hidden


def layer_weight_count(shape: Shape) -> int:
    """Count the weights of a layer."""
    return (weight_count(shape) - root_weight_count(shape)) // shape.layers


def _root_and_layer(plan: MemoryInputs, alone: MemoryEstimate) -> tuple[int, int]:
    """Return the bytes of the policy's root, and of a layer with its adapters."""
    root = int(root_weight_count(plan.policy) * plan.weight_bytes)
    return root, (alone.policy - root) // plan.policy.layers
