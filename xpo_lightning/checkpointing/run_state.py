"""Saves and restores the state of a run besides weights, optimizer and Lightning's counters."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer

from xpo_lightning.core.distributed import all_gather
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.guard import Guard
from xpo_lightning.core.fingerprint import differences
from xpo_lightning.core.rng import random_state, set_random_state
from xpo_lightning.core.trainer_progress import batches_done, has_begun, validate_now, validation_is_due
from xpo_lightning.training.persistent_state import PersistentState


@dataclass
class RunState:
    """Keeps the state that lets a resumed run continue exactly like a run that was never stopped.

    Args:
        guard: Counts the skipped steps.

    Attributes:
        seed: Seed of every `RolloutRNG` of the run.
        tokens_together: Most tokens of a micro-batch, if that was measured.
        validated: How many batches were finished at the last validation; -1 before the first one.
        changed: The last batch in which the weights changed; None before the first one.
        random: The global random state before the current step or validation; None between those.
        loaded: The state from a checkpoint, until `take_up`.
    """

    guard: Guard
    seed: int = 0
    tokens_together: int | None = None
    validated: int = -1
    changed: int | None = field(default=None, init=False)
    random: dict[str, Any] | None = field(default=None, init=False)
    loaded: dict[str, Any] | None = field(default=None, init=False)

    def begin(self) -> None:
        """Forget what an earlier run of the same module has counted; a resumed one then takes up its own."""
        self.guard.in_a_row = self.guard.skipped = 0
        self.validated, self.changed, self.random = -1, None, None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a training step inside; if it is interrupted, checkpoints get the random state from before it.

        Raises:
            RuntimeError: In place of a StopIteration, which would silently end Lightning's training loop.
        """
        self.random = random_state()
        try:
            yield
        except StopIteration as error:
            # Not `from error`: contextlib would raise the StopIteration again.
            raise RuntimeError(f"StopIteration was raised in a training step: {error}") from None
        self.random = None

    def is_settled(self, trainer: Trainer) -> bool:
        """Tell whether the weights are those after the last finished batch."""
        return self.changed is None or self.changed < batches_done(trainer)

    def begin_validation(self) -> None:
        """Store the random state, which validation must not change."""
        self.random = random_state()

    def end_validation(self, trainer: Trainer) -> None:
        """Restore the random state, before any callback can save it."""
        if self.random is not None:
            set_random_state(self.random)
        self.random = None
        if has_begun(trainer):
            self.validated = batches_done(trainer)

    def state(self, trainer: Trainer, memory: PersistentState, optimization: dict[str, Any]) -> dict[str, Any]:
        """Return the state for a checkpoint (collective).

        Args:
            trainer: The trainer.
            memory: The run's state from batch to batch.
            optimization: Settings that a resumed run must share, from `Optimization.identity`.

        Returns:
            Plain values and tensors.
        """
        own = {"random": self.random or random_state(), **memory.of_process()}
        metrics = trainer.callback_metrics
        return {
            "seed": self.seed,
            "tokens_together": self.tokens_together,
            "optimization": optimization,
            "validate": self.validated != batches_done(trainer) and validation_is_due(trainer),
            "validated": self.validated,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "skipped": [self.guard.in_a_row, self.guard.skipped],
            "weights": memory.shared(),
            "processes": all_gather(own),
        }

    def load(self, state: dict[str, Any], trainer: Trainer, optimization: dict[str, Any]) -> None:
        """Keep the state from a checkpoint for `take_up`.

        Raises:
            InputError: A run with the present settings cannot resume from it.
        """
        changed = differences(state["optimization"], optimization)
        if changed:
            raise InputError(
                f"ckpt_path: the checkpoint was made with another {', '.join(changed)}, whose state cannot be "
                f"continued; resume with the settings that it was made with"
            )
        before, now = len(state["processes"]), trainer.world_size
        if before != now:
            raise InputError(
                f"ckpt_path: the checkpoint was made by {before} process{'es' * (before > 1)}, and now there "
                f"{'are' if now > 1 else 'is'} {now}; resume with trainer.devices and trainer.num_nodes as they were"
            )
        self.loaded = state

    def take_up(self, trainer: Trainer, memory: PersistentState) -> None:
        """Restore the loaded state, and catch up on a validation that was due; do nothing if nothing was loaded."""
        state, self.loaded = self.loaded, None
        if state is None:
            return
        own = state["processes"][trainer.global_rank]
        self.guard.in_a_row, self.guard.skipped = state["skipped"]
        self.validated, self.tokens_together = state["validated"], state.get("tokens_together")
        with self.guard.together():
            memory.load(own, state["weights"])
        metrics = {name: torch.tensor(value) for name, value in state["metrics"].items()}
        trainer._logger_connector._callback_metrics.update(metrics)
        if state["seed"] == self.seed:  # With another seed, other random numbers are wanted.
            set_random_state(own["random"])
        if state["validate"]:
            validate_now(trainer)
