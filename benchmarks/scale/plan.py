"""The plan for 70B of `docs/scale.md` in numbers: engines that write, and GPUs that train."""

from math import ceil

from benchmarks.scale.floors import BFLOAT16, MEMORY, PRODUCTS, checkpointed_extra, decoding, flop_shape
from benchmarks.scale.public_models import LLAMA_70B as SHAPE
from benchmarks.scale.shapes import adapter_count
from benchmarks.speed.flops import step_flop
from xpo_lightning.reporting.memory.estimate import FLOAT32, cache_bytes, layer_bytes
from xpo_lightning.reporting.memory.model_shape import weight_count

PROMPTS = 2048
"""Prompts of a step."""
ENGINES, ENGINE, LEARNER = 8, 8, 64
"""Engines, the GPUs of each, and those that train."""
NETWORK = 50e9
"""Bytes a second over one link of 400 Gbit/s."""
RANK = 16
GIB = 2**30
Row = tuple[str, str, str]


def plan_rows(prompt: int, completion: int) -> list[Row]:
    """Work the plan out: what, how it comes about, and how much it is."""
    return [*_writing(prompt, completion), *_training(prompt, completion), *_sending()]


def _writing(prompt: int, completion: int) -> list[Row]:
    weights = weight_count(SHAPE) * BFLOAT16
    row = cache_bytes(SHAPE, prompt + completion, BFLOAT16)
    at_once = int((0.9 * ENGINE * MEMORY - weights) // row)
    each = 2 * PROMPTS // ENGINES
    rounds = ceil(each / at_once)
    floor = decoding(SHAPE, ceil(each / rounds), prompt, completion, ENGINE)
    return [
        ("weights of the policy", "bfloat16", f"{weights / GIB:,.0f} GiB"),
        ("on a GPU of an engine", f"over {ENGINE} GPUs", f"{weights / ENGINE / GIB:.1f} GiB"),
        ("keys and values", f"a row of {prompt + completion} tokens", f"{row / 2**20:,.0f} MiB"),
        ("rows at once", f"in 90 % of {ENGINE} x 80 GB, beside the weights", f"{at_once:,}"),
        ("completions of an engine", f"2 x {PROMPTS:,} over {ENGINES} engines", f"{each:,}, in {rounds} round(s)"),
        ("to write them", "floor", f"{rounds * floor.seconds:,.0f} seconds"),
    ]


def _training(prompt: int, completion: int) -> list[Row]:
    parts = step_flop(flop_shape(SHAPE), prompt, completion)
    passes = parts["policy forward"] + parts["backward"]
    again = passes + checkpointed_extra(SHAPE, prompt, completion)
    weights, adapters = weight_count(SHAPE), adapter_count(SHAPE, RANK)
    positions = 2 * (prompt + completion)
    inputs, layer = positions * SHAPE.layers * SHAPE.hidden * BFLOAT16, positions * layer_bytes(SHAPE, BFLOAT16)
    spread = f"over {LEARNER} GPUs"
    return [
        ("reference's scores", f"floor, {spread}", _seconds(parts["reference scoring"])),
        ("policy's passes", f"floor, {spread}", _seconds(passes)),
        ("the same with gradient checkpointing", f"floor, {spread}", _seconds(again)),
        ("weights, gradient and Adam", f"float32, {spread}", f"{4 * FLOAT32 * weights / LEARNER / GIB:.1f} GiB"),
        ("LoRA: frozen weights", f"bfloat16, {spread}", f"{BFLOAT16 * weights / LEARNER / GIB:.1f} GiB"),
        (
            "LoRA: adapters, gradient and Adam",
            f"float32, {spread}",
            f"{4 * FLOAT32 * adapters / LEARNER / GIB:.2f} GiB",
        ),
        ("inputs of layers", "of a pair", f"{inputs / GIB:.1f} GiB"),
        ("a layer at work", "on a pair", f"{layer / GIB:.1f} GiB"),
    ]


def _sending() -> list[Row]:
    link = "bfloat16, over one link of 400 Gbit/s"
    weights, adapters = weight_count(SHAPE) * BFLOAT16, adapter_count(SHAPE, RANK) * BFLOAT16
    return [
        ("all weights to an engine", link, f"{weights / NETWORK:.1f} seconds"),
        ("an adapter to an engine", f"rank {RANK}, {link}", f"{1000 * adapters / NETWORK:.0f} milliseconds"),
    ]


def _seconds(flop: float) -> str:
    return f"{PROMPTS * flop / PRODUCTS / LEARNER:,.0f} seconds"
