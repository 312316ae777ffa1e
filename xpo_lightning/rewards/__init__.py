"""Rewards: text in, one number a completion out."""

from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.classifier import SequenceClassifierReward
from xpo_lightning.rewards.function import PythonReward
from xpo_lightning.rewards.weighted import WeightedSum

__all__ = ["PythonReward", "Reward", "SequenceClassifierReward", "WeightedSum"]
