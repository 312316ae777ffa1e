"""A page about a run: one HTML file that needs nothing else, and asks nobody for anything."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from xpo_lightning import __version__
from xpo_lightning.atomic_files import replacing_file
from xpo_lightning.errors import InputError
from xpo_lightning.reporting import chart
from xpo_lightning.reporting.facts import headlines, held_out, last_step, timings
from xpo_lightning.reporting.panels import PANELS
from xpo_lightning.reporting.run_files import COMPLETIONS, CONFIG, START, RunFiles
from xpo_lightning.reporting.samples import samples_of
from xpo_lightning.reporting.series import read_metrics


def write_report(run: RunFiles, path: Path) -> None:
    """Write the page about a run.

    Args:
        run: The run.
        path: Where the page goes.

    Raises:
        InputError: The run has no metrics that the page could show, or one of its files is not what it should be.
    """
    page = report_of(run)
    with replacing_file(path) as file:
        file.write(page)


def report_of(run: RunFiles) -> str:
    """Compose the page about a run from what lies in its folder.

    Whatever comes from the run is text, and stays text: the template escapes it all, and the page's security policy
    lets no script run but its own.
    """
    metrics = read_metrics(run.metrics) if run.metrics.is_file() else {}
    charts = {panel.title: chart.chart_of(panel, metrics) for panel in PANELS}
    drawn = [one for one in charts.values() if one]
    if not drawn:
        raise InputError(f"{run.metrics} has no metric to draw; lower trainer.log_every_n_steps for a short run")
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
        headlines=headlines(metrics),
        held_out=held_out(metrics),
        charts=drawn,
        not_logged=[title for title, one in charts.items() if one is None],
        box=chart,
        samples=samples_of(run.text(COMPLETIONS) or ""),
        timings=timings(metrics),
        validations=len(metrics["eval/win_rate"].steps) if "eval/win_rate" in metrics else 0,
        start=_start(run),
        config=run.text(CONFIG),
        version=__version__,
        script_hash=_hash(environment.get_template("report.js").render()),
    )


def readable(text: Any) -> str:
    """Replace what a page cannot hold: control characters but line breaks and tabs, and halves of characters."""
    whole = str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "�" for c in whole)


def _start(run: RunFiles) -> dict[str, dict[str, str]]:
    """Read what `RunSummary` wrote; nothing where there was none."""
    try:
        groups: dict[str, dict[str, str]] = json.loads(run.text(START) or "{}")
        return {title: dict(facts) for title, facts in groups.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{run.folder / START} is no file of RunSummary ({error}); remove it") from error


def _hash(script: str) -> str:
    """Name a script as the page's security policy does."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
