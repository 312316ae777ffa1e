"""What `xpo check` prints."""

from collections.abc import Iterator

from torch import nn

from xpo_lightning.checking.findings import Findings
from xpo_lightning.checking.planning import count, rewards_with_models
from xpo_lightning.checking.survey import Prompts
from xpo_lightning.module import XPOLightningModule


def lines_of(module: XPOLightningModule, found: Findings, warnings: list[str]) -> list[str]:
    """Write the report, a line for each subject."""
    subjects = [*_models(module), *_data(module, found), *_tried(found), *_memory(found)]
    width = max(len(name) for name, _ in subjects)
    lines = [f"{name:{width}}  {text}" for name, text in subjects]
    return [*lines, *(f"{'warning':{width}}  {text}" for text in warnings)]


def _models(module: XPOLightningModule) -> Iterator[tuple[str, str]]:
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


def _types(model: nn.Module) -> str:
    return ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}))


def _data(module: XPOLightningModule, found: Findings) -> Iterator[tuple[str, str]]:
    survey, new = found.survey, module.sampling.max_new_tokens
    yield "training", _prompts(survey.training)
    yield "validation", "no prompts" if survey.validation is None else _prompts(survey.validation)
    length = "without a known end" if found.steps is None else f"of {found.steps:,} optimizer steps"
    epoch = f"{survey.batches:,.0f} batches an epoch" if survey.batches < float("inf") else "epochs of unknown length"
    yield "run", f"{length}; {epoch}" + (f" on each of {found.processes} devices" if found.processes > 1 else "")
    size = module.trainer.datamodule.batching.size  # type: ignore[attr-defined]
    written = 2 * module.candidates.count * size
    tokens = f"{size * survey.training.mean:,.0f} prompt tokens on average, at most {written * new:,} new tokens"
    yield "batch", f"{size:,} prompts, {written:,} completions; {tokens}; {module.plan.steps} optimizer step(s)"


def _prompts(prompts: Prompts) -> str:
    number = f"{len(prompts.lengths):,} prompts"
    read = f"the first {number} of a stream" if prompts.is_stream else number
    tokens = f"{prompts.mean:.1f} tokens on average, 95% have at most {prompts.percentile(0.95)}"
    return f"{read}; {tokens}, the longest {prompts.longest}"


def _tried(found: Findings) -> Iterator[tuple[str, str]]:
    pairs = found.step.experience
    counts = [*pairs.completions.by_policy.counts, *pairs.completions.by_sampler.counts]
    ended = int(pairs.completions.by_policy.ended.sum() + pairs.completions.by_sampler.ended.sum())
    scores = [*pairs.scores.by_policy.tolist(), *pairs.scores.by_sampler.tolist()]
    yield (
        "tried",
        f"{len(pairs)} prompts: {len(counts)} completions of {sum(counts) / len(counts):.1f} tokens on average, "
        f"{ended} ended by themselves; scores {min(scores):.3g} to {max(scores):.3g}",
    )
    phases = found.step.seconds
    writing = sum(phases.get(name, 0.0) for name in ("reference_rollout", "policy_rollout", "reference_scoring"))
    gradient = sum(phases.get(name, 0.0) for name in ("policy_forward", "backward", "optimizer"))
    parts = {
        **{name: found.meter.seconds[name] for name in ("data", "models")},
        **{"completions": writing, "reward": phases.get("reward", 0.0), "gradient": gradient},
    }
    yield "seconds", ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())


def _memory(found: Findings) -> Iterator[tuple[str, str]]:
    measured = [f"{name} {_size(peak)}" for name, peak in found.meter.peaks.items() if name != "data"]
    expected = "" if found.dry is None else f" (estimate {_size(found.dry.peak)})"
    yield "memory", (f"measured: {', '.join(measured)}" if measured else "could not be measured here") + expected
    if found.whole is None:
        yield "estimate", "none for this architecture"
        return
    whole = found.whole
    parts = {
        "models": whole.policy + whole.reference + whole.reward + whole.copies,
        "gradient and optimizer": whole.gradients + whole.optimizer,
        "completions": whole.rollout,
        "reward": whole.scoring,
        "micro-batch": whole.micro_batch,
    }
    there = "" if found.memory is None else f", of {_size(found.memory)},"
    yield (
        "estimate",
        f"{_size(whole.peak)} of tensors{there} in a step: "
        + ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size),
    )
    if found.disk is None:
        yield "checkpoint", f"none is kept; one would take about {_size(whole.checkpoint)}"
    else:
        kept = "all of them" if found.disk.kept == float("inf") else f"{found.disk.kept:.0f}"
        room = f"{_size(found.disk.free)} free at {found.disk.folder}"
        yield "checkpoint", f"about {_size(whole.checkpoint)}, {kept} kept; {room}"


def _size(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
