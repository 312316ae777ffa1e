"""The command line `xpo`: builds runs from YAML with LightningCLI."""

import os
import sys
import warnings
from enum import Enum
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO

import xpo_lightning.callbacks
import xpo_lightning.rewards
from xpo_lightning.callbacks import PredictionsWriter
from xpo_lightning.checkpointing import resume as resume_point
from xpo_lightning.checkpointing.config_file import ConfigFile
from xpo_lightning.checkpointing.io import CrashSafeCheckpointIO
from xpo_lightning.checkpointing.looking import write_beside_the_run
from xpo_lightning.checkpointing.refused_start import removing_refused_start
from xpo_lightning.checkpointing.resume import make_resumable
from xpo_lightning.cli import dispatch, mistakes
from xpo_lightning.cli.check.check import CheckingTrainer
from xpo_lightning.cli.error_messages import (
    explaining_trainer_errors,
    plain,
    reason,
    refuse_nulls,
)
from xpo_lightning.cli.known_options import of_parser
from xpo_lightning.cli.mistakes import NEGATIVE_NUMBER, with_place
from xpo_lightning.cli.quiet import silence_banners
from xpo_lightning.cli.run_defaults import TRAINER_DEFAULTS, RunDefaults
from xpo_lightning.core.argument_parser import OneLineErrors
from xpo_lightning.core.distributed import named, origin_of, speaks_for_host
from xpo_lightning.core.errors import InputError, exit_with_error, input_error_in, write_line
from xpo_lightning.core.explanations import explanation
from xpo_lightning.core.importing import KEY as IMPORT_FROM
from xpo_lightning.core.importing import folders_in_use, search_beside
from xpo_lightning.core.recipes import with_config_files
from xpo_lightning.data import PromptDataModule
from xpo_lightning.evaluation.saved_run import find_saved_run
from xpo_lightning.models.forward.cpu import limit_threads
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.rewards.no_reward import is_missing
from xpo_lightning.training.config_checks import refuse_inert_options, refuse_strategy

# A config can name only imported classes by their short names, so all public classes are imported here.
for _name in xpo_lightning.__all__:
    getattr(xpo_lightning, _name)
# Configs are written with the defaults of all classes, and that of Lightning's Timer is a member of an enumeration.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))

WHERE_TO_LOOK = (
    "The options that matter most are model.*, data.* and a few of trainer.*. `xpo recipes` lists configs to start "
    "from, `--config quickstart --print_config` shows one with every value, `--model.reward.help CLASS` the options of "
    "a class, and docs/configuration.md has a tested config for each way to train. `xpo validate RUN_FOLDER` and `xpo "
    "predict RUN_FOLDER` need no config."
)


LOOKING = ("validate", "predict")
"""Verbs that look at a run without changing it; they also take the run's folder in place of a config."""


class XPOParser(OneLineErrors, LightningArgumentParser):
    """Parses the options of a run; accepts recipes by name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--help_all", action="help", help="show every option and exit")
        self._negative_number_matcher = NEGATIVE_NUMBER  # argparse would take -1e-5 for an option.

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """Replace the names of recipes by their files, let classes and functions beside them be found, then parse."""
        given = list(sys.argv[1:] if args is None else args)
        if any(word.partition("=")[0] == f"--{IMPORT_FROM}" for word in given):
            raise InputError(f"--{IMPORT_FROM} is a key of config files; on the command line, set PYTHONPATH instead")
        words, files = with_config_files(given)
        search_beside(files)
        return super().parse_args(words, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say in plain words what the parser says of types and classes."""
        super().error(with_place(plain(message)), ex)


class XPOCLI(LightningCLI):
    """LightningCLI for `XPOLightningModule` and `PromptDataModule`."""

    def __init__(self, args: ArgsType = None) -> None:
        words = sys.argv[1:] if args is None else args
        self._verb = words[0] if isinstance(words, list) and words and words[0] in dispatch.RUNS else None
        super().__init__(
            XPOLightningModule,
            PromptDataModule,
            trainer_class=CheckingTrainer,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            args=args,
            auto_configure_optimizers=False,
            save_config_callback=ConfigFile,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            # It would write and read the whole config to hand it to `save_hyperparameters`; `ConfigFile` calls that.
            load_from_checkpoint_support=False,
            parser_class=XPOParser,
            parser_kwargs={
                "prog": "xpo",
                "description": "Exploratory Preference Optimization of language models",
                "version": f"xpo-lightning {xpo_lightning.__version__}",
                **{name: {"epilog": WHERE_TO_LOOK} for name in self.subcommands()},
            },
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Offer fit, validate, predict and check; a test would be a second validation.

        Where the command line begins with one of them, offer that one alone: building a parser takes half a second.
        """
        offered = {**LightningCLI.subcommands(), "check": {"model", "datamodule"}}
        return {name: offered[name] for name in dispatch.RUNS if self._verb in (name, None)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the switches of what a run has by default, and the folders to import from."""
        parser.add_class_arguments(RunDefaults, "defaults", fail_untyped=True)
        parser.add_argument(
            f"--{IMPORT_FROM}",
            type=list[str] | None,
            default=None,
            help="Further folders to import classes and functions from, besides those of the config files and the "
            "current one; for config files. A saved config lists those of its run.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line and the configs that it names."""
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list) and words and words[0] in dispatch.RUNS:
            try:
                mistakes.check(with_config_files(words)[0], of_parser(self._parser(words[0])))
            except InputError as error:
                parser.error(str(error))
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Refuse options that have no effect or no meaning here, and a checkpoint that does not load."""
        config = self.config[self.subcommand]
        refuse_nulls(self._parser(self.subcommand), config)
        if self.subcommand == "check":
            self.save_config_callback = None  # It writes a file.
            if config.ckpt_path is not None:
                raise InputError("ckpt_path: `xpo check` looks at a run as it starts from its beginning; leave it out")
        resume_point.check_request(str(self.subcommand), config.ckpt_path, config.weights_only)
        trainer = config.trainer
        strategy = trainer.get("strategy")
        if isinstance(strategy, str) and strategy.lower() == "fsdp2strategy":  # jsonargparse takes it for a plain text.
            strategy = Namespace(class_path="xpo_lightning.FSDP2Strategy", init_args={})  # type: ignore[no-untyped-call]
            trainer.strategy = strategy
        refuse_strategy(str(getattr(strategy, "class_path", strategy)))
        if str(trainer.get("precision")) in ("16", "16-mixed"):  # On a CPU, Lightning would take bf16-mixed instead.
            raise InputError(f"trainer.precision={trainer.precision} is not supported; use 32-true or bf16-mixed")
        refuse_inert_options(trainer)

    def instantiate_classes(self) -> None:
        """Build everything; an error names in one line what cannot be built."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:  # For example, a number in place of a group of options.
            raise (input_error_in(error) or InputError(f"the config cannot be used: {reason(error)}")) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; errors of Lightning about its options name `trainer`."""
        with explaining_trainer_errors(ValueError, TypeError, OSError):
            trainer = super().instantiate_trainer(plugins=self._plugins(), **kwargs)
        make_resumable(trainer)
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        """Add the callbacks and the metrics file that a run has by default."""
        defaults: RunDefaults = self.config_init[self.subcommand].defaults
        self.config[self.subcommand][IMPORT_FROM] = folders_in_use() or None  # For the saved config.
        if config["barebones"]:  # It logs nothing, and refuses an interval.
            config["log_every_n_steps"] = None
        config["logger"] = defaults.loggers(config)
        has_reward = not is_missing(self.model.reward)
        added = defaults.callbacks(config, self.datamodule.has_validation, has_reward)
        return super()._instantiate_trainer(config, [*callbacks, *added])

    def after_instantiate_classes(self) -> None:
        """Replace `last` by the newest checkpoint; this needs the trainer, which knows where to look."""
        config = self.config_init[self.subcommand]
        config.ckpt_path = resume_point.resolve(str(self.subcommand), config.ckpt_path, self.trainer)
        if self.subcommand in LOOKING:
            write_beside_the_run(self.trainer, self.subcommand, config.ckpt_path)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; a start that is refused leaves no folder."""
        with removing_refused_start(self.trainer):
            super()._run_subcommand(subcommand)

    def before_validate(self) -> None:
        """Refuse to validate without validation prompts."""
        self.datamodule.require_validation()

    def before_predict(self) -> None:
        """Write predictions to a file, unless the config names a writer, and do not keep them in memory as well."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, PredictionsWriter) for callback in callbacks):
            callbacks.append(PredictionsWriter())
        if self.config_init.predict.return_predictions is None:
            self.config_init.predict.return_predictions = False

    def _plugins(self) -> list[Any]:
        """Add crash-safe checkpoints to the trainer's plugins, unless the config has its own checkpoint plugin."""
        config = self.config_init[self.subcommand].trainer
        plugins: list[Any] = config.plugins if isinstance(config.plugins, list) else [config.plugins]
        plugins = [plugin for plugin in plugins if plugin is not None]
        has_own = getattr(config.strategy, "_checkpoint_io", None) or any(isinstance(p, CheckpointIO) for p in plugins)
        return plugins if has_own else [*plugins, CrashSafeCheckpointIO()]

    def _parse_ckpt_path(self) -> None:
        """Read no settings from a checkpoint: those of a run come from its config and command line."""


def _with_run(words: list[str]) -> list[str]:
    """Replace a run's folder after the verb by the run's config and its newest checkpoint, for later options to change.

    Args:
        words: The command line.
    """
    if len(words) < 2 or words[1].startswith("-"):
        return words
    run = find_saved_run(words[1])
    return [words[0], "--config", str(run.config), "--ckpt_path", str(run.checkpoint), *words[2:]]


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Bad input ends with one line on standard error and exit status 2; set `XPO_DEBUG=1` to see the traceback.

    Args:
        args: Arguments in place of `sys.argv`, without the program's name.
    """
    # Lightning 2.6 warns about its own use of torch, which a user cannot change.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # `xpo validate` hands the words on after it has looked at them, and writes into a folder of its own.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    silence_banners()
    limit_threads()
    try:
        with explaining_trainer_errors():
            words = sys.argv[1:] if args is None else args
            if not isinstance(words, list):
                XPOCLI(args)
            elif not dispatch.is_answered(words):
                if words[0] in dispatch.VERBS:
                    dispatch.run(words[0], words[1:])
                else:
                    XPOCLI(_with_run(words) if words[0] in LOOKING else args)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning would end with 1.
            raise SystemExit(130) from end
        raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        message, origin = explanation(error), origin_of(error)
        if origin is not None and not origin.is_here:  # The process with the error prints it.
            if speaks_for_host(origin.host):
                write_line(str(error))
            raise SystemExit(1 if message is None else 2) from None
        if message is None or os.environ.get("XPO_DEBUG"):
            raise
        exit_with_error(named(with_place(message)))
