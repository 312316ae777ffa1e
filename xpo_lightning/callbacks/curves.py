"""`LearningCurves`: a picture of the run, from its own metrics file."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from xpo_lightning.callbacks.plot import draw_curves
from xpo_lightning.callbacks.run import FileWriter, is_fast_dev_run, say
from xpo_lightning.errors import InputError
from xpo_lightning.guard import StopAsked


class LearningCurves(FileWriter):
    """Draws the learning curves at the end of training, and when somebody asks for it to stop.

    It reads `metrics.csv`, so it needs a `ResumableCSVLogger` or a `CSVLogger` among the loggers.

    Args:
        file: Where to draw; a relative path starts in the run's folder. PNG.
    """

    def __init__(self, file: str = "curves.png") -> None:
        super().__init__()
        if Path(file).suffix != ".png":
            raise InputError(f"trainer.callbacks: LearningCurves.file must end with .png, but is {file!r}")
        self.file = file
        self._metrics: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the metrics file.

        Raises:
            InputError: There is no CSVLogger, or it renames the metrics.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or is_fast_dev_run(trainer):
            return
        loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        if not loggers:
            raise InputError(
                "trainer.logger: LearningCurves needs a ResumableCSVLogger, or Lightning's CSVLogger; add one, or "
                "remove LearningCurves from trainer.callbacks"
            )
        if loggers[0]._prefix:
            raise InputError(
                "trainer.logger: LearningCurves cannot read metrics with a prefix; remove it from CSVLogger"
            )
        self._metrics = Path(loggers[0].log_dir) / "metrics.csv"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is, if the training was asked to stop."""
        if isinstance(exception, (KeyboardInterrupt, StopAsked)) and trainer.state.fn == "fit":
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if self._metrics is None or not trainer.is_global_zero:
            return
        path = self.folder / self.file
        try:
            draw_curves(self._metrics, path)
        except InputError as error:  # A run that is done must not fail for want of a picture.
            say(f"No learning curves: {error}")
        else:
            self.written["learning curves"] = path
