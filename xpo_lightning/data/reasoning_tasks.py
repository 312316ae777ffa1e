"""Reads rows of reasoning-gym's tasks, which it makes up when asked: `reasoning-gym:chain_sum?size=1000`."""

import json
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qsl

import yaml

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
    task, _, query = name.removeprefix(PREFIX).partition("?")
    tasks = import_module("reasoning_gym.factory").DATASETS
    if task not in tasks:
        similar = get_close_matches(task, tasks, n=1)
        hint = f"; did you mean '{similar[0]}'?" if similar else ""
        raise InputError(f"{key}: reasoning-gym has no task '{task}'{hint}")
    try:
        options = {option: yaml.safe_load(value) for option, value in parse_qsl(query, strict_parsing=bool(query))}
        entries = import_module("reasoning_gym").create_dataset(task, **{"seed": 0, **options})
        return [(f"{name}, row {number}", _row(entry)) for number, entry in enumerate(entries, start=1)]
    except Exception as error:  # The tasks check their options by assertions.
        raise InputError(f"{key}: the task '{name}' {describe_error(error)}") from error


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    metadata = json.loads(json.dumps(entry["metadata"], default=str))
    return {"prompt": entry["question"], "answer": entry["answer"], "metadata": metadata}
