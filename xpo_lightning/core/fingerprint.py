"""Describes what a result depends on as plain values, which can be saved and compared."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from torch import Tensor, nn


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash the names, shapes and first values of weights.

    Training changes a model's fingerprint; it is no protection against forgery.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda named: named[0]):
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def import_path(thing: Any) -> str:
    """Return the import path of a function or a class, or of the class of a callable object."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


_RECORDED = {
    "xpo_lightning.rewards.human_judge.HumanJudge": "xpo_lightning.rewards.human.HumanJudge",
    "xpo_lightning.rewards.python.PythonJudge": "xpo_lightning.rewards.python_judge.PythonJudge",
    "xpo_lightning.rewards.python.PythonReward": "xpo_lightning.rewards.function.PythonReward",
    "xpo_lightning.rewards.sequence_classifier.reward.SequenceClassifierReward": (
        "xpo_lightning.rewards.classifier.SequenceClassifierReward"
    ),
    "xpo_lightning.rewards.weighted_sum.WeightedSum": "xpo_lightning.rewards.weighted.WeightedSum",
    "xpo_lightning.training.optimizer.WarmupThenDecay": "xpo_lightning.optimization.WarmupThenDecay",
}
"""Classes that have moved, and their old import paths, which reference caches and checkpoints record."""


def recorded_path(thing: Any) -> str:
    """Return the import path of a class to record in files, which stays the same when our own classes move."""
    path = import_path(thing)
    return _RECORDED.get(path, path)


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return the public attributes of a module that JSON can hold; paths as text, dataclasses as mappings."""
    settings = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        try:
            settings[name] = json.loads(json.dumps(value, default=_setting))
        except (TypeError, ValueError):
            continue
    return settings


def as_json(value: Any) -> str:
    """Serialise a value as JSON with sorted keys; tensors as lists, other unsupported values as their `repr`."""
    return json.dumps(value, default=_readable, sort_keys=True)


def differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """Return the fields in which two values differ.

    Args:
        saved: The saved value, read back from JSON.
        current: The current value, also read back from JSON.
        name: Name of the value.

    Returns:
        A text for each field, such as `model.sampling.temperature (1.0 there, 0.5 now)`.
    """
    if isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        saved, current = dict(enumerate(saved)), dict(enumerate(current))
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        return [] if saved == current else [f"{name} ({saved!r:.60} there, {current!r:.60} now)"]
    found = []
    for field in dict.fromkeys([*saved, *current]):
        found += differences(saved.get(field), current.get(field), f"{name}.{field}" if name else str(field))
    return found


def _setting(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError


def _readable(value: Any) -> Any:
    # The repr of a long tensor is shortened, so two of them could look the same.
    return value.tolist() if hasattr(value, "tolist") else repr(value)
