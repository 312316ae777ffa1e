"""Times one optimizer step of this package, in a real `Trainer.fit`. Started by `compare.py` with a JSON spec."""

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from benchmarks.speed.measuring import Prompt, finish_device_work, memory_gib, read_prompts, read_spec, result
from xpo_lightning import Experience, LoRASpec, ModelSpec, Sampling, SequenceClassifierReward, XPOLightningModule

WARM_UP_PROMPTS = 8


def main() -> None:
    """Load, warm up, time one optimizer step, print the result."""
    spec = read_spec()
    warmup, timed = read_prompts(spec)
    torch.manual_seed(0)
    before = [warmup[: spec.get("warm_up_prompts", WARM_UP_PROMPTS)]] * spec.get("warm_up_steps", 1)
    measured = measure(make_module(spec), before, timed, spec.get("accelerator", "cpu"))
    if measured.lengths and measured.lengths != {spec["new_tokens"]}:
        raise RuntimeError(f"expected completions of {spec['new_tokens']} tokens, but got {sorted(measured.lengths)}")
    counted = measured.lengths.pop() if measured.lengths else None
    print(json.dumps(result(spec, measured.seconds, measured.phases, measured.loaded_gib, counted)))


def make_module(spec: dict[str, Any]) -> XPOLightningModule:
    """Build the module that a spec describes.

    Args:
        spec: `assets`, `dtype`, `lora`, the shared settings, and `options`: further arguments of the module.
    """
    assets = Path(spec["assets"])
    return XPOLightningModule(
        policy=ModelSpec(str(assets / "policy"), dtype=spec["dtype"]),
        reward=SequenceClassifierReward(str(assets / "reward"), dtype=spec["dtype"]),
        lora=None if spec["lora"] is None else LoRASpec(**spec["lora"]),
        # No EOS: every completion has all its tokens, as on TRL's side.
        sampling=Sampling(max_new_tokens=spec["new_tokens"], temperature=spec["temperature"], eos_token_ids=[]),
        alpha=spec["alpha"],
        beta=spec["beta"],
        learning_rate=spec["learning_rate"],
        **spec["options"],
    )


class StepClock(Callback):
    """Times the last of a fit's steps, whole: tokenized batch in, optimizer step done."""

    def __init__(self, timed_step: int) -> None:
        self.timed_step = timed_step
        self.seconds = self.loaded_gib = 0.0
        self.phases: dict[str, float] = {}
        self.lengths: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: XPOLightningModule) -> None:
        """Note the memory that loading took."""
        self.loaded_gib = memory_gib()

    def on_pairs_collected(self, trainer: Trainer, pl_module: XPOLightningModule, experience: Experience) -> None:
        """Note how many tokens the completions have."""
        for side in (experience.completions.by_policy, experience.completions.by_sampler):
            self.lengths.update(side.lengths.tolist())

    def on_train_batch_start(self, trainer: Trainer, pl_module: XPOLightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        timer = getattr(pl_module, "timer", None)
        if timer is not None:
            timer.reset()
        finish_device_work()
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: XPOLightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock."""
        if batch_idx == self.timed_step:
            finish_device_work()
            self.seconds = time.perf_counter() - self._begun
            timer = getattr(pl_module, "timer", None)
            self.phases = {} if timer is None else dict(timer.seconds())


def measure(
    module: XPOLightningModule, before: list[list[Prompt]], timed: list[Prompt], accelerator: str = "cpu"
) -> StepClock:
    """Take a step on each list of prompts, and time the last."""
    clock = StepClock(timed_step=len(before))
    fit(module, [*before, timed], clock, accelerator)
    return clock


def fit(module: XPOLightningModule, steps: list[list[Prompt]], callback: Callback, accelerator: str = "cpu") -> None:
    """Take an optimizer step on each of some lists of prompts, and nothing beside it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=len(steps),
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [as_batch(prompts) for prompts in steps]
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))


def as_batch(rows: list[Prompt]) -> dict[str, list[Any]]:
    """Put prompts into the columns of a batch."""
    return {"prompt": [row["prompt"] for row in rows], "prompt_ids": [row["prompt_ids"] for row in rows]}


if __name__ == "__main__":
    main()
