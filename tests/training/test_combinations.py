"""Options that do not go together are refused when the module is built, with both of their keys."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xpo_lightning import (
    BufferOptions,
    Candidates,
    GEBBonus,
    InputError,
    Judge,
    MixedLoss,
    NashMDLoss,
    PILAFSampler,
    PolicySampler,
    PythonReward,
    ReferenceRefresh,
    ReferenceSampler,
    RolloutEngine,
    SELMBonus,
    SigmoidLoss,
    WeightedSum,
    XPOLightningModule,
)

MakeModule = Callable[..., XPOLightningModule]


class Coin(Judge):
    def compare(self, prompts: Any, firsts: Any, seconds: Any, columns: Any) -> torch.Tensor:
        return torch.full((len(prompts),), 0.5)


class Behind(RolloutEngine):
    copies_weights = True

    def sync(self, policy: Any) -> None:
        """Copy nothing."""

    def write(self, prompts: Any, asked: Any) -> list[Any]:
        return []


def zeros(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [0.0] * len(completions)


def standardised() -> WeightedSum:
    return WeightedSum([PythonReward(zeros)], [1.0], normalize="batch")


COMBINATIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("model.missing_eos_penalty", "model.reward=Coin"): {"reward": Coin(), "missing_eos_penalty": 1.0},
    ("model.candidates.count=2", "model.reward=Coin"): {"reward": Coin(), "candidates": Candidates(2, "best_of_each")},
    ("model.candidates.judging=tournament", "model.reward=PythonReward"): {
        "candidates": Candidates(2, "best_of_each", "tournament")
    },
    ("model.reference_cache", "model.reward=Coin"): {"reward": Coin(), "reference_cache": "memory"},
    ("model.reference_cache", "model.reward=WeightedSum"): {"reward": standardised(), "reference_cache": "memory"},
    ("model.reference_cache", "model.sampler=PolicySampler"): {
        "sampler": PolicySampler(),
        "reference_cache": "memory",
    },
    ("model.reference_cache", "model.candidates.count"): {
        "candidates": Candidates(2, "best_of_each"),
        "reference_cache": "memory",
    },
    ("model.reference_cache", "model.reference_refresh"): {
        "reference_refresh": ReferenceRefresh(1),
        "reference_cache": "memory",
    },
    ("model.buffer", "model.reference_refresh"): {"reference_refresh": ReferenceRefresh(1), "buffer": BufferOptions()},
    ("model.bonus is SELMBonus", "model.bonus_on=both"): {"bonus": SELMBonus(), "bonus_on": "both"},
    ("model.bonus_sampler=PolicySampler", "model.bonus "): {"bonus": GEBBonus(), "bonus_sampler": PolicySampler()},
    ("model.bonus_sampler=ReferenceSampler", "model.reference_cache"): {
        "bonus_sampler": ReferenceSampler(),
        "reference_cache": "memory",
    },
    ("model.preference_loss=NashMDLoss", "model.sampler=PILAFSampler"): {
        "preference_loss": NashMDLoss(),
        "sampler": PILAFSampler(),
    },
    ("model.preference_loss=MixedLoss", "model.sampler=PILAFSampler"): {
        "preference_loss": MixedLoss([NashMDLoss(), SigmoidLoss()], [1.0, 1.0]),
        "sampler": PILAFSampler(),
    },
    ("model.preference_loss=NashMDLoss", "model.buffer"): {
        "preference_loss": NashMDLoss(),
        "buffer": BufferOptions(),
    },
    ("model.preference_loss=NashMDLoss", "model.updates_per_rollout"): {
        "preference_loss": NashMDLoss(),
        "updates_per_rollout": 2,
    },
    ("model.preference_loss=NashMDLoss", "model.epochs_per_rollout"): {
        "preference_loss": NashMDLoss(),
        "epochs_per_rollout": 2,
    },
    ("model.preference_loss=NashMDLoss", "model.rollout"): {
        "preference_loss": NashMDLoss(),
        "rollout": Behind(sync_every=2),
    },
}


@pytest.mark.parametrize("keys", COMBINATIONS, ids=" with ".join)
def test_bad_combination_is_refused_with_both_keys(make_module: MakeModule, keys: tuple[str, str]):
    options = COMBINATIONS[keys]
    with pytest.raises(InputError) as refused:
        make_module(**options)
    assert all(key in str(refused.value) for key in keys)
    for left_out in options:  # Each alone is no trouble.
        make_module(**{name: value for name, value in options.items() if name != left_out})
