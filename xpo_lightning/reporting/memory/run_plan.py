"""Derives the inputs of the memory estimate from a module whose models are loaded."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from xpo_lightning.models.forward.causal_forward import base_of
from xpo_lightning.models.forward.cpu_attention import cache_dtype
from xpo_lightning.models.snapshot import Snapshot
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.reporting.memory.estimate import MemoryInputs
from xpo_lightning.reporting.memory.model_shape import Shape
from xpo_lightning.rewards import SequenceClassifierReward
from xpo_lightning.rollout.kv_cache import most_rows
from xpo_lightning.rollout.local import TOKENS_AT_ONCE
from xpo_lightning.rollout.opening import REPLAYING


def count(model: nn.Module) -> int:
    """Count the weights of a model."""
    return sum(weight.numel() for weight in model.parameters())


def memory_inputs(
    module: XPOLightningModule, optimizer: Optimizer, *, batch_size: int, longest: int, computes_in_bfloat16: bool
) -> MemoryInputs | None:
    """Return the inputs of `estimate` for a run.

    Args:
        module: The module, with its models loaded.
        optimizer: The module's optimizer.
        batch_size: Prompts in a batch.
        longest: Tokens of the longest prompt.
        computes_in_bfloat16: Whether the trainer's precision is mixed.

    Returns:
        The inputs; None if the policy's config does not give the sizes of a transformer.
    """
    policy = base_of(module.policy)
    try:
        shape = Shape.of(policy.config)
    except ValueError:
        return None
    base = [weight for name, weight in policy.named_parameters() if "lora_" not in name]
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in base) / sum(map(torch.numel, base))
    device = module.device.type
    cached = cache_dtype(policy)
    reward = _largest_reward(module)
    new = module.sampling.max_new_tokens
    rows = min(batch_size, most_rows(policy, longest + new)) if device == "cpu" else batch_size
    compute = 2 if computes_in_bfloat16 else round(weight_bytes)
    plan = MemoryInputs(
        policy=shape,
        weight_bytes=weight_bytes,
        compute_bytes=compute,
        cache_bytes=compute if cached is None else cached.itemsize,
        lora_rank=None if module.lora is None else module.lora.r,
        optimizer_states=_states(optimizer),
        copies=_copies(module),
        gradient_checkpointing=getattr(module.policy_spec, "gradient_checkpointing", False),
        rows=min(batch_size, module.rollout_batch_size or rows),
        prompt_tokens=longest,
        new_tokens=new,
        micro_batch_size=min(batch_size, module.plan.most_pairs(longest, new)),
        completions=module.plan.completions,
        replays=device in REPLAYING and module.rollout_graphs and module.device_mesh is None,
        read_tokens=TOKENS_AT_ONCE.get(device, TOKENS_AT_ONCE["cuda"]),
        policy_weights=sum(map(torch.numel, base)),
        trained_weights=sum(weight.numel() for weight in module.trained_parameters()),
        reward_weights=count(module.reward),
        reward_bytes=next((weight.element_size() for weight in module.reward.parameters()), 0),
    )
    if reward is None or reward.model is None:
        return plan
    rows_of_reward = min(reward.rows_together(longest + new), 2 * module.candidates.count * batch_size)
    return replace(plan, reward=Shape.of(reward.model.config), reward_rows=rows_of_reward)


def rewards_with_models(module: XPOLightningModule) -> list[SequenceClassifierReward]:
    """Find the reward models; a weighted reward may have several."""
    return [part for part in module.reward.modules() if isinstance(part, SequenceClassifierReward)]


def _largest_reward(module: XPOLightningModule) -> SequenceClassifierReward | None:
    return max(rewards_with_models(module), key=count, default=None)


def _states(optimizer: Optimizer) -> int:
    """Return how many numbers an optimizer keeps per weight; all but SGD are taken to keep as many as Adam."""
    if isinstance(optimizer, SGD):
        return int(any(group["momentum"] > 0 for group in optimizer.param_groups))
    return 2


def _copies(module: XPOLightningModule) -> int:
    holders: list[Any] = [module.sampler, module.bonus_sampler, module.reference]
    kept = [vars(holder).values() for holder in holders if holder is not None]
    return sum(isinstance(value, Snapshot) for values in kept for value in values)
