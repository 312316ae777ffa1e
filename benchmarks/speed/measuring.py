"""What both workers share: their spec, their prompts, their memory, and the line that they print."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

Prompt = dict[str, Any]


def read_spec() -> dict[str, Any]:
    """Read the JSON spec that the worker was started with."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    return spec


def read_prompts(spec: dict[str, Any]) -> tuple[list[Prompt], list[Prompt]]:
    """Read the prompts of the warm-up and those to time.

    Returns:
        The prompts that no timed step sees, the longest first, so that what is done once for each length has been done;
        and the step's own. Where fewer than the whole step are timed, they are evenly spaced in order of length, so
        that their lengths are distributed as the step's are.
    """
    lines = Path(spec["prompts"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    step, warmup = rows[: spec["step_prompts"]], rows[spec["step_prompts"] :]
    warmup.sort(key=lambda row: len(row["prompt_ids"]), reverse=True)
    wanted = spec["timed_prompts"]
    by_length = sorted(range(len(step)), key=lambda row: len(step[row]["prompt_ids"]))
    chosen = sorted(by_length[(2 * place + 1) * len(step) // (2 * wanted)] for place in range(wanted))
    return warmup, [step[row] for row in chosen]


def memory_gib(field: str = "VmHWM") -> float:
    """Return this process's peak memory (VmHWM) or its memory now (VmRSS) in GiB, as Linux counts it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"/proc/self/status has no {field}")


def finish_device_work() -> None:
    """Wait until a GPU, where there is one, has done what it was asked to."""
    import torch  # noqa: PLC0415  (as below)

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def result(
    spec: dict[str, Any], seconds: float, phases: dict[str, float], loaded_gib: float, new_tokens: int | None
) -> dict[str, Any]:
    """Put together what one worker measured.

    Only part of TRL's step may be timed. Everything but the optimizer grows with the prompts; the optimizer runs once
    a step. So a prompt costs (seconds - optimizer) / timed prompts + optimizer / prompts of the whole step.

    Args:
        spec: The worker's spec.
        seconds: Wall-clock seconds of the timed optimizer step.
        phases: Seconds of its phases.
        loaded_gib: Peak memory before the first step.
        new_tokens: Tokens of each completion, as counted in the outputs; None where they could not be counted.
    """
    timed, step = spec["timed_prompts"], spec["step_prompts"]
    optimizer = phases.get("optimizer", 0.0)
    a_prompt = (seconds - optimizer) / timed + optimizer / step
    shares = {name: value / (step if name == "optimizer" else timed) for name, value in phases.items()}
    return {
        "system": spec["system"],
        "timed_prompts": timed,
        "timed_seconds": seconds,
        "step_seconds": a_prompt * step,
        "seconds_per_prompt": a_prompt,
        "tokens_per_second": 2 * spec["new_tokens"] / a_prompt,
        "phases_per_prompt": shares,
        "peak_gib": memory_gib(),
        "loaded_gib": loaded_gib,
        "gpu_peak_gib": _gpu_peak_gib(),
        "new_tokens": new_tokens,
        "hardware": hardware(),
    }


def _gpu_peak_gib() -> float:
    import torch  # noqa: PLC0415  (as below)

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def hardware() -> dict[str, Any]:
    """Describe the machine as PyTorch sees it."""
    import torch  # noqa: PLC0415  (the rest of this file is for processes without it, too)

    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
