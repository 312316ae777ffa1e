"""Defines the six panels of the learning curves, and their metrics."""

from dataclasses import dataclass

from xpo_lightning.reporting.metrics_file import Metrics


@dataclass(frozen=True)
class Panel:
    """One small plot.

    Args:
        title: What is plotted, with its unit.
        lines: Name in the legend of each training metric; its counterpart under `eval/` is drawn with it.
        level: Value of a dashed line that marks no difference; None for no such line.
        share: True for shares, whose axis runs from 0 to 1.
    """

    title: str
    lines: dict[str, str]
    level: float | None = None
    share: bool = False

    def logged(self, metrics: Metrics) -> set[str]:
        """Return the panel's metrics that a run has logged, in training or in validation."""
        return {line for line in self.lines if line in metrics or f"eval/{line}" in metrics}


PANELS = (
    Panel("Win rate against the reference", {"win_rate": ""}, level=0.5, share=True),
    Panel("KL from the reference (nats)", {"objective/kl": ""}, level=0),
    Panel("Preference loss", {"loss/dpo": ""}),
    Panel("Score margin, policy − reference", {"objective/scores_margin": ""}, level=0),
    Panel(
        "Completion length (tokens)",
        {"completions/model_length": "policy", "completions/ref_length": "reference"},
    ),
    Panel(
        "Completions that ended by themselves",
        {"val/model_contain_eos_token": "policy", "val/ref_contain_eos_token": "reference"},
        share=True,
    ),
)
