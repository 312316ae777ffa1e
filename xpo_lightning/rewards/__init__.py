"""Rewards, which score completions, and judges, which compare two of them."""

from xpo_lightning.rewards.base import Judge, Reward
from xpo_lightning.rewards.http_judge import HTTPJudge
from xpo_lightning.rewards.human_judge import HumanJudge
from xpo_lightning.rewards.local_judge import LocalJudge
from xpo_lightning.rewards.python import PythonJudge, PythonReward
from xpo_lightning.rewards.remote import RemoteReward
from xpo_lightning.rewards.sequence_classifier.reward import SequenceClassifierReward
from xpo_lightning.rewards.verifier.reward import VerifierReward
from xpo_lightning.rewards.weighted_sum import WeightedSum

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
    "VerifierReward",
    "WeightedSum",
]
