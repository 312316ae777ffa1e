"""Writes an HTML page about a run: one self-contained file that loads nothing."""

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from xpo_lightning import __version__
from xpo_lightning.core.atomic_files import replacing_file
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.run_events import EVENTS, event_lines
from xpo_lightning.reporting import svg_chart as chart
from xpo_lightning.reporting.metrics_file import Metrics
from xpo_lightning.reporting.panels import BAND_OPACITY, COLORS, KINDS, PANELS, metrics_to_draw
from xpo_lightning.reporting.run_files import COMPLETIONS, CONFIG, START, RunFiles
from xpo_lightning.reporting.samples import samples_of

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
    """A number with its standard error, if that was logged."""

    number: float
    error: float | None = None

    def __str__(self) -> str:
        """Return it with three digits after the decimal point."""
        number = f"{self.number:z.3f}".replace("-", "−")
        return number if self.error is None else f"{number} ± {self.error:.3f}"


@dataclass(frozen=True)
class Change:
    """A held-out metric over a run.

    Args:
        title: Name of the metric.
        note: Meaning of the metric.
        steps: The steps of the validations that are compared: the first and the last, or the only one.
        values: The metric at each of these steps.
    """

    title: str
    note: str
    steps: list[int]
    values: list[Value]


def changes(metrics: Metrics, titles: dict[str, tuple[str, str]]) -> list[Change]:
    """Return held-out metrics, as far as they were logged.

    Args:
        metrics: The metrics of the run.
        titles: Title and note of each metric.
    """
    found = (_change(metrics, name, title, note) for name, (title, note) in titles.items())
    return [change for change in found if change]


def timings(metrics: Metrics) -> dict[str, str]:
    """Return the median of each metric that `Throughput` logged."""
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
    """Return the last step that any metric was logged for."""
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


def write_report(run: RunFiles, path: Path) -> None:
    """Write the page about a run.

    Args:
        run: The run.
        path: Path of the page.

    Raises:
        InputError: The run has no metric that the page could show, or one of its files is damaged.
    """
    page = report_of(run)
    with replacing_file(path) as file:
        file.write(page)


def report_of(run: RunFiles) -> str:
    """Return the page about a run, made from the files in its folder.

    Text of the run cannot become markup or code: the template escapes all of it, and the page's security policy allows
    no script but the page's own.
    """
    metrics = metrics_to_draw(run.metrics)
    charts = {panel.title: chart.chart_of(panel, metrics) for panel in PANELS}
    environment = Environment(
        loader=PackageLoader("xpo_lightning.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["readable"] = readable
    return environment.get_template("report.html.j2").render(
        run=run,
        steps=last_step(metrics),
        headlines=changes(metrics, HEADLINES),
        held_out=changes(metrics, {name: (title, "") for name, title in HELD_OUT.items()}),
        charts=[one for one in charts.values() if one],
        not_logged=[title for title, one in charts.items() if one is None],
        box=chart,
        colors=COLORS,
        kinds=KINDS,
        band_opacity=BAND_OPACITY,
        samples=samples_of(run.text(COMPLETIONS) or ""),
        timings=timings(metrics),
        validations=len(metrics["eval/win_rate"].steps) if "eval/win_rate" in metrics else 0,
        events=_events(run),
        start=_start(run),
        config=run.text(CONFIG),
        version=__version__,
        script_hash=_hash(environment.get_template("report.js").render()),
    )


def readable(text: Any) -> str:
    """Replace what a page cannot hold: lone surrogates, and control characters except line breaks and tabs."""
    whole = str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "�" for c in whole)


def _events(run: RunFiles) -> list[dict[str, Any]]:
    """Read the events of the run; return [] if there are none."""
    try:
        events = [json.loads(line) for line in event_lines(run.text(EVENTS) or "")]
        return [{"step": int(event["step"]), "text": str(event["text"])} for event in events]
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{run.folder / EVENTS} has a line that is no event of a run ({error}); remove it") from error


def _start(run: RunFiles) -> dict[str, dict[str, str]]:
    """Read the file of `RunSummary`; return {} if there is none."""
    try:
        groups: dict[str, dict[str, str]] = json.loads(run.text(START) or "{}")
        return {title: dict(facts) for title, facts in groups.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{run.folder / START} is no file of RunSummary ({error}); remove it") from error


def _hash(script: str) -> str:
    """Return a script's hash as the page's content security policy writes it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
