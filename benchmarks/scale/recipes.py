"""From a recipe of `configs/scale` to the memory that it takes on each GPU."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.scale.public_models import POLICIES, REWARDS
from benchmarks.scale.shapes import RunInputs, estimate, estimate_sharded
from xpo_lightning.reporting.memory.fsdp import Sharding
from xpo_lightning.reporting.memory.model_shape import Shape, root_weight_count, weight_count

FOLDER = Path(__file__).parents[2] / "configs" / "scale"
OVERLAYS = {
    "8b_full_nodes": "8b_full_8_gpus",
    "8b_full_8_gpus_vllm": "8b_full_8_gpus",
    "8b_lora_vllm": "8b_lora_one_gpu",
    "70b_lora_8_gpus_vllm": "8b_lora_one_gpu",
}
NAMES = (
    *("1b_one_gpu", "math_one_gpu", "8b_lora_one_gpu", "8b_lora_vllm", "8b_qlora_small_gpu", "8b_full_8_gpus"),
    *("8b_full_nodes", "8b_full_8_gpus_vllm", "70b_lora_8_gpus_vllm"),
)
GIB = 2**30
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight: half a byte, a byte of scale for 64 of them, and a float32 for 256 such scales."""
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Memory:
    """What a recipe takes on each GPU, in bytes.

    Args:
        standing: All the time.
        writing: The most while completions are written and scored.
        updating: The most while the policy is updated.
    """

    standing: int
    writing: int
    updating: int

    @property
    def peak(self) -> int:
        """The most."""
        return max(self.writing, self.updating)


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe, over the one that it is an overlay of."""
    own = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return merged(read_recipe(OVERLAYS[name]), own) if name in OVERLAYS else dict(own)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Put one mapping over another, key by key."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = merged(below[key], above[key])
    return both


def plan_of(recipe: dict[str, Any]) -> RunInputs:
    """Describe a recipe to `estimate`; it must state every key that its memory depends on."""
    model, data, trainer = (recipe[part] for part in ("model", "data", "trainer"))
    policy, reward = model["policy"], model["reward"]["init_args"]
    shape, width = POLICIES[policy["path"]], BYTES[policy["dtype"]]
    compute = 2 if trainer["precision"] == "bf16-mixed" else width
    plan = RunInputs(
        policy=shape,
        weight_bytes=width,
        compute_bytes=compute,
        cache_bytes=compute,
        lora_rank=model["lora"]["r"] if "lora" in model else None,
        gradient_checkpointing=policy["gradient_checkpointing"],
        rows=min(model["rollout_batch_size"], data["batch_size"]),
        prompt_tokens=data["max_prompt_tokens"],
        new_tokens=model["sampling"]["max_new_tokens"],
        micro_batch_size=model["micro_batch_size"],
    )
    if "path" in reward:  # a verifier has no model
        rows, of_reward = reward["micro_batch_size"], BYTES[reward["dtype"]]
        plan = replace(plan, reward=REWARDS[reward["path"]], reward_bytes=of_reward, reward_rows=rows)
    # The head stays in bfloat16, so that bytes are counted as fewer weights of two bytes.
    return replace(plan, policy_weights=quantized_bytes(shape) // 2) if policy.get("quantize") else plan


def memory_of(recipe: dict[str, Any]) -> Memory:
    """Work out what a recipe takes on each GPU."""
    plan, trainer = plan_of(recipe), recipe["trainer"]
    if "strategy" in trainer:
        part = estimate_sharded(plan, sharding_of(recipe))
        return Memory(part.standing, part.rollout_peak, part.update_peak)
    foot = estimate(plan)
    unpacked = largest_matrix(plan.policy) * 2 if recipe["model"]["policy"].get("quantize") else 0
    return Memory(
        foot.standing,
        foot.standing + max(foot.rollout, foot.scoring) + unpacked,
        foot.standing + max(foot.micro_batch + unpacked, foot.update),
    )


def sharding_of(recipe: dict[str, Any]) -> Sharding:
    """Describe how a recipe is sharded."""
    model, trainer = recipe["model"], recipe["trainer"]
    strategy = trainer["strategy"]
    options = {} if isinstance(strategy, str) else strategy["init_args"]
    return Sharding(
        processes=trainer["devices"] * trainer.get("num_nodes", 1),
        micro_batches=-(-recipe["data"]["batch_size"] // model["micro_batch_size"]),
        engine="rollout" in model,
        reduces_each=options.get("reduce_each_micro_batch", False),
        offloads=options.get("offload_reference", False),
    )


def quantized_bytes(shape: Shape) -> int:
    """Count the bytes of a model whose layers' matrices have 4 bits a weight, and the rest two bytes."""
    norms = 2 * shape.hidden * shape.layers
    matrices = weight_count(shape) - root_weight_count(shape) - norms
    return int(matrices * NF4) + 2 * (root_weight_count(shape) + norms)


def largest_matrix(shape: Shape) -> int:
    """Count the weights of a layer's largest matrix, which is unpacked to be multiplied with."""
    return shape.hidden * max(shape.intermediate, shape.heads * shape.head_dim)
