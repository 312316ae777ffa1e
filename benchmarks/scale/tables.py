"""Writes the tables of `docs/scale.md`: each is worked out from shapes and recipes, but for what was measured.

    python -m benchmarks.scale.tables --write

A table stands between two comments that name it; all else on the page is left alone.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.memory import measure
from benchmarks.memory.cases import CASES, predicted
from benchmarks.scale import floors, plan, recipes
from benchmarks.scale.public_models import LLAMA_1B, LLAMA_8B, LLAMA_70B
from benchmarks.scale.shapes import RunInputs, estimate, estimate_sharded
from benchmarks.speed.flops import step_flop
from xpo_lightning.reporting.memory.estimate import MemoryEstimate
from xpo_lightning.reporting.memory.fsdp import Sharding
from xpo_lightning.reporting.memory.model_shape import Shape

BENCHMARKS = Path(__file__).parents[1]
PAGE = BENCHMARKS.parent / "docs" / "scale.md"
MEASURED = BENCHMARKS / "results" / "memory.json"
GIB, TERA = 2**30, 10**12
PROMPT, COMPLETION = 1024, 512
"""Tokens of every prompt and completion in the worked tables."""

STEP = {"rows": 16, "prompt_tokens": PROMPT, "new_tokens": COMPLETION, "micro_batch_size": 2, "reward_rows": 8}
HALF = {"weight_bytes": 2, "compute_bytes": 2, "cache_bytes": 2}
MIXED = {"weight_bytes": 4, "compute_bytes": 2, "cache_bytes": 2}
REWARD = {"reward": LLAMA_1B, "reward_bytes": 2}


def worked_plan(shape: Shape, kind: str) -> RunInputs:
    """Describe a run of the worked table: `full`, `LoRA` or `QLoRA`, with gradient checkpointing."""
    width = MIXED if kind == "full" else HALF
    plan = RunInputs(policy=shape, **REWARD, **STEP, **width, gradient_checkpointing=True)  # type: ignore[arg-type]
    if kind == "full":
        return plan
    packed = recipes.quantized_bytes(shape) // 2 if kind == "QLoRA" else None
    return replace(plan, lora_rank=16, policy_weights=packed)


ENGINE = {"engine": True, "reduces_each": True}
WORKED: tuple[tuple[str, Shape, str, Sharding], ...] = (
    ("1B, all weights", LLAMA_1B, "full", Sharding(1)),
    ("8B, LoRA", LLAMA_8B, "LoRA", Sharding(1)),
    ("8B, QLoRA", LLAMA_8B, "QLoRA", Sharding(1)),
    ("8B, all weights", LLAMA_8B, "full", Sharding(1)),
    ("8B, all weights, FSDP2", LLAMA_8B, "full", Sharding(8)),
    ("8B, all weights, FSDP2", LLAMA_8B, "full", Sharding(32)),
    ("8B, all weights, FSDP2, engine", LLAMA_8B, "full", Sharding(8, **ENGINE)),
    ("the same, reference in main memory", LLAMA_8B, "full", Sharding(8, **ENGINE, offloads=True)),
    ("70B, LoRA", LLAMA_70B, "LoRA", Sharding(1)),
    ("70B, QLoRA", LLAMA_70B, "QLoRA", Sharding(1)),
    ("70B, LoRA, FSDP2, engine", LLAMA_70B, "LoRA", Sharding(8, **ENGINE)),
    ("70B, all weights, FSDP2", LLAMA_70B, "full", Sharding(64)),
)


def phases_of(foot: MemoryEstimate) -> tuple[int, int]:
    """Return the peak while completions are written and scored, and while the policy is updated."""
    return (
        foot.standing + max(foot.rollout, foot.scoring),
        foot.standing + max(foot.micro_batch, foot.update),
    )


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Write a table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def gib(count: float) -> str:
    """Write bytes in GiB."""
    return f"{count / GIB:,.1f}"


def memory_table() -> str:
    """What each part of a run takes on a GPU."""
    rows = []
    for name, shape, kind, sharding in WORKED:
        plan = worked_plan(shape, kind)
        foot = estimate(plan)
        models = foot.policy + foot.reference + foot.reward
        numbers: tuple[int, ...] = (models, foot.gradients + foot.optimizer, *phases_of(foot))
        if sharding.processes > 1:
            part = estimate_sharded(plan, sharding)
            numbers = (part.parts, part.gradients + part.optimizer, part.rollout_peak, part.update_peak)
        rows.append((name, str(sharding.processes), *map(gib, (models, *numbers, max(numbers)))))
    header = (
        *("run", "GPUs", "the three models", "of them all the time", "gradient and Adam"),
        *("writing and scoring", "updating", "peak"),
    )
    return table(header, rows)


def recipe_table() -> str:
    """What each recipe takes on a GPU."""
    rows = []
    for name in recipes.NAMES:
        recipe = recipes.read_recipe(name)
        trainer, data = recipe["trainer"], recipe["data"]
        gpus = trainer["devices"] * trainer.get("num_nodes", 1)
        used = recipes.memory_of(recipe)
        numbers = (used.standing, used.writing, used.updating, used.peak)
        rows.append((f"`configs/scale/{name}.yaml`", str(gpus), str(gpus * data["batch_size"]), *map(gib, numbers)))
    header = ("recipe", "GPUs", "prompts a step", "all the time", "writing and scoring", "updating", "peak")
    return table(header, rows)


def measured_table() -> str:
    """What was measured, beside what is worked out now."""
    results = json.loads(MEASURED.read_text(encoding="utf-8"))
    return measure.table([{**each, **predicted(CASES[each["name"]])} for each in results])


def flop_table() -> str:
    """TFLOP of a prompt's share of a step, part by part."""
    rows = []
    for name, shape in (("1B", LLAMA_1B), ("8B", LLAMA_8B), ("70B", LLAMA_70B)):
        parts = step_flop(floors.flop_shape(shape), PROMPT, COMPLETION)
        parts["reward"] = floors.reward_flop(LLAMA_1B, PROMPT, COMPLETION)
        total = sum(parts.values())
        checkpointed = floors.checkpointed_extra(shape, PROMPT, COMPLETION)
        cells = [f"{value / TERA:,.1f}" for value in (*parts.values(), total, total + checkpointed)]
        rows.append((name, *cells))
    header = (
        *("policy", "policy rollout", "reference rollout", "reference scoring", "reward (1B)"),
        *("policy forward", "backward", "together", "with gradient checkpointing"),
    )
    return table(header, rows)


def decoding_table() -> str:
    """The least time that decoding takes, and that all of a step's products take, on one engine."""
    rows = []
    for name, shape, gpus in (("1B", LLAMA_1B, 1), ("8B", LLAMA_8B, 1), ("70B", LLAMA_70B, 8)):
        for count in (1, 16, 256):
            floor = floors.decoding(shape, count, PROMPT, COMPLETION, gpus)
            rows.append(
                (
                    *(name, str(gpus), str(count), gib(floor.step_bytes), f"{1000 * floor.token_seconds:.1f}"),
                    *(f"{2 * floor.seconds:,.1f}", f"{floor.training_seconds:,.1f}", floor.bound_by),
                )
            )
    header = (
        *("policy", "GPUs", "prompts", "read for a token of each, GiB", "milliseconds, at least"),
        *("both completions, seconds", "policy's passes, seconds", "a token is bound by"),
    )
    return table(header, rows)


def plan_table() -> str:
    """The numbers of the plan for 70B."""
    return table(("what", "how it comes about", "is"), plan.plan_rows(PROMPT, COMPLETION))


TABLES: dict[str, Callable[[], str]] = {
    "memory": memory_table,
    "recipes": recipe_table,
    "measured": measured_table,
    "flop": flop_table,
    "decoding": decoding_table,
    "plan": plan_table,
}


def filled(page: str) -> str:
    """Put the tables into their places."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(rf"\g<1>{make()}\n\g<2>", page)
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} places for the table {name!r}")
    return page


def main() -> None:
    """Print the page, or write it."""
    args = _arguments()
    page = filled(PAGE.read_text(encoding="utf-8"))
    if args.write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the page; it is printed otherwise")
    return parser.parse_args()


if __name__ == "__main__":
    main()
