"""`LearningCurves`: a picture of the run, from its own metrics file."""

from pathlib import Path

from xpo_lightning.callbacks.at_end import MadeAtEnd
from xpo_lightning.reporting.picture import draw_curves


class LearningCurves(MadeAtEnd):
    """Draws the learning curves at the end of training, and when somebody asks for it to stop.

    It reads `metrics.csv`, so it needs a `ResumableCSVLogger` or a `CSVLogger` among the loggers. `xpo plot` draws
    them at any other time.

    Args:
        file: Where to draw; a relative path starts in the run's folder. PNG.
    """

    kind, suffix = "learning curves", ".png"

    def __init__(self, file: str = "curves.png") -> None:
        super().__init__(file)

    def make(self, metrics: Path, path: Path) -> None:
        """Draw."""
        draw_curves(metrics, path)
