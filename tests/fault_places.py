"""The places of a run at which one of several processes is made to fail."""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from xpo_lightning.callbacks import CompletionsTable, PredictionsWriter, RunCheckpoint, RunContinuation
from xpo_lightning.checkpointing.io import CrashSafeCheckpointIO
from xpo_lightning.checkpointing.run_state import RunState
from xpo_lightning.core.timer import PhaseTimer
from xpo_lightning.data.dataloader import PromptDataset
from xpo_lightning.training.metrics import PairAverages
from xpo_lightning.training.objective import Objective
from xpo_lightning.training.optimizer import Optimization, WarmupThenDecay
from xpo_lightning.training.persistent_state import PersistentState


def letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """Score completions; a place of its own."""
    return [len(text) + 0.01 * text.count("e") for text in completions]


@dataclass(frozen=True)
class Place:
    """Where a process fails.

    Args:
        name: What to call it.
        owner: Whose function it is.
        function: The function in whose stead the fault comes.
        stage: In which step; the empty text is anywhere.
        occurrence: At which call.
        spoil: Makes what the function returns not finite; None where that has no meaning.
        when: Which calls count.
        ranks: Processes that come here.
        statuses: Exit statuses by fault, where they are not the usual ones.
        is_common: Whether what is not finite is added up over processes, so that the first speaks for all.
    """

    name: str
    owner: Any
    function: str
    stage: str = ""
    occurrence: int = 2
    spoil: Callable[[Any], Any] | None = None
    when: Callable[..., bool] = lambda *args, **options: True
    ranks: tuple[int, ...] = (0, 1, 2, 3)
    statuses: tuple[tuple[str, int], ...] = ()
    is_common: bool = False

    @property
    def command(self) -> str:
        """The command that comes there."""
        return "predict" if self.name.startswith("predict") else "fit"

    def status(self, fault: str) -> int:
        """Return the exit status that is right for a fault here."""
        return dict(self.statuses).get(fault, 2 if fault == "nan" else 1)


def phase(name: str) -> Callable[..., bool]:
    return lambda timer, phase, *args: phase == name


def nan_first(result: Any) -> Any:
    return [math.nan, *result[1:]]


def nan_loss(result: Any) -> Any:
    loss, measured = result
    return loss * math.nan, {**measured, "loss/total": measured["loss/total"] * math.nan}


class InBackward(torch.autograd.Function):
    """Calls the fault in the middle of the backward pass."""

    @staticmethod
    def forward(context: Any, value: Any) -> Any:
        return value.clone()

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return backward_passes(gradients[0])


def backward_passes(gradient: Any) -> Any:
    """Let a gradient pass; a place of its own."""
    return gradient


def places() -> list[Place]:
    here = sys.modules[__name__]
    timer, trains = partial(Place, owner=PhaseTimer, function="__call__"), {"stage": "training"}
    user = (("exception", 2), ("memory", 2))
    return [
        Place("step: loading a batch", PromptDataset, "__getitem__", occurrence=4),
        Place("step: begins", RunState, "step"),
        timer(name="step: the reference writes", when=phase("reference_rollout"), **trains),
        timer(name="step: the policy writes", when=phase("policy_rollout"), **trains),
        Place("step: the reward", here, "letters", "training", spoil=nan_first, statuses=user),
        timer(name="step: forward", when=phase("policy_forward"), occurrence=3, **trains),
        Place("step: loss", Objective, "evaluate", "training", 3, spoil=nan_loss),
        Place("step: in the forward", LlamaMLP, "forward", "training", 30, when=lambda *_: torch.is_grad_enabled()),
        Place(
            "step: in the backward",
            here,
            "backward_passes",
            "training",
            3,
            spoil=lambda value: value * math.nan,
            is_common=True,
        ),
        Place("step: gradient is clipped", Optimization, "clip", spoil=lambda value: value * math.nan),
        Place("step: optimizer", torch.optim.AdamW, "step"),
        Place("step: learning rate", WarmupThenDecay, "step", "training"),
        Place("step: averages", PairAverages, "compute", "training", 3),
        Place("step: ends", PersistentState, "after_batch"),
        Place("saving: begins", RunCheckpoint, "_save", occurrence=2),
        Place("saving: state", RunState, "state"),
        Place("saving: a callback", RunContinuation, "on_save_checkpoint"),
        Place("saving: file", CrashSafeCheckpointIO, "save_checkpoint", ranks=(0,)),
        Place("saving: file is there", os, "replace", ranks=(0,)),
        Place("validation: begins", RunState, "begin_validation"),
        timer(name="validation: the reference writes", when=phase("reference_rollout"), stage="validation"),
        timer(name="validation: the policy writes", when=phase("policy_rollout"), stage="validation"),
        Place("validation: the reward", here, "letters", "validation", spoil=nan_first, statuses=user),
        Place("validation: objective", Objective, "evaluate", "validation", 3),
        Place("validation: a batch is shown", CompletionsTable, "on_validation_batch_end"),
        Place("validation: averages", PairAverages, "compute", "validation end", 3),
        Place("validation: ends", CompletionsTable, "on_validation_end"),
        timer(name="predict: the reference writes", when=phase("reference_rollout"), stage="prediction", occurrence=1),
        timer(name="predict: the policy writes", when=phase("policy_rollout"), stage="prediction", occurrence=1),
        Place("predict: the reward", here, "letters", "prediction", 1, spoil=nan_first, statuses=user),
        Place("predict: writing", PredictionsWriter, "write_on_batch_end", occurrence=1),
    ]


PLACES = places()
