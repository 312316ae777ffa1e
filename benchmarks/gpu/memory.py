"""The memory of optimizer steps on a CUDA device, beside what `estimate.py` works out."""

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from benchmarks.gpu.assets import SHAPES, random_policy, save_models, word_tokenizer
from benchmarks.scale.recipes import largest_matrix, quantized_bytes
from benchmarks.scale.shapes import RunInputs, estimate
from xpo_lightning import (
    LoadedModel,
    LoRASpec,
    ModelSpec,
    PythonReward,
    Sampling,
    SequenceClassifierReward,
    XPOLightningModule,
)

PROMPT_TOKENS, NEW_TOKENS, ROWS, MICRO_BATCH, REWARD_ROWS, RANK = 1024, 32, 16, 2, 8, 16


@dataclass(frozen=True)
class MemoryCase:
    """A run of two optimizer steps.

    Args:
        name: What it is called in the table.
        model: A name of `assets.SHAPES`.
        kind: `full`: float32 weights under bf16-mixed; `lora`: adapters on bfloat16; `qlora`: adapters on 4 bits.
        checkpointing: `model.policy.gradient_checkpointing`.
        reward_model: Whether a reward model of the policy's shape scores, in bfloat16.
    """

    name: str
    model: str
    kind: str
    checkpointing: bool = True
    reward_model: bool = True


MEMORY_CASES = (
    MemoryCase("1B, all weights, bf16-mixed", "1b", "full"),
    MemoryCase("1B, all weights, bf16-mixed, no checkpointing", "1b", "full", checkpointing=False),
    MemoryCase("1B, LoRA, bfloat16", "1b", "lora"),
    MemoryCase("1B, QLoRA", "1b", "qlora"),
    MemoryCase("8B, LoRA, bfloat16, no reward model", "8b", "lora", reward_model=False),
)


class Meter(Callback):
    """Notes what is allocated before a step that starts with everything there, and the most from there on."""

    standing = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin with the second step, when gradients and the optimizer's state are there."""
        if batch_idx == 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.standing = torch.cuda.memory_allocated()


def measure_memory(case: MemoryCase) -> dict[str, Any]:
    """Take two steps; return bytes, worked out and measured."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder, _module(case, Path(folder)) as module:
        _fit(module, case, meter)
        peak, reserved = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved()
    return {
        "name": case.name,
        **predicted(case),
        "measured_standing": meter.standing - before,
        "measured_peak": peak,
        "reserved": reserved,
    }


def predicted(case: MemoryCase) -> dict[str, int]:
    """Work out what a case takes: all the time, and at most."""
    shape = SHAPES[case.model]
    plan = RunInputs(
        policy=shape,
        reward=replace(shape, tied=True) if case.reward_model else None,
        weight_bytes=4 if case.kind == "full" else 2,
        reward_bytes=2,
        compute_bytes=2,
        cache_bytes=2,
        lora_rank=None if case.kind == "full" else RANK,
        gradient_checkpointing=case.checkpointing,
        rows=ROWS,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        micro_batch_size=MICRO_BATCH,
        reward_rows=REWARD_ROWS,
        policy_weights=quantized_bytes(shape) // 2 if case.kind == "qlora" else None,
    )
    foot = estimate(plan)
    unpacked = 2 * largest_matrix(shape) if case.kind == "qlora" else 0
    return {"standing": foot.standing, "peak": foot.peak + unpacked}


@contextmanager
def _module(case: MemoryCase, folder: Path) -> Iterator[XPOLightningModule]:
    """Build the module of a case; nothing of it is left afterwards."""
    shape = SHAPES[case.model]
    if case.reward_model or case.kind != "lora":
        save_models(folder, shape)
        gc.collect()
        torch.cuda.empty_cache()
        policy: Any = ModelSpec(
            str(folder / "policy"),
            dtype="float32" if case.kind == "full" else "bfloat16",
            gradient_checkpointing=case.checkpointing,
            quantize="4bit" if case.kind == "qlora" else None,
        )
    else:
        model = random_policy(shape, torch.bfloat16)
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = LoadedModel(model, word_tokenizer(shape.vocabulary))
    classifier = SequenceClassifierReward(str(folder / "reward"), dtype="bfloat16", micro_batch_size=REWARD_ROWS)
    module = XPOLightningModule(
        policy=policy,
        reward=classifier if case.reward_model else PythonReward(_by_length),
        lora=None if case.kind == "full" else LoRASpec(r=RANK),
        sampling=Sampling(max_new_tokens=NEW_TOKENS, eos_token_ids=[]),
        micro_batch_size=MICRO_BATCH,
        rollout_batch_size=ROWS,
    )
    yield module
    module.to("cpu")
    for parameter in module.parameters():
        parameter.grad = None


def _by_length(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [float(len(completion)) for completion in completions]


def _fit(module: XPOLightningModule, case: MemoryCase, meter: Meter) -> None:
    """Take two steps on prompts that are all of the same length."""
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SHAPES[case.model].vocabulary, (ROWS, PROMPT_TOKENS), generator=source).tolist()
    batch = {"prompt": [" ".join(f"w{token}" for token in row) for row in ids], "prompt_ids": ids}
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed" if case.kind == "full" else "32-true",
        max_steps=2,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * 2, batch_size=None, collate_fn=lambda batch: batch))
