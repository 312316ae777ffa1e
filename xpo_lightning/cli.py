"""The command line `xpo`: runs assembled from YAML by LightningCLI."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningCLI

import xpo_lightning.callbacks
import xpo_lightning.rewards
from xpo_lightning.callbacks.predictions import PredictionsWriter
from xpo_lightning.data import PromptDataModule
from xpo_lightning.errors import InputError
from xpo_lightning.module import XPOLightningModule

_TRAINER_KEYS_OF_THE_MODULE = {
    "gradient_clip_val": (None, "model.max_grad_norm"),
    "gradient_clip_algorithm": (None, "model.max_grad_norm (gradients are clipped by norm)"),
    "accumulate_grad_batches": (1, "data.batch_size (prompts an optimizer step) and model.micro_batch_size"),
}
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")


class XPOCLI(LightningCLI):
    """LightningCLI for `XPOLightningModule` and `PromptDataModule`."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            XPOLightningModule,
            PromptDataModule,
            args=args,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={
                "prog": "xpo",
                "description": "Exploratory Preference Optimization of language models",
                "version": f"xpo-lightning {xpo_lightning.__version__}",
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer fit, validate and predict; a test would be a second validation."""
        offered = LightningCLI.subcommands()
        return {name: offered[name] for name in ("fit", "validate", "predict")}

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that is not there, and trainer options whose work the module does itself."""
        config = self.config[self.subcommand]
        checkpoint = config.get("ckpt_path") or "last"
        is_file = checkpoint not in _CHECKPOINT_WORDS and "://" not in checkpoint
        if is_file and not Path(checkpoint).exists():
            raise InputError(f"ckpt_path: there is no checkpoint '{checkpoint}'")
        trainer = config.trainer
        if str(trainer.get("precision")) in ("16", "16-mixed"):  # On a CPU, Lightning would take bf16-mixed instead.
            raise InputError(f"trainer.precision={trainer.precision} is not supported; use 32-true or bf16-mixed")
        for key, (default, instead) in _TRAINER_KEYS_OF_THE_MODULE.items():
            if trainer.get(key) not in (None, default):
                raise InputError(f"trainer.{key} has no effect here; set {instead} instead")

    def before_predict(self) -> None:
        """Write predictions to a file, unless the config names a writer."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, PredictionsWriter) for callback in callbacks):
            callbacks.append(PredictionsWriter())


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Bad input ends with one line on standard error and exit status 2; set `XPO_DEBUG=1` to see the traceback.

    Args:
        args: Arguments in place of `sys.argv`, without the program's name.
    """
    # Lightning 2.6 warns of its own use of torch; nothing that a user could change.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    try:
        XPOCLI(args)
    except InputError as error:
        if os.environ.get("XPO_DEBUG"):
            raise
        sys.stderr.write(f"xpo: error: {error}\n")
        raise SystemExit(2) from None
