"""Exploratory Preference Optimization (XPO, arXiv 2405.21046) of language models, as a Lightning module."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpo_lightning.checkpointing.csv_logger import ResumableCSVLogger
    from xpo_lightning.checkpointing.io import CrashSafeCheckpointIO
    from xpo_lightning.core.batch import BonusSample, Completions, Experience, Pair, Prompts
    from xpo_lightning.core.errors import InputError
    from xpo_lightning.data import PromptDataModule
    from xpo_lightning.losses.bonus import Bonus, BonusInput, Scored
    from xpo_lightning.losses.bonuses import GEBBonus, SELMBonus, SEPOPOBonus, VPOBonus, XPOBonus
    from xpo_lightning.losses.counts import COPOBonus
    from xpo_lightning.losses.divergence import FDivergenceLoss, MixedLoss, NLLLoss
    from xpo_lightning.losses.game import INPOLoss, NashMDLoss, SPPOLoss
    from xpo_lightning.losses.preference import (
        DPOPositiveLoss,
        HingeLoss,
        IPOLoss,
        PreferenceLoss,
        RobustLoss,
        SigmoidLoss,
    )
    from xpo_lightning.losses.schedules import Constant, Cosine, Linear, PerEpoch, PerIteration, Progress, Schedule
    from xpo_lightning.losses.uncertainty import DEPOBonus
    from xpo_lightning.losses.xpo import XPOLoss, xpo_loss
    from xpo_lightning.models.policy import LoadedModel, LoRASpec, ModelSpec
    from xpo_lightning.models.reference import ReferenceRefresh
    from xpo_lightning.module import XPOLightningModule
    from xpo_lightning.rewards import (
        HTTPJudge,
        HumanJudge,
        Judge,
        LocalJudge,
        PythonJudge,
        PythonReward,
        RemoteReward,
        Reward,
        SequenceClassifierReward,
        VerifierReward,
        WeightedSum,
    )
    from xpo_lightning.rewards.labels import LabelRule
    from xpo_lightning.rollout.context import RolloutContext
    from xpo_lightning.rollout.engine import GenerationRequest, RolloutEngine
    from xpo_lightning.rollout.historical import HistoricalPolicySampler
    from xpo_lightning.rollout.pair_selection import Candidates
    from xpo_lightning.rollout.pilaf import PILAFSampler
    from xpo_lightning.rollout.samplers import (
        MixtureSampler,
        PolicySampler,
        PreviousPolicySampler,
        PythonSampler,
        ReferenceSampler,
        Sampler,
    )
    from xpo_lightning.rollout.sampling import Sampling
    from xpo_lightning.rollout.vllm.engine import VLLMRollout
    from xpo_lightning.strategies import FSDP2Strategy
    from xpo_lightning.training.replay_buffer.buffer import BufferOptions

__version__ = "0.1.0"

__all__ = [
    "Bonus",
    "BonusInput",
    "BonusSample",
    "BufferOptions",
    "COPOBonus",
    "Candidates",
    "Completions",
    "Constant",
    "Cosine",
    "CrashSafeCheckpointIO",
    "DEPOBonus",
    "DPOPositiveLoss",
    "Experience",
    "FDivergenceLoss",
    "FSDP2Strategy",
    "GEBBonus",
    "GenerationRequest",
    "HTTPJudge",
    "HingeLoss",
    "HistoricalPolicySampler",
    "HumanJudge",
    "INPOLoss",
    "IPOLoss",
    "InputError",
    "Judge",
    "LabelRule",
    "Linear",
    "LoRASpec",
    "LoadedModel",
    "LocalJudge",
    "MixedLoss",
    "MixtureSampler",
    "ModelSpec",
    "NLLLoss",
    "NashMDLoss",
    "PILAFSampler",
    "Pair",
    "PerEpoch",
    "PerIteration",
    "PolicySampler",
    "PreferenceLoss",
    "PreviousPolicySampler",
    "Progress",
    "PromptDataModule",
    "Prompts",
    "PythonJudge",
    "PythonReward",
    "PythonSampler",
    "ReferenceRefresh",
    "ReferenceSampler",
    "RemoteReward",
    "ResumableCSVLogger",
    "Reward",
    "RobustLoss",
    "RolloutContext",
    "RolloutEngine",
    "SELMBonus",
    "SEPOPOBonus",
    "SPPOLoss",
    "Sampler",
    "Sampling",
    "Schedule",
    "Scored",
    "SequenceClassifierReward",
    "SigmoidLoss",
    "VLLMRollout",
    "VPOBonus",
    "VerifierReward",
    "WeightedSum",
    "XPOBonus",
    "XPOLightningModule",
    "XPOLoss",
    "xpo_loss",
]

_HOMES = {
    "core.batch": ("BonusSample", "Completions", "Experience", "Pair", "Prompts"),
    "training.replay_buffer.buffer": ("BufferOptions",),
    "rollout.pair_selection": ("Candidates",),
    "checkpointing.io": ("CrashSafeCheckpointIO",),
    "checkpointing.csv_logger": ("ResumableCSVLogger",),
    "data": ("PromptDataModule",),
    "rollout.context": ("RolloutContext",),
    "core.errors": ("InputError",),
    "losses.bonus": ("Bonus", "BonusInput", "Scored"),
    "losses.bonuses": ("GEBBonus", "SELMBonus", "SEPOPOBonus", "VPOBonus", "XPOBonus"),
    "losses.counts": ("COPOBonus",),
    "losses.divergence": ("FDivergenceLoss", "MixedLoss", "NLLLoss"),
    "losses.game": ("INPOLoss", "NashMDLoss", "SPPOLoss"),
    "losses.uncertainty": ("DEPOBonus",),
    "losses.xpo": ("XPOLoss", "xpo_loss"),
    "models.policy": ("LoRASpec", "LoadedModel", "ModelSpec"),
    "module": ("XPOLightningModule",),
    "rewards.labels": ("LabelRule",),
    "losses.preference": ("DPOPositiveLoss", "HingeLoss", "IPOLoss", "PreferenceLoss", "RobustLoss", "SigmoidLoss"),
    "models.reference": ("ReferenceRefresh",),
    "rewards": (
        "HTTPJudge",
        "HumanJudge",
        "Judge",
        "LocalJudge",
        "PythonJudge",
        "PythonReward",
        "RemoteReward",
        "Reward",
        "SequenceClassifierReward",
        "VerifierReward",
        "WeightedSum",
    ),
    "rollout.engine": ("GenerationRequest", "RolloutEngine"),
    "rollout.historical": ("HistoricalPolicySampler",),
    "rollout.pilaf": ("PILAFSampler",),
    "rollout.sampling": ("Sampling",),
    "rollout.vllm.engine": ("VLLMRollout",),
    "rollout.samplers": (
        "MixtureSampler",
        "PolicySampler",
        "PreviousPolicySampler",
        "PythonSampler",
        "ReferenceSampler",
        "Sampler",
    ),
    "losses.schedules": ("Constant", "Cosine", "Linear", "PerEpoch", "PerIteration", "Progress", "Schedule"),
    "strategies": ("FSDP2Strategy",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


_RENAMED = {"Asked": "GenerationRequest", "Desk": "RolloutContext"}
"""Names of earlier versions, which still work for one release."""


def __getattr__(name: str) -> Any:
    """Load a name when it is asked for: torch, Lightning and transformers take seconds, which `xpo --help` spares."""
    if name in _RENAMED:
        warnings.warn(f"xpo_lightning.{name} is {_RENAMED[name]} now", DeprecationWarning, stacklevel=2)
        return __getattr__(_RENAMED[name])
    if name not in _HOME_OF:
        raise AttributeError(f"module 'xpo_lightning' has no attribute '{name}'")
    wanted = __all__ if name == "XPOLightningModule" else [name]  # A config may name any class by its short name.
    for each in wanted:
        globals()[each] = getattr(import_module(f"xpo_lightning.{_HOME_OF[each]}"), each)
    return globals()[name]


def __dir__() -> list[str]:
    """List what can be asked for."""
    return sorted({*globals(), *__all__})
