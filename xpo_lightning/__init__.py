"""Exploratory Preference Optimization (XPO, arXiv 2405.21046) of language models, as a Lightning module."""

from xpo_lightning.batch import Completions, Experience, Pair, Prompts
from xpo_lightning.data import PromptDataModule
from xpo_lightning.errors import InputError
from xpo_lightning.losses import IPOLoss, PreferenceLoss, SigmoidLoss, XPOLoss, xpo_loss
from xpo_lightning.models import LoadedModel, LoRASpec, ModelSpec
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.rewards import PythonReward, Reward, SequenceClassifierReward, WeightedSum
from xpo_lightning.rollout.sampling import Sampling
from xpo_lightning.schedules import Constant, Cosine, Linear, PerEpoch, Schedule

__version__ = "0.1.0"

__all__ = [
    "Completions",
    "Constant",
    "Cosine",
    "Experience",
    "IPOLoss",
    "InputError",
    "Linear",
    "LoRASpec",
    "LoadedModel",
    "ModelSpec",
    "Pair",
    "PerEpoch",
    "PreferenceLoss",
    "PromptDataModule",
    "Prompts",
    "PythonReward",
    "Reward",
    "Sampling",
    "Schedule",
    "SequenceClassifierReward",
    "SigmoidLoss",
    "WeightedSum",
    "XPOLightningModule",
    "XPOLoss",
    "xpo_loss",
]
