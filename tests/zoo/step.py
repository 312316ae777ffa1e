"""One XPO step of a module on a fixed batch of prompts: what it sampled, scored, trained on and logged."""

import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from conftest import (
    Recorder,
    longer_is_better,
    make_tokenizer,
    quiet_trainer,
    randomize_adapters,
    replaying_on_a_cpu,
)
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from xpo_lightning import (
    Candidates,
    Experience,
    LoadedModel,
    LoRASpec,
    ModelSpec,
    PythonReward,
    Sampling,
    XPOLightningModule,
)
from xpo_lightning.training.collector import Collector

LENGTHS = (2, 30, 7, 19, 3, 11)  # tokens of the prompts
ALPHA, BETA = 0.01, 0.1
LORA = LoRASpec(r=2)
NOISE = 0.3  # probability of every dropout of a model that has some

Build = Callable[..., nn.Module]
"""Builds a model in a type, the same each time; `noise` is the probability of all its dropout."""


@dataclass(frozen=True)
class Mode:
    """How a policy is trained: in which type, with adapters or whole, with dropout in its config or without.

    `replayed`: each token's step is taken as a GPU replays it, where the model allows it.
    """

    dtype: torch.dtype = torch.float32
    lora: bool = False
    dropout: bool = False
    replayed: bool = False

    def __str__(self) -> str:
        """Name the mode."""
        dtype = str(self.dtype).removeprefix("torch.")
        return dtype + " LoRA" * self.lora + " dropout" * self.dropout + " replayed" * self.replayed


FULL = Mode()
MODES = {
    str(mode): mode
    for mode in (
        FULL,
        Mode(lora=True),
        Mode(torch.bfloat16),
        Mode(torch.bfloat16, lora=True),
        Mode(dropout=True),
        Mode(replayed=True),
    )
}


@dataclass
class Taken:
    """A step that was taken.

    Args:
        pairs: What was sampled and scored.
        gradients: What the optimizer was given, by the name of the weight.
        logged: The metrics.
        policy: The model after the step.
    """

    pairs: Experience
    gradients: dict[str, Tensor]
    logged: dict[str, float]
    policy: nn.Module


def take_module_step(build: Build, mode: Mode) -> Taken:
    """Train a module for one step; a model with dropout is saved first."""
    recorder = Recorder()
    captures = replaying_on_a_cpu() if mode.replayed else nullcontext()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), captures:
        warnings.filterwarnings("ignore", module=r"lightning\.")
        torch.manual_seed(0)
        module = _Captured(
            policy=_saved(build(mode.dtype), folder)
            if mode.dropout
            else LoadedModel(build(mode.dtype), make_tokenizer()),
            lora=LORA if mode.lora else None,
            reward=PythonReward(longer_is_better),
            sampling=Sampling(max_new_tokens=8),
            candidates=Candidates(2, "best_of_each"),
            alpha=ALPHA,
            beta=BETA,
            optimizer=partial(SGD, lr=0.1),
            lr_schedule="constant",
            max_grad_norm=None,
            micro_batch_size=4,
        )
        quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, batches())
    return Taken(module.experience, module.gradients, recorder.steps[0], module.policy)


def sample_greedily(build: Build) -> Experience:
    """Let a module write the likeliest tokens."""
    module = XPOLightningModule(
        policy=LoadedModel(build(), make_tokenizer()),
        reward=PythonReward(longer_is_better),
        sampling=Sampling(max_new_tokens=8, temperature=0.0),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        return quiet_trainer().predict(module, batches())[0]


def batches() -> DataLoader:
    """Load one batch of token rows without the first few ids, which families keep for padding and the like."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(8, 270, (length,), generator=generator).tolist() for length in LENGTHS]
    batch = {"prompt": [f"prompt {number}" for number in range(len(rows))], "prompt_ids": rows}
    return DataLoader([batch], batch_size=None)


def _saved(model: nn.Module, folder: str) -> ModelSpec:
    """Save a model, so that the module loads it itself; only then can it switch dropout off."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return ModelSpec(folder)


class _Captured(XPOLightningModule):
    """Keeps the pairs and the gradients of its step; its adapters, if any, change the policy from the start."""

    experience: Experience
    gradients: dict[str, Tensor]

    def configure_model(self) -> None:
        """See the module."""
        super().configure_model()
        if not isinstance(self.collector, _Recording):
            randomize_adapters(self.policy, 0.1)
            self.collector = _Recording(**vars(self.collector))
            self.collector.keep = lambda experience: setattr(self, "experience", experience)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """See Lightning."""
        weights = self.policy.named_parameters()
        self.gradients = {name: weight.grad.clone().float() for name, weight in weights if weight.grad is not None}


class _Recording(Collector):
    keep: Callable[[Experience], None]

    def collect(self, *args: Any, **options: Any) -> Experience:
        experience = super().collect(*args, **options)
        self.keep(experience)
        return experience
