"""Describes a run before its first step: models, data, length and expected memory."""

from collections.abc import Iterator

from lightning.pytorch import Trainer
from torch import nn

from xpo_lightning.data import PromptDataModule
from xpo_lightning.data.dataloader import PromptDataset, PromptStream
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.reporting.memory.estimate import MemoryEstimate
from xpo_lightning.reporting.memory.fsdp import ShardedEstimate
from xpo_lightning.reporting.memory.run_plan import count, memory_of_run, rewards_with_models
from xpo_lightning.rewards.no_reward import is_missing


def models_of(module: XPOLightningModule) -> Iterator[tuple[str, str]]:
    """Yield a label and a description for each model of a module, whose models are loaded."""
    weights = sum(weight.numel() for weight in module.trained_parameters())
    total = count(module.policy)
    trained = "all trained" if weights == total else f"{weights:,} trained ({weights / total:.2%})"
    yield "policy", f"{module.policy_spec.path}: {total:,} weights in {_types(module.policy)}, {trained}"
    yield "reference", "the policy with its adapters off" if module.lora else "a copy of the policy as it is"
    models = [
        f"{part.source.path}: {count(part):,} weights in {_types(part)}, reads "
        f"{part.encoder.max_tokens if part.encoder and part.encoder.max_tokens else 'any number of'} tokens"
        for part in rewards_with_models(module)
    ]
    name = "none" if is_missing(module.reward) else type(module.reward).__name__
    yield "reward", "; ".join([name, *models])


def estimate_text(whole: MemoryEstimate | ShardedEstimate, there: int | None = None) -> str:
    """Return a line about a step's memory and its parts.

    Args:
        whole: The estimate.
        there: Bytes of memory on the device, if known.
    """
    of = "" if there is None else f", of {size_text(there)},"
    shares = ", ".join(f"{name} {size_text(size)}" for name, size in whole.named.items() if size)
    return f"{size_text(whole.peak)} of tensors{of} in a step: {shares}"


def size_text(size: float) -> str:
    """Return a number of bytes in GiB or MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _types(model: nn.Module) -> str:
    return ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}))


def opening_lines(trainer: Trainer, module: XPOLightningModule) -> dict[str, str]:
    """Describe a run whose models are loaded, but not its data loaders: models, data, length and expected memory."""
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
    yield "batch", f"{batch_text(data, module)} of at most {module.sampling.max_new_tokens:,} tokens"


def batch_text(data: PromptDataModule, module: XPOLightningModule) -> str:
    """Say of how many prompts, completions and preference pairs a batch is."""
    size = data.batching.size
    if data.trains_on_pairs_alone:
        return f"{size:,} preference pairs"
    beside = "" if data.preferences is None else f", {data.preferences_batch_size:,} preference pairs"
    return f"{size:,} prompts, {completions_written(data, module):,} completions{beside}"


def completions_written(data: PromptDataModule, module: XPOLightningModule) -> int:
    """Return how many completions are written for a batch."""
    a_prompt = 2 * module.candidates.count + (module.bonus_sampler is not None)
    return 0 if data.trains_on_pairs_alone else a_prompt * data.batching.size


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
    """Estimate a step's memory on each device; None for unknown architectures, and prompts of unknown length."""
    prompts = data.prompts.get("training")
    longest = max(prompts.lengths) if isinstance(prompts, PromptDataset) else data.encoding.max_tokens
    if longest is None or not trainer.optimizers:
        return None
    whole = memory_of_run(
        module,
        trainer.optimizers[0],
        batch_size=data.batching.size,
        longest=longest,
        computes_in_bfloat16=trainer.precision == "bf16-mixed",
    )
    return None if whole is None else estimate_text(whole)
