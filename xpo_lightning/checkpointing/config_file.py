"""`ConfigFile`: the config of a run, also as its hyper-parameters, and what a resumed run changed in it."""

import sys
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from xpo_lightning.checkpointing.io import is_remote
from xpo_lightning.core.atomic_files import replacing_file
from xpo_lightning.core.fault_tolerance.guard import Guard
from xpo_lightning.core.run_events import EVENTS, record_event

LISTED = 6
"""Most changed settings that are printed; the events have all of them."""
_OF_THE_COMMAND = ("ckpt_path", "weights_only")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast


class ConfigFile(SaveConfigCallback):
    """Writes the config as Lightning does, but completely or not at all; if writing fails, all ranks fail.

    The settings are also the hyper-parameters of the run, one for each key (`model.alpha`), which Lightning sends to
    every logger and keeps in checkpoints. A run that is resumed with other settings prints them in one line, and
    records them in `events.jsonl`; the config before the change stays as `config.1.yaml`, the next one as
    `config.2.yaml`.
    """

    _changes: dict[str, list[Any]]
    _step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the settings to Lightning; write the config now, or in training once a checkpoint has been accepted.

        Raises:
            InputError: The file system refuses the file.
        """
        self._text = self.parser.dump(self.config, skip_validation=True, skip_unset=False)
        settings = flatten(yaml.load(self._text, Loader=_LOADER))  # noqa: S506 (either loader is a safe one)
        self._settings = {name: value for name, value in settings.items() if name not in _OF_THE_COMMAND}
        self._changes = {}
        if trainer.state.fn == TrainerFn.FITTING:
            pl_module.save_hyperparameters(self._settings)
        else:
            self._save(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the settings with those that the checkpoint was written with."""
        before = checkpoint.get(pl_module.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if trainer.state.fn != TrainerFn.FITTING or not before:
            return
        self._step = checkpoint["global_step"]
        for name in sorted({*before, *self._settings}):
            old, new = before.get(name), self._settings.get(name)
            if old != new:
                self._changes[name] = [old, new]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the config; every checkpoint has been read by now."""
        self._save(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the config, if there was no sanity check."""
        self._save(trainer, pl_module, "fit")

    def _save(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # `log_dir` is a collective.
        if is_remote(folder):
            super().setup(trainer, pl_module, stage)
        elif not self.already_saved:
            with Guard().together():
                if trainer.is_global_zero:
                    self._write(Path(folder))
            self.already_saved = True

    def _write(self, folder: Path) -> None:
        if self._changes:
            former = self._keep_former(folder)
            sys.stderr.write(f"xpo: {describe(self._changes, LISTED)}\n")
            text = describe(self._changes, len(self._changes))
            record_event(folder, self._step, text, changed=self._changes, former_config=former)
        with replacing_file(folder / self.config_filename) as file:
            file.write(self._text)

    def _keep_former(self, folder: Path) -> str | None:
        """Copy the config of the run so far to the next free number; return the copy's name, None if there is none."""
        file = folder / self.config_filename
        if not file.exists():
            return None
        number = 1
        while (copy := file.with_suffix(f".{number}.yaml")).exists():
            number += 1
        with replacing_file(copy) as former:
            former.write(file.read_text(encoding="utf-8"))
        return copy.name


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Turn nested mappings and lists of mappings into one mapping: `{"a": [{"b": 1}]}` becomes `{"a.0.b": 1}`."""
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= flatten(entry, f"{name}.{key}" if name else str(key))
    return flat


def describe(changes: dict[str, list[Any]], most: int) -> str:
    """Describe changed settings in one line, and the first `most` of them in full."""
    listed = [f"{name} {old} -> {new}" for name, (old, new) in list(changes.items())[:most]]
    more = f" and {len(changes) - most} more, see {EVENTS}" if len(changes) > most else ""
    return f"Resumed with other settings: {', '.join(listed)}{more}"
