"""What a result depends on, as plain values that can be written down and compared."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from torch import Tensor, nn


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash the names, shapes and first values of weights.

    Two models that differ by training have two fingerprints; it is no guard against forgery.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda named: named[0]):
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def import_path(thing: Any) -> str:
    """Name a function or a class, or the class of an object that is called like a function, by where it is defined."""
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
"""Classes that have moved since reference caches and checkpoints were first written, and the names these know."""


def recorded_path(thing: Any) -> str:
    """Name a class as `import_path` does, for files that must stay readable when our own classes move."""
    path = import_path(thing)
    return _RECORDED.get(path, path)


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Collect the public attributes of a module that JSON can hold; paths count as text, dataclasses as mappings."""
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
    """Write a value down, always the same way; what JSON cannot hold is written as Python shows it."""
    return json.dumps(value, default=_readable, sort_keys=True)


def differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """Tell in which fields two values differ.

    Args:
        saved: What was read back from JSON.
        current: The same of now, also read back from JSON.
        name: What both are called.

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
    # Long tensors are shown shortened, so two of them could look the same.
    return value.tolist() if hasattr(value, "tolist") else repr(value)
