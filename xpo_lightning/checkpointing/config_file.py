"""`ConfigFile`: the `config.yaml` of a run."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from xpo_lightning.checkpointing.io import is_remote
from xpo_lightning.core.atomic_files import replacing_file
from xpo_lightning.core.fault_tolerance.guard import Guard


class ConfigFile(SaveConfigCallback):
    """Writes the config as Lightning does, but completely or not at all; if writing fails, all ranks fail."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the config.

        Raises:
            InputError: The file system refuses the file.
        """
        folder = trainer.log_dir or trainer.default_root_dir  # `log_dir` is a collective.
        if is_remote(folder):
            super().setup(trainer, pl_module, stage)
        elif not self.already_saved:
            with Guard().together():
                if trainer.is_global_zero:
                    self._write(Path(folder))
            self.already_saved = True

    def _write(self, folder: Path) -> None:
        with replacing_file(folder / self.config_filename) as file:
            file.write(self.parser.dump(self.config, skip_none=False))
