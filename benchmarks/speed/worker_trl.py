"""Times one optimizer step of TRL's XPOTrainer. Started by `compare.py` in TRL's environment, with a JSON spec."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.xpo import XPOConfig, XPOTrainer

from benchmarks.speed.measuring import Prompt, memory_gib, read_prompts, read_spec, result
from benchmarks.speed.trl_phases import StepTimer, watch


def main() -> None:
    """Load, warm up, time one optimizer step, print the result."""
    spec = read_spec()
    warmup, timed = read_prompts(spec)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(spec, timed, folder)
    loaded_gib = memory_gib()
    timer = StepTimer()
    lengths: set[int] = set()
    watch(trainer, timer, lengths)
    _take_step(trainer, warmup[: spec["warm_up_prompts"]], spec["batch"])
    timer.reset()
    _take_step(trainer, timed, spec["batch"])
    if lengths != {spec["new_tokens"]}:
        raise RuntimeError(f"expected completions of {spec['new_tokens']} tokens, but TRL wrote {sorted(lengths)}")
    print(json.dumps(result(spec, timer.wall_seconds, timer.seconds, loaded_gib, lengths.pop())))


def _trainer(spec: dict[str, Any], rows: list[Prompt], folder: str) -> XPOTrainer:
    assets = Path(spec["assets"])
    dtype = getattr(torch, spec["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(assets / "policy")
    _check_same_tokens(tokenizer, rows)
    args = XPOConfig(
        output_dir=folder,
        use_cpu=spec.get("accelerator") != "gpu",
        report_to="none",
        save_strategy="no",
        max_steps=1,
        per_device_train_batch_size=spec["batch"],
        max_new_tokens=spec["new_tokens"],
        temperature=spec["temperature"],
        learning_rate=spec["learning_rate"],
        alpha=[spec["alpha"]],
        beta=[spec["beta"]],
        **spec["options"],
    )
    return XPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(assets / "policy", dtype=dtype),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(assets / "reward", num_labels=1, dtype=dtype),
        args=args,
        train_dataset=_dataset(rows),
        processing_class=tokenizer,
        peft_config=_adapters(spec["lora"]),
    )


def _adapters(lora: dict[str, int] | None) -> Any:
    if lora is None:
        return None
    from peft import LoraConfig  # noqa: PLC0415  (an extra of TRL's, which the other suites do without)

    return LoraConfig(task_type="CAUSAL_LM", r=lora["r"], lora_alpha=lora["alpha"], target_modules="all-linear")


def _dataset(rows: list[Prompt]) -> Dataset:
    return Dataset.from_dict({"prompt": [row["prompt"] for row in rows]})


def _check_same_tokens(tokenizer: Any, rows: list[Prompt]) -> None:
    for row in rows:
        ids = XPOTrainer.tokenize_row(row, False, tokenizer)["prompt_input_ids"]
        if ids != row["prompt_ids"]:
            raise RuntimeError(f"TRL reads other tokens than we do in the prompt that begins {row['prompt']!r:.60}")


def _take_step(trainer: XPOTrainer, rows: list[Prompt], batch: int) -> None:
    trainer.train_dataset = _dataset(rows)
    trainer.args.gradient_accumulation_steps = -(-len(rows) // batch)
    begun = time.perf_counter()
    trainer.train()
    print(f"{len(rows)} prompts: {time.perf_counter() - begun:.1f} s with TRL's set-up", flush=True)


if __name__ == "__main__":
    main()
