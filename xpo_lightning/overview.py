"""A run in a few lines, as `xpo check` and the start of a run show it: its models, and the memory of a step."""

from collections.abc import Iterator

from torch import nn

from xpo_lightning.footprint.estimate import Footprint
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.planning import count, rewards_with_models


def models_of(module: XPOLightningModule) -> Iterator[tuple[str, str]]:
    """Describe the models of a module, which are loaded: a subject and what there is to say of it, each."""
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
    yield "reward", "; ".join([type(module.reward).__name__, *models])


def estimate_text(whole: Footprint, there: int | None = None) -> str:
    """Say what a step takes, and what it is made of.

    Args:
        whole: The estimate.
        there: Bytes that the device has, if they are known.
    """
    parts = {
        "models": whole.policy + whole.reference + whole.reward + whole.copies,
        "gradient and optimizer": whole.gradients + whole.optimizer,
        "completions": whole.rollout,
        "reward": whole.scoring,
        "micro-batch": whole.micro_batch,
    }
    of = "" if there is None else f", of {size_text(there)},"
    shares = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    return f"{size_text(whole.peak)} of tensors{of} in a step: {shares}"


def size_text(size: float) -> str:
    """Write a number of bytes for people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _types(model: nn.Module) -> str:
    return ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}))
