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


SPEED = "throughput/tokens_per_second"
FADING = 0.9  # weight of all earlier steps in the speed, at each step


class XPOProgressBar(RichProgressBar):
    """A progress bar with the win rate, the score margin, the KL divergence, the loss and the last held-out win rate.

    After them come the completion tokens per second (`tok/s`, as `Throughput` counts them; without that callback, over
    about the last ten steps) and the time until the end of the run, validations included (`left`). Metrics that a
    module logs with `prog_bar=True` come last.

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
        return {**shown, **{name: value for name, value in others.items() if name not in SHORT_NAMES}}

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
