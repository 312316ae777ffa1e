"""The memory of runs whose models are not here: standing memory worked out from shapes, in place of loaded models."""

from dataclasses import dataclass, replace

from xpo_lightning.reporting.memory import estimate as steps
from xpo_lightning.reporting.memory import fsdp
from xpo_lightning.reporting.memory.estimate import FLOAT32, MemoryEstimate, MemoryInputs, Standing
from xpo_lightning.reporting.memory.model_shape import Shape, weight_count


@dataclass(frozen=True)
class RunInputs(MemoryInputs):
    """The settings of a run on one device that its memory depends on.

    Args:
        lora_rank: Rank of adapters on all linear layers, which are float32; None trains every weight.
        optimizer_states: Numbers that the optimizer keeps per trained weight: 2 for Adam, 1 for momentum.
        copies: Further copies of the trained weights: 2 for `PreviousPolicySampler`, 1 for `reference_refresh`.
        policy_weights: Number of the policy's weights without adapters; None counts those of the shape.
    """

    lora_rank: int | None = None
    optimizer_states: float = 2
    copies: int = 0
    policy_weights: int | None = None


def estimate(plan: RunInputs) -> MemoryEstimate:
    """Estimate the memory of a run from the second step on, when gradients and the optimizer's state are allocated."""
    adapted = plan.lora_rank is not None
    count = weight_count(plan.policy) if plan.policy_weights is None else plan.policy_weights
    policy = int(count * plan.weight_bytes)
    adapters = adapter_count(plan.policy, plan.lora_rank) * FLOAT32 if plan.lora_rank is not None else 0
    trained = adapters if adapted else policy
    standing = Standing(
        policy=policy + adapters,
        reference=0 if adapted else policy,
        reward=int(weight_count(plan.reward) * plan.reward_bytes) if plan.reward else 0,
        copies=plan.copies * trained,
        gradients=trained,
        optimizer=int(plan.optimizer_states * trained),
    )
    return steps.estimate(replace(plan, trains_head=not adapted, cast_weights=count), standing)


def estimate_sharded(plan: RunInputs, sharding: fsdp.Sharding) -> fsdp.ShardedEstimate:
    """Estimate the memory of each rank of a sharded run; `rows`, for example, are those of one rank."""
    return fsdp.estimate_sharded(replace(plan, trains_head=plan.lora_rank is None), estimate(plan), sharding)


def adapter_count(shape: Shape, rank: int) -> int:
    """Count the weights of LoRA adapters on all linear layers: rank times inputs plus outputs of each."""
    queries, keys = shape.hidden + shape.heads * shape.head_dim, shape.hidden + shape.kv_heads * shape.head_dim
    feed_forward = (3 if shape.gated else 2) * (shape.hidden + shape.intermediate)
    return shape.layers * rank * (2 * queries + 2 * keys + feed_forward)
