"""What every run has unless it is switched off: the callbacks and the metrics file of a config that names none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger

from xpo_lightning.callbacks import (
    Baseline,
    CompletionsTable,
    GracefulStop,
    LearningCurves,
    PolicyExport,
    PolicyWatch,
    RunCheckpoint,
    RunContinuation,
    RunReport,
    RunSummary,
    XPOProgressBar,
)
from xpo_lightning.checkpointing.csv_logger import ResumableCSVLogger

TRAINER_DEFAULTS = {"default_root_dir": "runs", "log_every_n_steps": 1, "enable_model_summary": False}
"""Options of the trainer that have another default than Lightning's; `RunSummary` says what its table says."""
WIN_RATE, ACCURACY = "eval/win_rate", "eval/rewards/accuracies"


@dataclass(frozen=True)
class RunDefaults:
    """Switches off what a run has by default.

    A callback of the same kind in `trainer.callbacks` takes the place of the default one; others are added to the
    defaults. An empty list there leaves all of these callbacks out. The progress bar and the checkpoints have
    Lightning's switches, `trainer.enable_progress_bar` and `trainer.enable_checkpointing`.

    Args:
        baseline: Validate the untrained policy before the first step and log that as step 0 (`Baseline`), if there are
            validation prompts and `trainer.num_sanity_val_steps` is null or -1.
        completions_table: Show completions after each validation, and append them to `completions.jsonl`
            (`CompletionsTable`).
        policy_export: Save the trained policy for transformers (`PolicyExport`).
        policy_watch: Warn when KL, completion length or repetition leave a sane range (`PolicyWatch`).
        learning_curves: Draw the learning curves (`LearningCurves`).
        run_report: Write the HTML page about the run (`RunReport`).
        run_summary: Print the setup and the results, and write `start.json` (`RunSummary`).
        metrics_file: Write `metrics.csv`, before any other logger in `trainer.logger` (`ResumableCSVLogger`);
            `trainer.logger: false` leaves out all loggers.
    """

    baseline: bool = True
    completions_table: bool = True
    policy_export: bool = True
    policy_watch: bool = True
    learning_curves: bool = True
    run_report: bool = True
    run_summary: bool = True
    metrics_file: bool = True

    def loggers(self, trainer: dict[str, Any]) -> list[Logger] | bool | None:
        """Return the loggers of a run: the given ones, after a metrics file in the trainer's root folder.

        Args:
            trainer: The options of the trainer.

        Returns:
            A value of `trainer.logger`.
        """
        own = trainer.get("logger")
        if own is False or trainer.get("barebones"):
            return own
        listed = [] if own in (None, True) else own if isinstance(own, list) else [own]
        if self.metrics_file and not any(isinstance(one, CSVLogger) for one in listed):
            root = trainer.get("default_root_dir") or Path.cwd()
            listed = [ResumableCSVLogger(root, name=""), *listed]
        return listed or False

    def callbacks(self, trainer: dict[str, Any], validates: bool, has_reward: bool = True) -> list[Callback]:
        """Return the default callbacks of a run that its config does not name itself.

        Args:
            trainer: The options of the trainer; its loggers are those of `loggers`.
            validates: Whether there are validation prompts.
            has_reward: Whether a validation samples and scores completions, and so has a win rate.
        """
        own = _listed(trainer.get("callbacks"))
        barebones = bool(trainer.get("barebones"))
        checkpoints = trainer.get("enable_checkpointing") is not False and not barebones
        added: list[Callback] = [RunContinuation(), GracefulStop()]
        if trainer.get("callbacks") == [] or barebones:
            added += [RunCheckpoint()] if checkpoints else []
        else:
            monitor = (WIN_RATE if has_reward else ACCURACY) if validates else None
            added = [*self._shown(trainer, monitor, checkpoints), *added]
        return [one for one in added if not any(isinstance(other, _kind(one)) for other in own)]

    def _shown(self, trainer: dict[str, Any], monitor: str | None, checkpoints: bool) -> list[Callback]:
        validates = monitor is not None and trainer.get("limit_val_batches") != 0
        before = validates and trainer.get("num_sanity_val_steps") in (None, -1)
        logger = trainer.get("logger")
        has_metrics = isinstance(logger, list) and any(isinstance(one, CSVLogger) for one in logger)
        watched: dict[str, Any] = {"monitor": monitor, "mode": "max"} if validates else {}
        chosen: list[Callback | None] = [
            XPOProgressBar() if trainer.get("enable_progress_bar") is not False else None,
            Baseline() if self.baseline and before else None,
            CompletionsTable() if self.completions_table else None,
            RunCheckpoint(filename="{step}", save_last=True, **watched) if checkpoints else None,
            PolicyExport() if self.policy_export else None,
            PolicyWatch() if self.policy_watch else None,
            LearningCurves() if self.learning_curves and has_metrics else None,
            RunReport() if self.run_report and has_metrics else None,
            RunSummary() if self.run_summary else None,
        ]
        return [one for one in chosen if one is not None]


def _listed(callbacks: Any) -> list[Callback]:
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


def _kind(callback: Callback) -> type[Callback]:
    """Return the class whose instances take the place of a default callback."""
    return next((kind for kind in (Checkpoint, ProgressBar) if isinstance(callback, kind)), type(callback))
