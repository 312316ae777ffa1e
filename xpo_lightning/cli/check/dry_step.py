"""Takes a few prompts through a training step without its end: completions, scores and gradient, no optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer

from xpo_lightning.core.batch import Experience
from xpo_lightning.core.rng import RolloutRNG, Stream
from xpo_lightning.data.dataloader import collate
from xpo_lightning.data.preprocessing import Sample
from xpo_lightning.losses.schedules import FIRST_STEP
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.rewards import HumanJudge
from xpo_lightning.training.gradients import add_gradients, clip_gradient


@dataclass(frozen=True)
class DryStep:
    """The result of a dry step.

    Args:
        experience: The pairs.
        seconds: Seconds of each phase.
    """

    experience: Experience
    seconds: dict[str, float]


def prompts_wanted(module: XPOLightningModule) -> int:
    """Return how many prompts a dry step takes: 4, or 1 if a human judges them."""
    return 1 if any(isinstance(part, HumanJudge) for part in module.reward.modules()) else 4


def dry_step(module: XPOLightningModule, trainer: Trainer, samples: Sequence[Sample]) -> DryStep:
    """Sample and label a pair of completions for each prompt, and compute the gradient of the objective.

    Args:
        module: The module, with its models on the trainer's device.
        trainer: The trainer.
        samples: B prompts, as the data module gives them.

    Raises:
        InputError: For the same reasons as in a training step.
    """
    noise = RolloutRNG(module.run_state.seed, Stream.CHECK)
    batch = trainer.datamodule.with_preferences(collate(samples), 0, len(samples))  # type: ignore[attr-defined]
    module.timer.reset()
    with trainer.precision_plugin.train_step_context():
        with module.guard.together():
            experience = module.collect(batch, noise, training=True)
        micro_batches = module.plan.micro_batches(experience.sizes, range(len(experience)))
        weights = module.objective.weights(FIRST_STEP)
        added = add_gradients(module, experience, micro_batches, weights, None)
        norm = clip_gradient(module)
        with module.guard.together():
            added.check(norm)
    for weight in module.trained_parameters():
        weight.grad = None
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return DryStep(experience, module.timer.seconds())
