"""Says how much memory a run takes whose models are loaded: theirs is counted, and that of a step is estimated."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from xpo_lightning.models.forward.causal_forward import base_of
from xpo_lightning.models.forward.cpu_attention import cache_dtype
from xpo_lightning.models.snapshot import Snapshot
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.reporting.memory.estimate import MemoryEstimate, MemoryInputs, Standing, estimate
from xpo_lightning.reporting.memory.fsdp import ShardedEstimate, Sharding, estimate_sharded
from xpo_lightning.reporting.memory.model_shape import Shape
from xpo_lightning.rewards import SequenceClassifierReward
from xpo_lightning.rollout.kv_cache import most_rows
from xpo_lightning.rollout.local import TOKENS_AT_ONCE
from xpo_lightning.rollout.opening import REPLAYING


def count(model: nn.Module) -> int:
    """Count the weights of a model."""
    return sum(weight.numel() for weight in model.parameters())


def memory_of_run(
    module: XPOLightningModule, optimizer: Optimizer, *, batch_size: int, longest: int, computes_in_bfloat16: bool
) -> MemoryEstimate | ShardedEstimate | None:
    """Estimate the memory of a run on each of its devices.

    Args:
        module: The module, with its models loaded.
        optimizer: The module's optimizer.
        batch_size: Prompts in a batch.
        longest: Tokens of the longest prompt.
        computes_in_bfloat16: Whether the trainer's precision is mixed.

    Returns:
        The estimate; None if the config of the policy or of the reward model does not give the sizes of a transformer.
    """
    policy = base_of(module.policy)
    reward = max(rewards_with_models(module), key=count, default=None)
    try:
        shape = Shape.of(policy.config)
        of_reward = None if reward is None or reward.model is None else Shape.of(reward.model.config)
    except ValueError:
        return None
    base = [weight for name, weight in policy.named_parameters() if "lora_" not in name]
    weight_bytes = _bytes(base) / sum(map(torch.numel, base))
    device = module.device.type
    cached = cache_dtype(policy)
    new = module.sampling.max_new_tokens
    rows = min(batch_size, most_rows(policy, longest + new)) if device == "cpu" else batch_size
    pairs = min(batch_size, module.plan.most_pairs(longest, new))
    sharding = _sharding_of(module, -(-batch_size // pairs))
    compute = 2 if computes_in_bfloat16 else round(weight_bytes)
    plan = MemoryInputs(
        policy=shape,
        weight_bytes=weight_bytes,
        compute_bytes=compute,
        cache_bytes=compute if cached is None else cached.itemsize,
        gradient_checkpointing=getattr(module.policy_spec, "gradient_checkpointing", False),
        trains_head=module.lora is None,
        cast_weights=sum(map(torch.numel, base)),
        rows=min(batch_size, module.rollout_batch_size or rows),
        prompt_tokens=longest,
        new_tokens=new,
        micro_batch_size=pairs,
        completions=module.plan.completions,
        replays=device in REPLAYING and module.rollout_graphs and sharding is None,
        read_tokens=TOKENS_AT_ONCE.get(device, TOKENS_AT_ONCE["cuda"]),
    )
    if reward is not None and of_reward is not None:
        plan = replace(
            plan,
            reward=of_reward,
            reward_bytes=next(reward.parameters()).element_size(),
            reward_rows=min(reward.rows_together(longest + new), 2 * module.candidates.count * batch_size),
        )
    alone = estimate(plan, standing_memory(module, optimizer))
    return alone if sharding is None else estimate_sharded(plan, alone, sharding)


def _sharding_of(module: XPOLightningModule, micro_batches: int) -> Sharding | None:
    """Describe how a run is sharded, before or after it has been; None if it is not to be."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    return Sharding(
        processes=module.trainer.world_size,
        micro_batches=micro_batches,
        engine=module.rollout is not None,
        reduces_each=getattr(strategy, "reduce_each_micro_batch", False),
        offloads=getattr(strategy, "offload_reference", False),
    )


def standing_memory(module: XPOLightningModule, optimizer: Optimizer) -> Standing:
    """Count what a run holds all the time, of any architecture, from the second step on.

    Args:
        module: The module, with its models loaded.
        optimizer: The module's optimizer.
    """
    trained = _bytes(module.trained_parameters())
    return Standing(
        policy=_bytes(module.policy.parameters()),
        reference=_bytes(module.reference.parameters()),
        reward=_bytes(module.reward.parameters()),
        copies=_copies(module) * trained,
        gradients=trained,
        optimizer=_states(optimizer) * trained,
    )


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def rewards_with_models(module: XPOLightningModule) -> list[SequenceClassifierReward]:
    """Find the reward models; a weighted reward may have several."""
    return [part for part in module.reward.modules() if isinstance(part, SequenceClassifierReward)]


def _states(optimizer: Optimizer) -> int:
    """Return how many numbers an optimizer keeps per weight; all but SGD are taken to keep as many as Adam."""
    if isinstance(optimizer, SGD):
        return int(any(group["momentum"] > 0 for group in optimizer.param_groups))
    return 2


def _copies(module: XPOLightningModule) -> int:
    """Return how many copies of the trained weights the policy's device holds; some samplers have theirs on the CPU."""
    holders: list[Any] = [module.sampler, module.bonus_sampler, module.reference]
    on_cpu = next(module.policy.parameters()).device.type == "cpu"
    return sum(
        max(
            sum(isinstance(value, Snapshot) for value in vars(holder).values()),
            getattr(holder, "kept_policies", 0) if on_cpu else 0,
        )
        for holder in holders
        if holder is not None
    )
