"""Reads rows of reasoning-gym's tasks, which it makes up when asked: `reasoning-gym:chain_sum?size=1000`."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qsl

import yaml
from lightning.pytorch.utilities import rank_zero_warn

from xpo_lightning.core.errors import InputError, describe_error
from xpo_lightning.data.readers import LocatedRow

PREFIX = "reasoning-gym:"


def read_task(name: str, key: str) -> list[LocatedRow]:
    """Make up the rows of a task: `prompt`, `answer` and `metadata`, which `VerifierReward` needs to verify an answer.

    Args:
        name: `reasoning-gym:TASK`, and after a question mark the task's options, with an ampersand between two, as
            `reasoning-gym:chain_sum?size=1000&seed=1&max_terms=2`. The same options give the same rows.
        key: The configuration key that holds the name, for errors.

    Raises:
        InputError: reasoning-gym is not installed, or has no such task or option.
    """
    if find_spec("reasoning_gym") is None:
        raise InputError(f"{key}={name} needs the package reasoning-gym; run: pip install reasoning-gym")
    task = name.removeprefix(PREFIX).partition("?")[0]
    tasks = import_module("reasoning_gym.factory").DATASETS
    if task not in tasks:
        similar = get_close_matches(task, tasks, n=1)
        hint = f"; did you mean '{similar[0]}'?" if similar else ""
        raise InputError(f"{key}: reasoning-gym has no task '{task}'{hint}")
    try:
        entries = import_module("reasoning_gym").create_dataset(task, **_options_of(name))
        return [(f"{name}, row {number}", _row(entry)) for number, entry in enumerate(entries, start=1)]
    except Exception as error:  # The tasks check their options by assertions.
        raise InputError(f"{key}: the task '{name}' {describe_error(error)}") from error


def warn_of_shared_rows(
    source: str, rows: Sequence[LocatedRow], validation_source: str, validation_rows: Sequence[LocatedRow]
) -> None:
    """Warn if problems that are held out are trained on as well: row i of a task is made from its seed + i.

    Args:
        source: The task to train on.
        rows: Its rows.
        validation_source: The task that is held out.
        validation_rows: Its rows.
    """
    options, others = _options_of(source), _options_of(validation_source)
    seed, other_seed = options.pop("seed"), others.pop("seed")
    begin = max(seed, other_seed)
    shared = min(seed + len(rows), other_seed + len(validation_rows)) - begin
    names = [name.partition("?")[0] for name in (source, validation_source)]
    if names[0] != names[1] or {**options, "size": 0} != {**others, "size": 0} or shared <= 0:
        return
    if (
        rows[begin - seed][1]["prompt"] == validation_rows[begin - other_seed][1]["prompt"]
    ):  # A few tasks use their seed in another way.
        rank_zero_warn(
            f"data.validation_source={validation_source} shares {shared} of its {len(validation_rows)} problems with "
            f"data.source={source}, so that the run trains on them: row i of a task is made from its seed + i; give "
            f"one of the two a seed that is further from the other's than both sizes"
        )


def _options_of(name: str) -> dict[str, Any]:
    """Return the options in the name of a task, and its seed, 0 if there is none among them."""
    query = name.partition("?")[2]
    options = {option: yaml.safe_load(value) for option, value in parse_qsl(query, strict_parsing=bool(query))}
    return {"seed": 0, **options}


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    metadata = json.loads(json.dumps(entry["metadata"], default=str))
    return {"prompt": entry["question"], "answer": entry["answer"], "metadata": metadata}
