"""Writes the README of an exported policy: its base model, training and evaluation."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from lightning.pytorch import Trainer
from torch import Tensor

from xpo_lightning.core.versions import installed_version
from xpo_lightning.losses.schedules import Constant, Schedule
from xpo_lightning.module import XPOLightningModule

PACKAGES = ("torch", "transformers", "lightning", "peft", "xpo-lightning")
EVALUATED = {
    "win rate against the reference": "win_rate",
    "KL from the reference (nats)": "objective/kl",
    "mean score": "objective/model_scores",
    "mean score of the reference": "objective/ref_scores",
    "preference loss": "loss/dpo",
}


def model_card(
    module: XPOLightningModule, facts: dict[str, str], metrics: Mapping[str, Tensor], is_adapter: bool
) -> str:
    """Write the model card.

    Args:
        module: The module, with its settings.
        facts: Further facts of its training, see `training_facts`.
        metrics: The latest metrics; those under `eval/` are shown.
        is_adapter: Whether the folder holds only adapters.

    Returns:
        Markdown with a YAML header. It names no licence: that is the base model's, and is not known here.
    """
    base = module.policy_spec.path
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) and not Path(base).exists()
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base if on_hub else None,
        tags=["xpo", "preference-optimization"],
    )
    tables = {
        "training": {**facts, **_settings(module)},
        "last validation": _evaluation_facts(metrics),
        "package": {name: installed_version(name) for name in PACKAGES},
    }
    template = str(Path(__file__).with_name("model_card.md.j2"))
    card = ModelCard.from_template(data, template, base=base, tables=tables, is_adapter=is_adapter)
    return f"{card}\n"


def facts_of_trainer(trainer: Trainer) -> dict[str, str]:
    """Return the training facts that a trainer, its data module and its optimizer know."""
    groups = trainer.optimizers[0].param_groups if trainer.optimizers else []
    return training_facts(trainer.global_step, groups, trainer.datamodule)  # type: ignore[attr-defined]


def training_facts(steps: int, groups: Sequence[Mapping[str, Any]], data: Any) -> dict[str, str]:
    """Return the optimizer steps, the peak learning rate and the prompts of a training run, as far as they are known.

    Args:
        steps: Optimizer steps.
        groups: The optimizer's parameter groups, with or without parameters; may be empty.
        data: The data module, or None.
    """
    facts = {"optimizer steps": str(steps)}
    if groups:
        facts["peak learning rate"] = f"{groups[0].get('initial_lr', groups[0]['lr']):g}"
    source = getattr(getattr(data, "source", None), "name", None)
    return {**facts, "prompts": str(source)} if source else facts


def _settings(module: XPOLightningModule) -> dict[str, str]:
    return {
        "alpha": _describe(module.objective.alpha),
        "beta": _describe(module.objective.beta),
        "adapters": "none" if module.lora is None else str(module.lora),
        "sampling": str(module.sampling),
    }


def _evaluation_facts(metrics: Mapping[str, Tensor]) -> dict[str, str]:
    facts = {}
    for label, name in EVALUATED.items():
        if (value := metrics.get(f"eval/{name}")) is not None:
            error = metrics.get(f"eval/{name}_stderr")
            facts[label] = f"{float(value):.4g}" + ("" if error is None else f" ± {float(error):.2g}")
    return facts


def _describe(schedule: Schedule) -> str:
    if isinstance(schedule, Constant):
        return f"{schedule.value:g}"
    settings = ", ".join(f"{name}={value}" for name, value in vars(schedule).items())
    return f"{type(schedule).__name__}({settings})"
