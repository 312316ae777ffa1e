"""The numbers of a run that a reader looks for first, as they were logged."""

import math
from dataclasses import dataclass
from statistics import median

from xpo_lightning.reporting.series import Metrics

HEADLINES = {
    "win_rate": (
        "Held-out win rate",
        "against the reference; 0.5 is no better than it, and a tie is half a win",
    ),
    "objective/kl": ("KL from the reference", "nats a completion; how far the policy has moved away"),
}
PHASES = {"step": "a whole step", "policy_forward": "policy, forward", "optimizer": "optimizer's step"}
HELD_OUT = {
    "win_rate": "win rate against the reference",
    "objective/kl": "KL from the reference (nats)",
    "objective/scores_margin": "score margin, policy − reference",
    "objective/model_scores": "score of the policy",
    "objective/ref_scores": "score of the reference",
    "objective/rlhf_reward": "score less β KL",
    "loss/dpo": "preference loss",
    "completions/model_length": "completion length (tokens)",
    "val/model_contain_eos_token": "ended by themselves",
    "pairs/tied": "tied pairs",
}


@dataclass(frozen=True)
class Value:
    """A number with its standard error, where that was logged."""

    number: float
    error: float | None = None

    def __str__(self) -> str:
        """Write it with three digits after the point."""
        number = f"{self.number:z.3f}".replace("-", "−")
        return number if self.error is None else f"{number} ± {self.error:.3f}"


@dataclass(frozen=True)
class Change:
    """A held-out metric over a run.

    Args:
        title: What it is.
        note: What it means.
        steps: The steps of the validations that are compared: the first and the last, or the only one.
        values: What was measured at each.
    """

    title: str
    note: str
    steps: list[int]
    values: list[Value]


def headlines(metrics: Metrics) -> list[Change]:
    """Return the numbers that stand above all others, as far as they were logged."""
    changes = (_change(metrics, name, title, note) for name, (title, note) in HEADLINES.items())
    return [change for change in changes if change]


def held_out(metrics: Metrics) -> list[Change]:
    """Return the held-out metrics, as far as they were logged."""
    changes = (_change(metrics, name, title, "") for name, title in HELD_OUT.items())
    return [change for change in changes if change]


def timings(metrics: Metrics) -> dict[str, str]:
    """Return the medians of what `Throughput` logged."""
    facts = {}
    for name, series in metrics.items():
        values = [value for value in series.values if math.isfinite(value)]
        group, _, what = name.partition("/")
        if values and group == "throughput":
            facts[what.replace("_", " ")] = f"{median(values):,.4g}"
        elif values and group == "time":
            facts[f"{PHASES.get(what, what).replace('_', ' ')} (seconds)"] = f"{median(values):.3g}"
    return facts


def last_step(metrics: Metrics) -> int:
    """Return the last step of which anything was logged."""
    return max((series.steps[-1] for series in metrics.values()), default=0)


def _change(metrics: Metrics, name: str, title: str, note: str) -> Change | None:
    series, errors = metrics.get(f"eval/{name}"), metrics.get(f"eval/{name}_stderr")
    if series is None:
        return None
    places = sorted({0, len(series.steps) - 1})
    steps = [series.steps[place] for place in places]
    values = [
        Value(series.values[place], errors.at(step) if errors else None)
        for place, step in zip(places, steps, strict=True)
    ]
    return Change(title, note, steps, values)
