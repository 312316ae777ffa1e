"""Options that contradict each other are refused by name before anything is read."""

import sys
from dataclasses import replace

from xpo_lightning.data.reading import Source
from xpo_lightning.errors import InputError

DEFAULT_BUFFER = 1000


def check_at_least(least: int, **options: float | None) -> None:
    """Refuse numbers below `least`, or beyond what counts and seeds can be; None is an option that is not given."""
    for option, value in options.items():
        if value is not None and not value >= least:
            raise InputError(f"data.{option}: must be at least {least}, but is {value}")
        if value is not None and value > sys.maxsize:
            raise InputError(f"data.{option}: must be at most {sys.maxsize}, but is {value}")


def check_streaming(streaming: bool, shuffle: bool, buffer: int, validation_size: float) -> None:
    """Refuse what only streaming, or only reading everything beforehand, can do."""
    if streaming and validation_size:
        raise InputError(
            "data.validation_size: with data.streaming nobody knows how many rows there are to hold some out; "
            "give data.validation_source or data.validation_split instead"
        )
    if buffer != DEFAULT_BUFFER and not (streaming and shuffle):
        raise InputError("data.shuffle_buffer: has a meaning only with both data.streaming and data.shuffle; remove it")


def choose_validation_source(
    training: Source, name: str | None, split: str | None, size: int | float, limit: int | None
) -> Source | None:
    """Tell where the validation prompts are to be read.

    Args:
        training: Where the training prompts are.
        name: `data.validation_source`.
        split: `data.validation_split`.
        size: `data.validation_size`.
        limit: `data.max_validation_prompts`.

    Returns:
        The source; None where rows are held out of the training prompts, or where there is no validation.
    """
    given = {"data.validation_source": name, "data.validation_split": split}
    for key, value in given.items():
        if value is not None and size:
            raise InputError(f"{key} and data.validation_size: both say which prompts to validate on; remove one")
    if isinstance(size, float) and size >= 1:
        raise InputError(
            f"data.validation_size: a share must be below 1, but is {size}; write {size:.0f} for so many rows"
        )
    if name is not None:
        return Source(name, split or "train", key="data.validation_source", split_key="data.validation_split")
    if split is not None:
        return replace(training, split=split, split_key="data.validation_split")
    if limit is not None and not size:
        raise InputError(
            "data.max_validation_prompts: there are no validation prompts to limit; remove it, or give "
            "data.validation_source, data.validation_split or data.validation_size"
        )
    return None
