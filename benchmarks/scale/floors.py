"""The least time that a step can take, from the products it needs and the bytes it reads.

These are floors, not forecasts: no program beats them on such GPUs, and ours was never timed on one.
"""

from dataclasses import dataclass

from benchmarks.speed import flops
from benchmarks.speed.flops import step_flop
from xpo_lightning.reporting.memory.estimate import cache_bytes
from xpo_lightning.reporting.memory.model_shape import Shape, root_weight_count, weight_count

PRODUCTS = 989e12
"""FLOP a second in bfloat16 of an H100 SXM, without sparsity, as its maker states."""
BANDWIDTH = 3.35e12
"""Bytes a second between its memory and its processors, as its maker states."""
MEMORY = 80e9
"""Bytes of its memory."""
BFLOAT16 = 2


@dataclass(frozen=True)
class Floor:
    """The least that decoding takes.

    Args:
        step_bytes: Bytes read for one token of each row, half of the completion being written.
        token_seconds: Seconds for that.
        seconds: Seconds for a completion of each row, prompts included.
        training_seconds: Seconds of the policy's forward and backward passes over the pairs.
        bound_by: What takes longer: to read bytes, or to multiply.
    """

    step_bytes: float
    token_seconds: float
    seconds: float
    training_seconds: float
    bound_by: str


def flop_shape(shape: Shape) -> flops.Shape:
    """Return the sizes that `flops.py` counts with."""
    body = weight_count(shape) - root_weight_count(shape) - 2 * shape.hidden * shape.layers
    return flops.Shape(body, shape.layers, shape.heads * shape.head_dim, shape.hidden, shape.vocabulary)


def reward_flop(shape: Shape, prompt: int, completion: int) -> float:
    """Count the FLOP of a reward model of this shape for a prompt and its two completions."""
    return step_flop(flop_shape(shape), prompt, completion)["reward"]


def checkpointed_extra(shape: Shape, prompt: int, completion: int) -> float:
    """Count what gradient checkpointing adds: a second forward pass, and each prompt read with each completion.

    A layer's forward pass is then taken twice and its backward pass once, over 2 (P + T - 1) positions.
    """
    sizes = flop_shape(shape)
    shared = sizes.run(0, prompt) + 2 * sizes.run(prompt, completion - 1)
    apart = 2 * sizes.run(0, prompt + completion - 1)
    return 4 * apart - 3 * shared


def decoding(shape: Shape, rows: int, prompt: int, completion: int, gpus: int) -> Floor:
    """Work out the least time to write a completion for each of some prompts, in bfloat16, decoded together.

    Args:
        shape: The model, whose layers are split over the GPUs.
        rows: Prompts.
        prompt: Tokens of each.
        completion: Tokens of each completion.
        gpus: GPUs, as fast together as their sum.
    """
    sizes = flop_shape(shape)
    halfway = prompt + completion // 2
    weights = weight_count(shape) * BFLOAT16  # all are read for a token, however many rows there are
    step_bytes = weights + cache_bytes(shape, rows * halfway, BFLOAT16)
    multiply = rows * (sizes.run(halfway, 1) + sizes.head(1)) / PRODUCTS / gpus
    token = max(step_bytes / BANDWIDTH / gpus, multiply)
    parts = step_flop(sizes, prompt, completion)
    training = rows * (parts["policy forward"] + parts["backward"]) / PRODUCTS / gpus
    reading = rows * sizes.run(0, prompt) / PRODUCTS / gpus
    bound = "bytes" if step_bytes / BANDWIDTH / gpus > multiply else "products"
    return Floor(step_bytes, token, reading + completion * token, training, bound)
