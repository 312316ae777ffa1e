"""Has an engine write with the policy as it is, or as it was some batches ago, and before a batch is needed."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.core.timed_call import Call, CallThread
from xpo_lightning.models.forward.causal_forward import eval_mode
from xpo_lightning.models.snapshot import Snapshot
from xpo_lightning.rollout.engine import GenerationRequest, RolloutEngine

_PATIENCE = 5.0  # seconds that the end of a run waits for an engine that is still writing
_KEY = "model.rollout"


@dataclass(frozen=True)
class Held:
    """Weights of the policy that the engine writes training batches with.

    Args:
        weights: A copy of them.
        taken: How many batches the run had finished when they were copied.
    """

    weights: Snapshot
    taken: int


class EngineWriter:
    """Writes through an engine; sends it the policy every `sync_every` batches, and has it write one `ahead`.

    The weights that it writes training batches with are copied where they are behind the policy, and go into
    checkpoints. So a resumed run sends the same weights, and what was under way is written again from the same seeds.

    Args:
        engine: The engine.
        check: Called while waiting; may raise to stop the run.
    """

    _of_thread = threading.local()

    def __init__(self, engine: RolloutEngine, check: Callable[[], None]) -> None:
        self.engine, self._check_run = engine, check
        self.holds_weights = engine.sync_every > 1 or engine.ahead > 0
        self._held: Held | None = None
        self._decided = -1  # the last batch for which it is known with which weights it is written
        self._settled: tuple[Held | None, int] = (None, -1)
        self._sent: Held | None = None
        self._wrote: Held | None = None
        self._under_way: _UnderWay | None = None
        self._policy: nn.Module | None = None
        self._thread = CallThread("writing ahead")
        engine.set_check(self._check)

    def begin(self, policy: nn.Module) -> None:
        """Forget the weights of an earlier run, and keep the policy, whose shapes those of a checkpoint must have."""
        self._policy, self._held, self._sent, self._decided = policy, None, None, -1
        self.settle()

    def staleness(self, batch: int | None) -> int:
        """Return how many batches the policy has been trained on since the weights that wrote a batch were taken."""
        return 0 if batch is None or self._wrote is None else batch - self._wrote.taken

    def write(
        self, policy: nn.Module, prompts: Prompts, asked: Sequence[GenerationRequest], batch: int | None
    ) -> list[list[Completions]]:
        """Have the engine write, or take what it has written ahead.

        Args:
            policy: The policy.
            prompts: B prompts.
            asked: Requests, each for one model.
            batch: Number of the training batch; None for other prompts, which the policy writes as it is.

        Returns:
            See `RolloutEngine.write`.
        """
        if self._under_way is not None:  # The engine cannot have other weights until that is written.
            self._under_way.call.wait(self._check_run)
        kept, self._wrote = self._under_way, None
        if batch is not None and kept is not None and kept.batch == batch:
            self._under_way, self._wrote = None, self._held
            written: list[list[Completions]] = kept.call.result()
        else:
            self._send(policy, batch, batch)
            self._wrote = None if batch is None else self._held
            with eval_mode(policy):
                written = self.engine.write(prompts, asked)
        self.engine.measured = {}
        if batch is not None and self.holds_weights:
            self.engine.measured["rollout/staleness"] = float(self.staleness(batch))
        return written

    def start(
        self, policy: nn.Module, prompts: Prompts, asked: Sequence[GenerationRequest], batch: int, *, wanted: bool
    ) -> None:
        """Have the engine begin to write the next training batch, with the policy as it is if new weights are due.

        Args:
            policy: The policy.
            prompts: B prompts.
            asked: Requests, each for one model.
            batch: Number of the batch.
            wanted: Whether this run trains on it; otherwise it is only settled with which weights it is written.
        """
        if wanted:
            self._send(policy, batch, batch - 1)
            is_unwanted = threading.Event()
            call = self._thread.begin(partial(self._write_ahead, is_unwanted, prompts, asked))
            self._under_way = _UnderWay(batch, call, is_unwanted)
        else:
            self._decide(policy, batch, batch - 1)

    def settle(self) -> None:
        """Let checkpoints have the present state: a batch is finished."""
        self._settled = (self._held, self._decided)

    def state(self) -> dict[str, Any] | None:
        """Return the weights that the engine has, and since when; None if they are the policy's own."""
        held, decided = self._settled
        if held is None:
            return None
        return {"weights": held.weights.state(), "taken": held.taken, "decided": decided}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Restore what `state` returned.

        Raises:
            InputError: The weights do not fit the policy.
        """
        if state is None or not self.holds_weights or self._policy is None:
            return
        weights = Snapshot(self._policy, device=torch.device("cpu"))
        weights.load_state(state["weights"], _KEY)
        self._held, self._decided = Held(weights, state["taken"]), state["decided"]
        self.settle()

    def close(self) -> None:
        """End what is under way, and have the engine drop the policy."""
        if self._under_way is not None:
            self._under_way.is_unwanted.set()
            self._under_way.call.done.wait(_PATIENCE)
            self._thread.give_up()
            self._under_way = None
        self._sent = None
        self.engine.close()

    def _send(self, policy: nn.Module, batch: int | None, done: int | None) -> None:
        """Send the engine the weights that a batch is to be written with, unless it has them."""
        if batch is None or done is None or not self.holds_weights:
            self._sent = None
            self.engine.sync(policy)
            return
        held = self._decide(policy, batch, done)
        if held is not self._sent:
            with held.weights.lent(policy) as earlier:
                self.engine.sync(earlier)
            self._sent = held

    def _decide(self, policy: nn.Module, batch: int, done: int) -> Held:
        """Return the weights to write a training batch with; a batch for which they are settled keeps them."""
        if self._held is None or (batch > self._decided and batch % self.engine.sync_every == 0):
            self._held = Held(Snapshot(policy, device=torch.device("cpu")), done)
        self._decided = max(batch, self._decided)
        return self._held

    def _write_ahead(
        self, is_unwanted: threading.Event, prompts: Prompts, asked: Sequence[GenerationRequest]
    ) -> list[list[Completions]]:
        self._of_thread.is_unwanted = is_unwanted
        return self.engine.write(prompts, asked)

    def _check(self) -> None:
        """Raise if the run is to stop, or if what this thread writes is no longer wanted."""
        is_unwanted: threading.Event | None = getattr(self._of_thread, "is_unwanted", None)
        if is_unwanted is not None and is_unwanted.is_set():
            raise _EndedError
        self._check_run()


class _EndedError(Exception):
    """What is written is no longer wanted."""


@dataclass(frozen=True)
class _UnderWay:
    """A batch that is being written in another thread.

    Args:
        batch: Number of the batch.
        call: The call that writes it.
        is_unwanted: Set to have it end at its next check.
    """

    batch: int
    call: Call
    is_unwanted: threading.Event
