"""`XPOProgressBar`: the four numbers to watch, under short names."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

SHORT_NAMES = {
    "win_rate": "win",
    "objective/scores_margin": "margin",
    "objective/kl": "kl",
    "loss/total": "loss",
    "eval/win_rate": "eval win",
}


class XPOProgressBar(RichProgressBar):
    """A progress bar with the win rate, the score margin, the KL divergence, the loss and the last held-out win rate.

    What a module logs with `prog_bar=True` is shown after them.

    Args:
        refresh_rate: Updates a second; 0 shows no bar.
        leave: Leave the bar of each finished epoch in the terminal.
        theme: Colours and number format; Lightning's own where null.
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

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what the bar shows, by short name."""
        metrics = trainer.callback_metrics
        shown = {short: float(metrics[name]) for name, short in SHORT_NAMES.items() if name in metrics}
        others = super().get_metrics(trainer, pl_module)
        others.pop("v_num", None)
        return {**shown, **{name: value for name, value in others.items() if name not in SHORT_NAMES}}
