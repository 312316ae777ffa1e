"""Tables of what was measured, in Markdown."""

from statistics import median
from typing import Any

from benchmarks.speed.suites import SYSTEMS, Suite

Run = dict[str, Any]
# Those of `xpo_lightning.core.timer`, which imports torch: this runs before there is an environment.
PHASES = (
    "reference_rollout",
    "policy_rollout",
    "reference_scoring",
    "reward",
    "policy_forward",
    "backward",
    "optimizer",
)
NAMES = {"ours": "xpo-lightning", "trl-best": "TRL, best settings", "trl-shipped": "TRL, as shipped"}


def header(runs: list[Run]) -> str:
    """Say on what machine the runs were made."""
    machine = runs[0]["hardware"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['cpu_capability']}, "
        f"PyTorch {machine['torch']}, Python {machine['python']}"
    )


def comparison(suite: Suite, runs: list[Run]) -> str:
    """Compare the systems: seconds, tokens, memory, then phases."""
    tokens = runs[0]["spec"]["new_tokens"]
    rows = [
        [
            f"**{suite.name}**: a step of {suite.prompts} prompts, 2 x {tokens} new tokens each",
            "seconds a prompt, median (min to max)",
            "seconds a step",
            "new tokens a second",
            "peak memory, GiB",
            "of it after loading",
            "prompts timed",
            "times as long as ours",
        ]
    ]
    rows += [_comparison_row(system, runs) for system in SYSTEMS if _of(system, runs)]
    return _markdown(rows) + "\n\n" + _phases(runs)


def tuning(suite: Suite, runs: list[Run]) -> str:
    """Compare TRL's settings."""
    rows = [["batch", "bf16 autocast", f"{suite.name}: seconds a prompt", "peak memory, GiB"]]
    for run in runs:
        spec = run["spec"]
        cells = (str(spec["batch"]), "yes" if spec["options"]["bf16"] else "no")
        rows.append([*cells, f"{run['seconds_per_prompt']:.3f}", f"{run['peak_gib']:.2f}"])
    return _markdown(rows)


def floor_table(floor: dict[str, Any]) -> str:
    """Show what the matrix products of a step must take, and how near we are."""
    rows = [["part of a step", "GFLOP a prompt", f"seconds a prompt at {floor['gflops_per_second']:.0f} GFLOP/s"]]
    for name, gflop in floor["gflop_per_prompt"].items():
        rows.append([name, f"{gflop:.2f}", f"{gflop / floor['gflops_per_second']:.4f}"])
    total = sum(floor["gflop_per_prompt"].values())
    rows.append(["**all**", f"**{total:.2f}**", f"**{floor['seconds_per_prompt']:.4f}**"])
    ours = floor.get("ours")
    share = f"\n\nfloor / ours = {floor['seconds_per_prompt'] / ours:.0%}" if ours else ""
    return _markdown(rows) + share


def _comparison_row(system: str, runs: list[Run]) -> list[str]:
    own = _of(system, runs)
    seconds = [run["seconds_per_prompt"] for run in own]
    ours = [run["seconds_per_prompt"] for run in _of("ours", runs)]
    first = own[0]
    step = first["spec"]["step_prompts"]
    return [
        NAMES[system] + (f" (batch {first['spec']['batch']})" if "batch" in first["spec"] else ""),
        f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})",
        f"{median(run['step_seconds'] for run in own):.1f}" + ("" if first["timed_prompts"] == step else " (scaled)"),
        f"{median(run['tokens_per_second'] for run in own):.0f}",
        f"{max(run['peak_gib'] for run in own):.2f}",
        f"{max(run['loaded_gib'] for run in own):.2f}",
        f"{first['timed_prompts']} of {step}",
        f"{median(seconds) / median(ours):.2f}" if ours else "",
    ]


def _phases(runs: list[Run]) -> str:
    systems = [system for system in SYSTEMS if _of(system, runs)]
    rows = [["phase, seconds a prompt (medians)", *(NAMES[system] for system in systems)]]
    for phase in PHASES:
        values = [[run["phases_per_prompt"].get(phase) for run in _of(system, runs)] for system in systems]
        rows.append([phase, *(_seconds(median(column)) if None not in column else "" for column in values)])
    rest = [
        median(run["seconds_per_prompt"] - sum(run["phases_per_prompt"].values()) for run in _of(system, runs))
        for system in systems
    ]
    rows.append(["everything else", *map(_seconds, rest)])
    return _markdown(rows)


def _of(system: str, runs: list[Run]) -> list[Run]:
    return [run for run in runs if run["system"] == system]


def _seconds(value: float) -> str:
    return f"{value:.4f}"


def _markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])
