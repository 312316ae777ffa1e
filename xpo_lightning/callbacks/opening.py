"""What there is to say of a run before its first step."""

from collections.abc import Iterator

from lightning.pytorch import Trainer

from xpo_lightning.data import PromptDataModule
from xpo_lightning.data.loading import PromptDataset, PromptStream
from xpo_lightning.footprint.estimate import estimate
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.overview import estimate_text, models_of
from xpo_lightning.planning import plan_of
from xpo_lightning.sharding import is_sharded


def opening_lines(trainer: Trainer, module: XPOLightningModule) -> dict[str, str]:
    """Describe a run whose models are loaded and whose loaders are not: models, data, length and expected memory."""
    lines = dict(models_of(module))
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, PromptDataModule):
        lines |= dict(_data(data, module))
    lines["run"] = _length(trainer)
    if isinstance(data, PromptDataModule) and (memory := _memory(trainer, module, data)):
        lines["memory"] = memory
    return lines


def _data(data: PromptDataModule, module: XPOLightningModule) -> Iterator[tuple[str, str]]:
    for role, prompts in data.prompts.items():
        yield role, f"{_prompts(prompts)} of {data.source_of(role).name}"
    size = data.batching.size
    completions = 2 * module.candidates.count * size
    new = module.sampling.max_new_tokens
    yield "batch", f"{size:,} prompts, {completions:,} completions of at most {new:,} tokens"


def _prompts(prompts: PromptDataset | PromptStream) -> str:
    if not isinstance(prompts, PromptDataset):
        return "a stream"
    lengths = prompts.lengths
    mean = sum(lengths) / len(lengths)
    return f"{len(lengths):,} prompts of {mean:.1f} tokens on average, the longest {max(lengths):,},"


def _length(trainer: Trainer) -> str:
    limits = [f"{trainer.max_steps:,} optimizer steps"] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(f"{trainer.max_epochs:,} epoch{'s' * (trainer.max_epochs != 1)}")
    length = " or ".join(limits) or "no known end"
    processes = f" on {trainer.world_size} devices" if trainer.world_size > 1 else ""
    resumed = f", going on from {trainer.ckpt_path}" if trainer.ckpt_path else ""
    return f"{length}{processes}, in {trainer.precision}{resumed}"


def _memory(trainer: Trainer, module: XPOLightningModule, data: PromptDataModule) -> str | None:
    """Estimate a step's memory; nobody can for unknown architectures, spread weights, and prompts of any length."""
    prompts = data.prompts.get("training")
    longest = max(prompts.lengths) if isinstance(prompts, PromptDataset) else data.encoding.max_tokens
    if longest is None or is_sharded(module.policy) or not trainer.optimizers:
        return None
    plan = plan_of(
        module,
        trainer.optimizers[0],
        batch_size=data.batching.size,
        longest=longest,
        computes_in_bfloat16=trainer.precision == "bf16-mixed",
    )
    return None if plan is None else estimate_text(estimate(plan))
