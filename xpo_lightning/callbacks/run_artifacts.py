"""`RunReport` and `LearningCurves`: an HTML page and a picture of the run, written when it ends."""

from abc import abstractmethod
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from xpo_lightning.callbacks.base import FileWriter, is_fast_dev_run, print_line
from xpo_lightning.core.errors import InputError, one_line
from xpo_lightning.core.fault_tolerance.guard import StopAsked
from xpo_lightning.reporting.html_report import write_report
from xpo_lightning.reporting.picture import draw_curves
from xpo_lightning.reporting.run_files import RunFiles


class MadeAtEnd(FileWriter):
    """Makes a file from `metrics.csv` at the end of training, and when a run is asked to stop.

    Args:
        file: Where to write; a relative path starts in the run's folder.
    """

    kind: str
    suffix: str

    def __init__(self, file: str) -> None:
        super().__init__()
        if Path(file).suffix != self.suffix:
            raise InputError(
                f"trainer.callbacks: {type(self).__name__}.file must end with {self.suffix}, but is {file!r}"
            )
        self.file = file
        self._metrics: Path | None = None

    @abstractmethod
    def make(self, metrics: Path, path: Path) -> None:
        """Make the file.

        Args:
            metrics: The metrics file.
            path: Where to write.

        Raises:
            InputError: The metrics file has nothing to make it from.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the metrics file.

        Raises:
            InputError: There is no CSVLogger, or it renames the metrics.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or is_fast_dev_run(trainer):
            return
        name = type(self).__name__
        loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        if not loggers:
            raise InputError(
                f"trainer.logger: {name} needs a ResumableCSVLogger, or Lightning's CSVLogger; add one, or remove "
                f"{name} from trainer.callbacks"
            )
        if loggers[0]._prefix:
            raise InputError(f"trainer.logger: {name} cannot read metrics with a prefix; remove it from CSVLogger")
        self._metrics = Path(loggers[0].log_dir) / "metrics.csv"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the file."""
        self._make(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Make the file from the metrics so far, if training was asked to stop."""
        if isinstance(exception, (KeyboardInterrupt, StopAsked)) and trainer.state.fn == "fit":
            self._make(trainer)

    def _make(self, trainer: Trainer) -> None:
        if self._metrics is None or not trainer.is_global_zero:
            return
        path = self.folder / self.file
        try:
            self.make(self._metrics, path)
        except Exception as error:  # A finished run must not fail because a picture cannot be drawn.
            known = isinstance(error, InputError)
            print_line(f"No {self.kind}: {'' if known else f'{type(error).__name__}: '}{one_line(error)}")
        else:
            self.written[self.kind] = path


class LearningCurves(MadeAtEnd):
    """Draws the learning curves at the end of training, and when a run is asked to stop.

    It reads `metrics.csv`, so it needs a `ResumableCSVLogger` or a `CSVLogger` among the loggers. `xpo plot` draws
    them at any other time.

    Args:
        file: Path of the PNG file; a relative path starts in the run's folder.
    """

    kind, suffix = "learning curves", ".png"

    def __init__(self, file: str = "curves.png") -> None:
        super().__init__(file)

    def make(self, metrics: Path, path: Path) -> None:
        """Draw the curves."""
        draw_curves(metrics, path)


class RunReport(MadeAtEnd):
    """Writes an HTML page about the run at the end of training, and when a run is asked to stop.

    It shows the files that are in the run's folder then: curves from `metrics.csv`, for which it needs a
    `ResumableCSVLogger` or a `CSVLogger` among the loggers; completions, if the run has a `CompletionsTable`; models
    and versions, if it has a `RunSummary`. `xpo report` writes the page at any other time.

    Args:
        file: Path of the HTML file; a relative path starts in the run's folder.
    """

    kind, suffix = "report", ".html"

    def __init__(self, file: str = "report.html") -> None:
        super().__init__(file)

    def make(self, metrics: Path, path: Path) -> None:
        """Write the page."""
        write_report(RunFiles(metrics), path)
