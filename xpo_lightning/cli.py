"""The command line `xpo`: runs assembled from YAML by LightningCLI."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import xpo_lightning.callbacks
import xpo_lightning.rewards
from xpo_lightning.callbacks.predictions import PredictionsWriter
from xpo_lightning.cpu import limit_threads
from xpo_lightning.data import PromptDataModule
from xpo_lightning.errors import InputError
from xpo_lightning.module import XPOLightningModule

_TRAINER_KEYS_OF_THE_MODULE = {
    "gradient_clip_val": (None, "model.max_grad_norm"),
    "gradient_clip_algorithm": (None, "model.max_grad_norm (gradients are clipped by norm)"),
    "accumulate_grad_batches": (1, "data.batch_size (prompts an optimizer step) and model.micro_batch_size"),
}
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")


class XPOParser(LightningArgumentParser):
    """Says what is wrong with arguments in one line, without a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program; of an error that began with bad input, only that is shown."""
        cause = _input_error_in(ex)
        if cause is None and os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        _stop(str(cause or message))


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
            parser_class=XPOParser,
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
        """Refuse a checkpoint that does not load, and trainer options whose work the module does itself."""
        config = self.config[self.subcommand]
        _check_checkpoint(config.get("ckpt_path"))
        trainer = config.trainer
        if str(trainer.get("precision")) in ("16", "16-mixed"):  # On a CPU, Lightning would take bf16-mixed instead.
            raise InputError(f"trainer.precision={trainer.precision} is not supported; use 32-true or bf16-mixed")
        for key, (default, instead) in _TRAINER_KEYS_OF_THE_MODULE.items():
            if trainer.get(key) not in (None, default):
                raise InputError(f"trainer.{key} has no effect here; set {instead} instead")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, and name it where Lightning refuses its options."""
        with _explaining_trainer_errors(ValueError, TypeError, OSError):
            return super().instantiate_trainer(**kwargs)

    def before_validate(self) -> None:
        """Refuse to validate on nothing."""
        if not self.datamodule.has_validation:
            raise InputError(
                "there are no validation prompts: set data.validation_source, data.validation_split or "
                "data.validation_size"
            )

    def before_predict(self) -> None:
        """Write predictions to a file, unless the config names a writer, and do not keep them in memory as well."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, PredictionsWriter) for callback in callbacks):
            callbacks.append(PredictionsWriter())
        if self.config_init.predict.return_predictions is None:
            self.config_init.predict.return_predictions = False

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint: the settings of a run are those of its config and command line."""


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Bad input ends with one line on standard error and exit status 2; set `XPO_DEBUG=1` to see the traceback.

    Args:
        args: Arguments in place of `sys.argv`, without the program's name.
    """
    # Lightning 2.6 warns of its own use of torch; nothing that a user could change.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    limit_threads()
    try:
        with _explaining_trainer_errors():
            XPOCLI(args)
    except Exception as error:
        cause = _input_error_in(error)
        if cause is None or os.environ.get("XPO_DEBUG"):
            raise
        _stop(str(cause))


@contextmanager
def _explaining_trainer_errors(*kinds: type[Exception]) -> Iterator[None]:
    handled: tuple[type[Exception], ...] = (MisconfigurationException, *kinds)
    try:
        yield
    except handled as error:
        raise (_input_error_in(error) or InputError(f"trainer: {error}")) from error


def _check_checkpoint(checkpoint: str | None) -> None:
    if checkpoint is None or checkpoint in _CHECKPOINT_WORDS or "://" in checkpoint:
        return
    if not Path(checkpoint).is_file():
        raise InputError(f"ckpt_path: there is no checkpoint '{checkpoint}'")
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"ckpt_path: '{checkpoint}' is no checkpoint, or a damaged one ({reason:.160})") from error


def _input_error_in(error: BaseException | None) -> InputError | None:
    """Find the bad input that an error began with."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _stop(message: str) -> NoReturn:
    sys.stderr.write(f"xpo: error: {' '.join(message.split())}\n")
    raise SystemExit(2) from None
