"""Collects the findings of `xpo check`, and formats its report."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.optim import Optimizer

from xpo_lightning.cli.check.dry_step import DryStep
from xpo_lightning.cli.check.meter import Meter
from xpo_lightning.cli.check.requirements import Disk
from xpo_lightning.cli.check.survey import Prompts, RewardRows, Survey
from xpo_lightning.core.printable import aligned
from xpo_lightning.data import PromptDataModule
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.reporting.memory.estimate import MemoryEstimate, Standing
from xpo_lightning.reporting.memory.fsdp import ShardedEstimate
from xpo_lightning.reporting.run_description import batch_text, completions_written, estimate_text, models_of, size_text


@dataclass(frozen=True)
class Findings:
    """The findings of a check.

    Args:
        survey: The prompts of the run.
        steps: Optimizer steps of the run; None if it has no known end.
        processes: Number of processes of the run, of which one was tried out.
        reward_rows: For each reward model, how many prompts are too long.
        optimizer: The optimizer, which has taken no step.
        step: The dry step; None if the models of a sharded run do not fit one device whole.
        meter: Seconds and memory of the parts: `data`, `models`, `dry step`.
        standing: Memory of what the run holds all the time.
        whole: Estimated memory of a step of the run; None for unknown architectures.
        memory: Bytes of memory on the device; None if unknown.
        disk: The disk of the checkpoints; None if no checkpoint goes to a local disk.
    """

    survey: Survey
    steps: int | None
    processes: int
    reward_rows: list[RewardRows]
    optimizer: Optimizer
    step: DryStep | None
    meter: Meter
    standing: Standing
    whole: MemoryEstimate | ShardedEstimate | None
    memory: int | None
    disk: Disk | None


def report_lines(module: XPOLightningModule, found: Findings, warnings: list[str]) -> list[str]:
    """Return the report: a line for each subject, then a line for each warning."""
    subjects = [*models_of(module), *_data(module, found), *_tried(found), *_memory(found)]
    return aligned([*subjects, *(("warning", text) for text in warnings)])


def _data(module: XPOLightningModule, found: Findings) -> Iterator[tuple[str, str]]:
    survey, new = found.survey, module.sampling.max_new_tokens
    yield "training", _prompts(survey.training)
    yield "validation", "no prompts" if survey.validation is None else _prompts(survey.validation)
    length = "without a known end" if found.steps is None else f"of {found.steps:,} optimizer steps"
    epoch = f"{survey.batches:,.0f} batches an epoch" if survey.batches < float("inf") else "epochs of unknown length"
    yield "run", f"{length}; {epoch}" + (f" on each of {found.processes} devices" if found.processes > 1 else "")
    data: PromptDataModule = module.trainer.datamodule  # type: ignore[attr-defined]
    size = data.batching.size
    written = completions_written(data, module)
    tokens = f"{size * survey.training.mean:,.0f} prompt tokens on average, at most {written * new:,} new tokens"
    yield "batch", f"{batch_text(data, module)}; {tokens}; {module.plan.step_count} optimizer step(s)"


def _prompts(prompts: Prompts) -> str:
    number = f"{len(prompts.lengths):,} prompts"
    read = f"the first {number} of a stream" if prompts.is_stream else number
    tokens = f"{prompts.mean:.1f} tokens on average, 95% have at most {prompts.percentile(0.95)}"
    return f"{read}; {tokens}, the longest {prompts.longest}"


def _tried(found: Findings) -> Iterator[tuple[str, str]]:
    if found.step is None:
        yield "tried", "nothing: the models do not fit one device whole, and a check has no other"
        return
    pairs = found.step.experience
    counts = [*pairs.completions.by_policy.counts, *pairs.completions.by_sampler.counts]
    ended = int(pairs.completions.by_policy.ended.sum() + pairs.completions.by_sampler.ended.sum())
    scores = [score for side in vars(pairs.sampled.scores).values() for score in side.tolist()] if pairs.sampled else []
    yield (
        "tried",
        f"{len(pairs)} prompts: {len(counts)} completions of {sum(counts) / len(counts):.1f} tokens on average, "
        f"{ended} ended by themselves" + (f"; scores {min(scores):.3g} to {max(scores):.3g}" if scores else ""),
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
    measured = [f"{name} {size_text(peak)}" for name, peak in found.meter.peaks.items() if name != "data"]
    yield "memory", f"measured: {', '.join(measured)}" if measured else "could not be measured here"
    whole, checkpoint = found.whole, size_text(found.standing.checkpoint)
    yield "estimate", "none for this architecture" if whole is None else estimate_text(whole, found.memory)
    if found.disk is None:
        yield "checkpoint", f"none is kept; one would take about {checkpoint}"
    else:
        kept = "all of them" if found.disk.kept == float("inf") else f"{found.disk.kept:.0f}"
        room = f"{size_text(found.disk.free)} free at {found.disk.folder}"
        yield "checkpoint", f"about {checkpoint}, {kept} kept; {room}"
