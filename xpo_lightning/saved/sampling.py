"""A few sampling settings of a verb's command line, over those of a run."""

from dataclasses import asdict
from typing import Any

from jsonargparse import ArgumentParser

from xpo_lightning.parsing import OneLineErrors
from xpo_lightning.rollout.sampling import Sampling


class _SamplingParser(OneLineErrors, ArgumentParser):
    """The parser of sampling settings."""


def changed(sampling: Sampling, changes: dict[str, Any] | None) -> Sampling:
    """Change some settings.

    Args:
        sampling: The settings to begin with.
        changes: Settings by name, as `--sampling.temperature 0.7` gives them.

    Raises:
        InputError: A value is out of range. A name or type that is wrong ends the program with one line.
    """
    if not changes:
        return sampling
    parser = _SamplingParser(prog="xpo")
    parser.add_class_arguments(Sampling, "sampling")
    parsed = parser.parse_object({"sampling": {**asdict(sampling), **changes}})
    built: Sampling = parser.instantiate(parsed).sampling
    return built
