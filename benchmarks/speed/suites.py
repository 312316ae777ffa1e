"""The runs that are compared, and what each worker is told of them."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

System = Literal["ours", "trl-best", "trl-shipped"]
SYSTEMS: tuple[System, ...] = ("ours", "trl-best", "trl-shipped")

# What TRL's XPO example sets, for both sides.
SHARED: dict[str, Any] = {"alpha": 1e-5, "beta": 0.1, "learning_rate": 5e-7, "temperature": 0.9, "new_tokens": 53}
MAX_PROMPT_TOKENS = 512
LORA = {"r": 16, "alpha": 32}


@dataclass(frozen=True)
class Suite:
    """One run: a model, the precision of its weights, and the prompts of an optimizer step.

    Args:
        name: What it is called on the command line.
        assets: Which model, tokenizer, reward model and prompts it uses; the folder of that name has them.
        dtype: Type of the weights of policy, reference and reward model, on both sides.
        prompts: Prompts of one optimizer step.
        trl_prompts: Prompts that are timed of TRL with its best settings, whose full step takes minutes.
        shipped_prompts: Prompts that are timed of TRL as shipped, which is slower still.
        shipped_warm_up: Prompts of TRL's warm-up step as shipped; with its best settings it is one batch.
        trl_batch: TRL's fastest per-device batch size with its best settings, as `--tune-trl` finds it.
        lora: Whether adapters are trained in place of all weights.
        trl_best: TRL's settings that make it fastest at the same precision.
        ours: Our module's further arguments; smaller micro-batches need less memory and hardly more time.
    """

    name: str
    assets: Literal["pythia", "smollm2"]
    dtype: Literal["float32", "bfloat16"]
    prompts: int
    trl_prompts: int
    shipped_prompts: int
    shipped_warm_up: int
    trl_batch: int
    lora: bool = False
    trl_best: dict[str, Any] = field(default_factory=lambda: {"gradient_checkpointing": False, "bf16": False})
    ours: dict[str, Any] = field(default_factory=dict)


_PYTHIA: dict[str, Any] = {"trl_prompts": 32, "shipped_prompts": 32, "shipped_warm_up": 4, "trl_batch": 4}
_SMOLLM2: dict[str, Any] = {"trl_prompts": 8, "shipped_prompts": 4, "shipped_warm_up": 1, "trl_batch": 4}
SUITES = {
    suite.name: suite
    for suite in (
        Suite("pythia", "pythia", "float32", 128, **_PYTHIA, ours={"micro_batch_size": 4}),
        Suite("smollm2", "smollm2", "bfloat16", 32, **_SMOLLM2, ours={"micro_batch_size": 2}),
        Suite("smollm2-lora", "smollm2", "bfloat16", 32, **_SMOLLM2, lora=True, ours={"micro_batch_size": 4}),
    )
}

# TRL's own defaults, and the batch of its XPO example (4 prompts, 32 of which make an optimizer step).
SHIPPED_BATCH = 4
QUIET = {"logging_strategy": "no", "disable_tqdm": True}


def our_spec(suite: Suite, assets: Path, prompts: int, options: dict[str, Any]) -> dict[str, Any]:
    """Describe our run.

    Args:
        suite: The suite.
        assets: Folder with the models and the prompts.
        prompts: Prompts of the timed optimizer step.
        options: Further arguments of `XPOLightningModule`.
    """
    return {**_common(suite, assets), "system": "ours", "timed_prompts": prompts, "options": {**suite.ours, **options}}


def trl_spec(
    suite: Suite, assets: Path, system: System, prompts: int, batch: int | None = None, **settings: Any
) -> dict[str, Any]:
    """Describe a run of TRL.

    Args:
        suite: The suite.
        assets: Folder with the models and the prompts.
        system: `trl-best` or `trl-shipped`.
        prompts: Prompts to time: a sample of the step's prompts with the same distribution of lengths.
        batch: Per-device batch size, in place of the suite's.
        settings: Further fields of `XPOConfig`.
    """
    shipped = system == "trl-shipped"
    batch = min(batch or (SHIPPED_BATCH if shipped else suite.trl_batch), prompts)
    options = {**({} if shipped else {**suite.trl_best, **QUIET}), **settings}
    return {
        **_common(suite, assets),
        "system": system,
        "timed_prompts": prompts,
        "warm_up_prompts": suite.shipped_warm_up if shipped else batch,
        "batch": batch,
        "options": options,
    }


def _common(suite: Suite, assets: Path) -> dict[str, Any]:
    return {
        "suite": suite.name,
        "assets": str(assets),
        "prompts": str(assets / "prompts.jsonl"),
        "dtype": suite.dtype,
        "lora": LORA if suite.lora else None,
        "step_prompts": suite.prompts,
        **SHARED,
    }


def as_record(suite: Suite) -> dict[str, Any]:
    """Return a suite for the JSON file."""
    return {**asdict(suite), **SHARED, "max_prompt_tokens": MAX_PROMPT_TOKENS}
