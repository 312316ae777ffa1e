"""Rewards and judges: what says which completion is better."""

from xpo_lightning.rewards.base import Judge, Reward
from xpo_lightning.rewards.classifier import SequenceClassifierReward
from xpo_lightning.rewards.function import PythonReward
from xpo_lightning.rewards.http_judge import HTTPJudge
from xpo_lightning.rewards.human import HumanJudge
from xpo_lightning.rewards.local_judge import LocalJudge
from xpo_lightning.rewards.python_judge import PythonJudge
from xpo_lightning.rewards.remote import RemoteReward
from xpo_lightning.rewards.weighted import WeightedSum

__all__ = [
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
]
