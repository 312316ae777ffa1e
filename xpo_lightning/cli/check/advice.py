"""Warns of settings that a run accepts, but that are probably mistakes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from xpo_lightning.cli.check.report import Findings
from xpo_lightning.losses.schedules import FIRST_STEP
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.rewards.base import Judge

FAR_BELOW = 100
"""Alpha should be at least this many times Adam's eps: a gradient near eps is lost beside it (a rule of thumb)."""
_BFLOAT16_HALF_STEP = 2**-9  # relative to a bfloat16 number: a smaller change is rounded away


def warnings_of(module: XPOLightningModule, found: Findings) -> list[str]:
    """Return one line for each setting that is probably a mistake."""
    parts = (_data(module, found), _samples(module, found), _optimizer(module, found), _resources(found))
    return [line for part in parts for line in part]


def _data(module: XPOLightningModule, found: Findings) -> Iterator[str]:
    training = found.survey.training
    if training.truncated:
        yield (
            f"data.truncate: {training.truncated:,} of {len(training.lengths):,} prompts lose their beginning to "
            f"data.max_prompt_tokens={training.longest}"
        )
    size = module.trainer.datamodule.batching.size  # type: ignore[attr-defined]
    if not training.is_stream and len(training.lengths) < size:
        yield f"data.batch_size={size} is more than the {len(training.lengths):,} prompts: every batch is smaller"
    for rows in found.reward_rows:
        if rows.too_long:
            yield (
                f"model.reward: {rows.too_long} of {rows.read} prompts and model.sampling.max_new_tokens="
                f"{module.sampling.max_new_tokens} exceed the {rows.limit} tokens that the reward model reads, so it "
                f"does not see all of them"
            )
    if found.processes > 1:
        yield f"trainer.devices: one of {found.processes} processes was tried out"


def _samples(module: XPOLightningModule, found: Findings) -> Iterator[str]:
    pairs = None if found.step is None else found.step.experience.sampled
    if pairs is None:
        return
    sides = (pairs.completions.by_policy, pairs.completions.by_sampler)
    ended = torch.cat([side.ended for side in sides])
    if module.missing_eos_penalty and not ended.any():
        yield (
            f"model.missing_eos_penalty: none of {len(ended)} sampled completions ended within model.sampling."
            f"max_new_tokens={module.sampling.max_new_tokens}, so the penalty falls on all of them; raise that number"
        )
    if not any(text.strip() for side in sides for text in side.texts):
        yield f"model.sampling: all of {len(ended)} sampled completions are empty"
    if bool(pairs.identical.all()):
        yield (
            f"model.sampling: the completions of each of {len(pairs)} sampled pairs are identical, which says nothing "
            f"of preference; is model.sampling.temperature={module.sampling.temperature} meant?"
        )
    elif not isinstance(module.reward, Judge) and _constant(pairs.scores.by_policy, pairs.scores.by_sampler):
        score = float(pairs.scores.by_policy[0])
        yield f"model.reward: all of {len(ended)} sampled completions have the same score, {score:g}"
    elif pairs.answered is not None and not pairs.answered.any():
        yield f"model.reward: the judge gave no usable answer for any of {len(pairs)} sampled pairs"


def _optimizer(module: XPOLightningModule, found: Findings) -> Iterator[str]:
    alpha = abs(module.objective.weights(FIRST_STEP)["alpha"])
    groups = found.optimizer.param_groups
    eps, decay = (max(float(group.get(name) or 0) for group in groups) for name in ("eps", "weight_decay"))
    if alpha and alpha < FAR_BELOW * eps:
        yield (
            f"model.alpha: {alpha:g} is not far above the optimizer's eps of {eps:g}, beside which a gradient of that "
            f"size is lost; set eps in model.optimizer to 1e-12, say"
        )
    if alpha and decay:
        yield (
            f"model.optimizer: weight_decay={decay:g} pulls towards the uniform policy, as the exploration term may "
            f"seem to do; set it to 0 to tell them apart"
        )
    rate = max(float(group.get("initial_lr", group["lr"])) for group in groups)
    still = _rounded_away(module.trained_parameters(), rate)
    if still > 0.5:
        yield (
            f"model.policy.dtype: at a learning rate of {rate:g}, steps are rounded away for {still:.0%} of the "
            f"bfloat16 weights; set it to float32"
        )
    warmup = module.optimization.warmup_steps
    if warmup and found.steps is not None and warmup >= found.steps:
        yield f"model.warmup_steps={warmup} is not below the {found.steps} optimizer steps of the run"


def _resources(found: Findings) -> Iterator[str]:
    if found.whole is not None and found.memory is not None and found.whole.peak > found.memory:
        yield (
            f"model.micro_batch_size, model.rollout_batch_size: a step may take {found.whole.peak / 2**30:.1f} GiB, "
            f"and {found.memory / 2**30:.1f} GiB are there"
        )
    if found.disk is None:
        return
    size = found.standing.checkpoint
    if found.disk.kept == float("inf") and found.steps is not None:
        yield f"trainer.callbacks: save_top_k is -1, so that every checkpoint stays, of {size / 2**20:,.0f} MiB each"
    elif size * (found.disk.kept + 1) > found.disk.free:  # Each is written beside the one that it replaces.
        yield (
            f"trainer.default_root_dir: {found.disk.kept:.0f} checkpoints of {size / 2**20:,.0f} MiB and one that is "
            f"being written do not fit '{found.disk.folder}'"
        )


def _constant(*scores: Tensor) -> bool:
    values = torch.cat(scores)
    return len(values) > 1 and bool((values == values[0]).all())


def _rounded_away(weights: list[torch.nn.Parameter], rate: float) -> float:
    """Return the share of weights for which bfloat16 rounds away a step of Adam, which is about the learning rate."""
    if not any(weight.dtype == torch.bfloat16 for weight in weights):
        return 0.0
    still = sum(
        int((weight.detach().abs().float() * _BFLOAT16_HALF_STEP > rate).sum())
        for weight in weights
        if weight.dtype == torch.bfloat16
    )
    return still / sum(weight.numel() for weight in weights)
