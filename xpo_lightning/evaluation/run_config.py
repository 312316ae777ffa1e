"""Reads the config that a run has saved, and overrides its sampling settings from the command line."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from xpo_lightning.core.argument_parser import OneLineErrors
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.importing import search_beside
from xpo_lightning.core.recipes import config_file
from xpo_lightning.data import PromptDataModule
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.rollout.sampling import Sampling

PARTS = {"model": XPOLightningModule, "data": PromptDataModule}


@dataclass(frozen=True)
class RunConfig:
    """The module and the data module that a config describes.

    Args:
        module: The module; nothing is loaded yet.
        data: The data module; nothing is read yet.
        mixed: Whether layers compute in bfloat16 on weights of another type (`trainer.precision: bf16-mixed`).
    """

    module: XPOLightningModule
    data: PromptDataModule
    mixed: bool = False


class _PartsParser(OneLineErrors, ArgumentParser):
    """Parses the groups `model` and `data` of a config."""


def read_run_config(*configs: str) -> RunConfig:
    """Build the module and the data module of a run.

    Args:
        configs: The `config.yaml` in the run's folder, the file that it was started with, or the name of a recipe; and
            further configs that are laid over it.

    Raises:
        InputError: The first is not a config of a run, or its module or data module cannot be built.
    """
    paths = [Path(config_file(config)) for config in configs]
    search_beside([str(path) for path in paths])
    parser = _PartsParser(prog="xpo", exit_on_error=True)
    for name, part in PARTS.items():
        parser.add_class_arguments(part, name, fail_untyped=False)
    parsed, precision = None, ""
    for path in paths:
        content = _read(path)
        if parsed is None:
            _check_whole(content, path)
        parts = {name: content[name] for name in PARTS if name in content}
        try:
            parsed = parser.parse_object(parts, parsed)
        except (TypeError, ValueError) as error:
            raise InputError(f"--config: '{path}' cannot be used: {error}") from error
        trainer = content.get("trainer")
        precision = str(trainer.get("precision", precision)) if isinstance(trainer, dict) else precision
    try:
        built = parser.instantiate(parsed)
    except (TypeError, ValueError) as error:
        raise InputError(f"--config: '{paths[-1]}' cannot be used: {error}") from error
    return RunConfig(built.model, built.data, mixed=precision in ("bf16", "bf16-mixed"))  # Lightning's two names


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config: '{path}' cannot be read ({' '.join(str(error).split()):.200})") from error
    return dict(content) if isinstance(content, dict) else {}


def _check_whole(content: dict[str, Any], path: Path) -> None:
    missing = [name for name in PARTS if not isinstance(content.get(name), dict)]
    if missing:
        raise InputError(
            f"--config: '{path}' has no group '{missing[0]}', so it is no config of a whole run; give the config.yaml "
            f"in the run's folder"
        )


class _SamplingParser(OneLineErrors, ArgumentParser):
    """Parses sampling settings."""


def override_sampling(sampling: Sampling, changes: dict[str, Any] | None) -> Sampling:
    """Return sampling settings with some of them changed.

    Args:
        sampling: The settings to start from.
        changes: Settings by name, as `--sampling.temperature 0.7` gives them.

    Raises:
        InputError: A value is out of range. A wrong name or type ends the program with one line instead.
    """
    if not changes:
        return sampling
    parser = _SamplingParser(prog="xpo")
    parser.add_class_arguments(Sampling, "sampling")
    parsed = parser.parse_object({"sampling": {**asdict(sampling), **changes}})
    try:
        built: Sampling = parser.instantiate(parsed).sampling
    except InputError as error:
        raise InputError(str(error).replace("model.sampling.", "--sampling.")) from error
    return built
