"""`xpo plot`: draws the learning curves of runs."""

from pathlib import Path

from xpo_lightning.core.errors import InputError
from xpo_lightning.reporting.picture import draw_curves
from xpo_lightning.reporting.run_files import find_runs


def plot(runs: list[str], out: str = "curves.png") -> None:
    """Draw the learning curves of one run, or of several runs in the same panels.

    Args:
        runs: A run's folder, the folder of its versions (the newest is taken), or its metrics.csv.
        out: Path of the PNG file.

    Raises:
        InputError: There is no such run, or it has logged none of the metrics that are drawn.
    """
    if Path(out).suffix != ".png":
        raise InputError(f"--out must end with .png, but is {out!r}")
    files = {name: found.metrics for name, found in find_runs(runs).items()}
    draw_curves(files, Path(out))
    print(f"Learning curves of {', '.join(files)}: {out}")
