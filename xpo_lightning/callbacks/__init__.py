"""Callbacks: what a run shows and leaves behind, each on or off in `trainer.callbacks`."""

from xpo_lightning.callbacks.baseline import Baseline
from xpo_lightning.callbacks.checkpoints import RunCheckpoint
from xpo_lightning.callbacks.completions import CompletionsTable
from xpo_lightning.callbacks.continuation import RunContinuation
from xpo_lightning.callbacks.curves import LearningCurves
from xpo_lightning.callbacks.export import PolicyExport
from xpo_lightning.callbacks.policy_folder import save_policy
from xpo_lightning.callbacks.predictions import PredictionsWriter
from xpo_lightning.callbacks.progress import XPOProgressBar
from xpo_lightning.callbacks.report import RunReport
from xpo_lightning.callbacks.stop import GracefulStop
from xpo_lightning.callbacks.summary import RunSummary
from xpo_lightning.callbacks.throughput import Throughput
from xpo_lightning.reporting.picture import draw_curves

__all__ = [
    "Baseline",
    "CompletionsTable",
    "GracefulStop",
    "LearningCurves",
    "PolicyExport",
    "PredictionsWriter",
    "RunCheckpoint",
    "RunContinuation",
    "RunReport",
    "RunSummary",
    "Throughput",
    "XPOProgressBar",
    "draw_curves",
    "save_policy",
]
