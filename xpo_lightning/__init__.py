"""Exploratory Preference Optimization (XPO, arXiv 2405.21046) of language models, as a Lightning module."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpo_lightning.batch import Completions, Experience, Pair, Prompts
    from xpo_lightning.buffer.pairs import BufferOptions
    from xpo_lightning.candidates import Candidates
    from xpo_lightning.data import PromptDataModule
    from xpo_lightning.desk import Desk
    from xpo_lightning.errors import InputError
    from xpo_lightning.losses import XPOLoss, xpo_loss
    from xpo_lightning.models import LoadedModel, LoRASpec, ModelSpec
    from xpo_lightning.module import XPOLightningModule
    from xpo_lightning.preference import LabelRule
    from xpo_lightning.preference_losses import (
        DPOPositiveLoss,
        HingeLoss,
        IPOLoss,
        PreferenceLoss,
        RobustLoss,
        SigmoidLoss,
    )
    from xpo_lightning.reference import ReferenceRefresh
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
        WeightedSum,
    )
    from xpo_lightning.rollout.engine import Asked, RolloutEngine
    from xpo_lightning.rollout.sampling import Sampling
    from xpo_lightning.rollout.vllm import VLLMRollout
    from xpo_lightning.run_folder.checkpoint_io import CrashSafeCheckpointIO
    from xpo_lightning.run_folder.csv_logger import ResumableCSVLogger
    from xpo_lightning.samplers import PolicySampler, PreviousPolicySampler, PythonSampler, ReferenceSampler, Sampler
    from xpo_lightning.schedules import Constant, Cosine, Linear, PerEpoch, PerIteration, Progress, Schedule
    from xpo_lightning.strategies import FSDP2Strategy

__version__ = "0.1.0"

__all__ = [
    "Asked",
    "BufferOptions",
    "Candidates",
    "Completions",
    "Constant",
    "Cosine",
    "CrashSafeCheckpointIO",
    "DPOPositiveLoss",
    "Desk",
    "Experience",
    "FSDP2Strategy",
    "HTTPJudge",
    "HingeLoss",
    "HumanJudge",
    "IPOLoss",
    "InputError",
    "Judge",
    "LabelRule",
    "Linear",
    "LoRASpec",
    "LoadedModel",
    "LocalJudge",
    "ModelSpec",
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
    "RolloutEngine",
    "Sampler",
    "Sampling",
    "Schedule",
    "SequenceClassifierReward",
    "SigmoidLoss",
    "VLLMRollout",
    "WeightedSum",
    "XPOLightningModule",
    "XPOLoss",
    "xpo_loss",
]

_HOMES = {
    "batch": ("Completions", "Experience", "Pair", "Prompts"),
    "buffer.pairs": ("BufferOptions",),
    "candidates": ("Candidates",),
    "run_folder.checkpoint_io": ("CrashSafeCheckpointIO",),
    "run_folder.csv_logger": ("ResumableCSVLogger",),
    "data": ("PromptDataModule",),
    "desk": ("Desk",),
    "errors": ("InputError",),
    "losses": ("XPOLoss", "xpo_loss"),
    "models": ("LoRASpec", "LoadedModel", "ModelSpec"),
    "module": ("XPOLightningModule",),
    "preference": ("LabelRule",),
    "preference_losses": ("DPOPositiveLoss", "HingeLoss", "IPOLoss", "PreferenceLoss", "RobustLoss", "SigmoidLoss"),
    "reference": ("ReferenceRefresh",),
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
        "WeightedSum",
    ),
    "rollout.engine": ("Asked", "RolloutEngine"),
    "rollout.sampling": ("Sampling",),
    "rollout.vllm": ("VLLMRollout",),
    "samplers": ("PolicySampler", "PreviousPolicySampler", "PythonSampler", "ReferenceSampler", "Sampler"),
    "schedules": ("Constant", "Cosine", "Linear", "PerEpoch", "PerIteration", "Progress", "Schedule"),
    "strategies": ("FSDP2Strategy",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a name when it is asked for: torch, Lightning and transformers take seconds, which `xpo --help` spares."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'xpo_lightning' has no attribute '{name}'")
    wanted = __all__ if name == "XPOLightningModule" else [name]  # A config may name any class by its short name.
    for each in wanted:
        globals()[each] = getattr(import_module(f"xpo_lightning.{_HOME_OF[each]}"), each)
    return globals()[name]


def __dir__() -> list[str]:
    """List what can be asked for."""
    return sorted({*globals(), *__all__})
