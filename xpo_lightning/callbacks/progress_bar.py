"""`XPOProgressBar`: a progress bar with the metrics to watch, under short names."""

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from xpo_lightning.module import XPOLightningModule
from xpo_lightning.training.optimizer import total_steps

SHORT_NAMES = {
    "win_rate": "win",
    "objective/scores_margin": "margin",
    "objective/kl": "kl",
    "loss/total": "loss",
    "eval/win_rate": "eval win",
}


FIRST = ("win", "kl", "left", "eval win", "loss", "tok/s", "margin")
"""Which metrics to show where there is no room for all."""
NARROW = 120  # columns of a terminal; below, the metrics need the room of the bar itself
SPEED = "throughput/tokens_per_second"
FADING = 0.9  # weight of all earlier steps in the speed, at each step


class XPOProgressBar(RichProgressBar):
    """A progress bar with the win rate, the score margin, the KL divergence, the loss and the last held-out win rate.

    After them come the completion tokens per second (`tok/s`, as `Throughput` counts them; without that callback, over
    about the last ten steps) and the time until the end of the run, validations included (`left`). Metrics that a
    module logs with `prog_bar=True` come last.

    In a terminal of less than 120 columns the line is shortened to the numbers that fit, without the bar itself.

    Args:
        refresh_rate: Updates per second; 0 shows no bar.
        leave: Leave the bar of each finished epoch in the terminal.
        theme: Colours and number format; null is Lightning's own.
        console_kwargs: Arguments of the rich console.
    """

    def __init__(
        self,
        refresh_rate: int = 100,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(refresh_rate, leave, theme or RichProgressBarTheme(), console_kwargs)
        self._begun, self._first_step = 0.0, 0
        self._batch_begun, self._tokens_before = 0.0, 0
        self._seconds = self._tokens = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._begun, self._first_step = time.monotonic(), trainer.global_step
        self._seconds = self._tokens = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the time and the token count before the step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._batch_begun, self._tokens_before = time.monotonic(), _tokens(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step's tokens and time to the speed, unless `Throughput`, which shows its own, reset the count."""
        written = _tokens(pl_module) - self._tokens_before
        if written > 0:
            self._tokens = FADING * self._tokens + written * trainer.world_size
            self._seconds = FADING * self._seconds + time.monotonic() - self._batch_begun
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics of the bar by short name."""
        metrics = trainer.callback_metrics
        shown: dict[str, Any] = {short: float(metrics[name]) for name, short in SHORT_NAMES.items() if name in metrics}
        shown |= self._speed(trainer, pl_module)
        others = super().get_metrics(trainer, pl_module)
        others.pop("v_num", None)
        shown |= {name: value for name, value in others.items() if name not in SHORT_NAMES}
        return self._fitting(shown, trainer)

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Leave only the epoch and the batch before the metrics in a narrow terminal."""
        description, _, batches, *_ = columns = super().configure_columns(trainer)
        return [description, batches] if self._width < NARROW else columns

    @property
    def _width(self) -> int:
        return NARROW if self._console is None else self._console.width

    def _fitting(self, shown: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
        """Keep the metrics that fit beside the epoch and the batch, the most important first."""
        if self._width >= NARROW:
            return shown
        room = self._width - len(self.validation_description) - 2 * len(str(trainer.num_training_batches)) - 4
        kept = []
        for name in sorted(shown, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
            value = shown[name] if isinstance(shown[name], str) else f"{shown[name]:{self.theme.metrics_format}}"
            room -= len(f"{name}: {value}{self.theme.metrics_text_delimiter}")
            if room < 0:
                break
            kept.append(name)
        return {name: value for name, value in shown.items() if name in kept}

    def _speed(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        if not isinstance(pl_module, XPOLightningModule) or not self._begun:
            return {}
        shown = {}
        if SPEED in trainer.callback_metrics:
            shown["tok/s"] = f"{float(trainer.callback_metrics[SPEED]):,.0f}"
        elif self._seconds:
            shown["tok/s"] = f"{self._tokens / self._seconds:,.0f}"
        total, done = total_steps(trainer, pl_module.plan.step_count), trainer.global_step - self._first_step
        if total is not None and done > 0:
            left = (time.monotonic() - self._begun) / done * max(0, total - trainer.global_step)
            shown["left"] = str(timedelta(seconds=round(left)))
        return shown

    def _get_train_description(self, current_epoch: int) -> str:
        """Leave out the number of epochs if it is unlimited; Lightning would write `0/-2`."""
        if self.trainer.max_epochs == -1:
            return f"{f'Epoch {current_epoch}':{len(self.validation_description)}}"
        return super()._get_train_description(current_epoch)


def _tokens(pl_module: LightningModule) -> int:
    return pl_module.timer.counts["completion_tokens"] if isinstance(pl_module, XPOLightningModule) else 0
