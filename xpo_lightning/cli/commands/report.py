"""`xpo report`: writes an HTML page about a run."""

from pathlib import Path

from xpo_lightning.core.errors import InputError
from xpo_lightning.reporting.html_report import write_report
from xpo_lightning.reporting.run_files import find_run


def report(run: str, out: str = "report.html") -> None:
    """Write a page about a run: curves, held-out numbers, completions, config and versions in one HTML file.

    Args:
        run: A run's folder, the folder of its versions (the newest is taken), or its metrics.csv.
        out: Path of the HTML file.

    Raises:
        InputError: There is no such run, or it has logged none of the metrics that are drawn.
    """
    if Path(out).suffix != ".html":
        raise InputError(f"--out must end with .html, but is {out!r}")
    found = find_run(run)
    write_report(found, Path(out))
    print(f"Report on {found.name}: {out}")
