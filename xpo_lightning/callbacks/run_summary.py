"""`RunSummary`: prints the run's setup at its start, and its files and results at its end."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from xpo_lightning.callbacks.base import FileWriter, counts_as_validation, is_fast_dev_run, print_lines
from xpo_lightning.core.atomic_files import replacing_file
from xpo_lightning.core.versions import surroundings, versions
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.reporting.run_description import opening_lines
from xpo_lightning.reporting.run_files import START

HELD_OUT = ("eval/win_rate", "eval/objective/kl")


class RunSummary(FileWriter):
    """Prints the setup of a training run before it starts, and its files and results after it.

    At the start: the models and how many of their weights are trained, the data, the length of the run, and the memory
    that a step is expected to take (see `xpo check`). The same goes into `start.json` in the run's folder, with
    versions and hardware. At the end: the files, and how the held-out win rate and KL changed between the first and the
    last validation, with their steps. After `xpo validate` it prints both, and the step of the checkpoint.

    Its place among the callbacks does not matter: it prints the end in `teardown`, which Lightning calls after every
    callback has seen the end of training. A run that fails or is interrupted prints no end; a resumed run compares with
    the first validation of the run that it continues.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[str, str] = {}
        self._last: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's folder (collective), and forget the validations of an earlier run."""
        super().setup(trainer, pl_module, stage)
        self._first, self._last = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the first and the last validation."""
        return {"first": self._first, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the first and the last validation."""
        self._first, self._last = state_dict["first"], state_dict["last"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the setup of the run, before anything is sampled, and write it to `start.json`."""
        if not trainer.is_global_zero or not isinstance(pl_module, XPOLightningModule):
            return
        lines = opening_lines(trainer, pl_module)
        print_lines(lines)
        if not is_fast_dev_run(trainer):
            facts = {"run": lines, "hardware": surroundings(), "versions": versions()}
            with replacing_file(self.folder / START) as file:
                json.dump(facts, file, indent=1, ensure_ascii=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the first and the last validation of the run."""
        if counts_as_validation(trainer):
            step = getattr(pl_module, "steps_taken", trainer.global_step)
            texts = {name: _with_error(trainer, name) for name in HELD_OUT}
            self._last = {name: f"{text} at step {step}" for name, text in texts.items() if text}
            self._first = self._first if trainer.state.fn == "fit" and self._first else self._last

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the files and results."""
        if stage not in ("fit", "validate") or not trainer.is_global_zero:
            return
        lines = {}
        if stage == "fit":
            lines["run folder"] = str(self.folder)
            lines |= {name: str(path) for name, path in self._files(trainer).items() if path.exists()}
        first, last = self._first, self._last
        lines |= {name: text if text == first[name] else f"{first[name]} -> {text}" for name, text in last.items()}
        print_lines(lines)

    def _files(self, trainer: Trainer) -> dict[str, Path]:
        files = {"config": self.folder / "config.yaml"}
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                files["metrics"] = Path(logger.log_dir) / "metrics.csv"
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FileWriter):
                files |= callback.written
            elif isinstance(callback, ModelCheckpoint):
                paths = {"best checkpoint": callback.best_model_path, "last checkpoint": callback.last_model_path}
                files |= {name: Path(path) for name, path in paths.items() if path}
        return files


def _with_error(trainer: Trainer, name: str) -> str:
    metrics = trainer.callback_metrics
    if name not in metrics:
        return ""
    error = metrics.get(f"{name}_stderr")
    return f"{float(metrics[name]):z.3f}" + ("" if error is None else f" ± {float(error):.3f}")
