"""Callbacks: a run's output on the terminal and in files; `trainer.callbacks` switches each on or off."""

from xpo_lightning.callbacks.baseline import Baseline
from xpo_lightning.callbacks.checkpoint import RunCheckpoint
from xpo_lightning.callbacks.completions_table import CompletionsTable
from xpo_lightning.callbacks.extragradient import Extragradient
from xpo_lightning.callbacks.graceful_stop import GracefulStop
from xpo_lightning.callbacks.policy_export import PolicyExport
from xpo_lightning.callbacks.policy_watch import PolicyWatch
from xpo_lightning.callbacks.predictions_writer import PredictionsWriter
from xpo_lightning.callbacks.progress_bar import XPOProgressBar
from xpo_lightning.callbacks.resume_metrics import RunContinuation
from xpo_lightning.callbacks.run_artifacts import LearningCurves, RunReport
from xpo_lightning.callbacks.run_summary import RunSummary
from xpo_lightning.callbacks.throughput import Throughput
from xpo_lightning.models.saving import save_policy
from xpo_lightning.reporting.picture import draw_curves

__all__ = [
    "Baseline",
    "CompletionsTable",
    "Extragradient",
    "GracefulStop",
    "LearningCurves",
    "PolicyExport",
    "PolicyWatch",
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
