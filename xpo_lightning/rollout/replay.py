"""Captures decoding steps, token drawing included, as CUDA graphs, and replays them for the rest of the run.

A captured step reads and writes at fixed addresses: the buffers of a workspace, and the weights, which optimizers
change in place. If weights have moved or adapters were switched, another step is captured.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from xpo_lightning.models.adapters import is_adapted_layer
from xpo_lightning.models.forward.buckets import rows_of_bucket
from xpo_lightning.models.forward.capabilities import capabilities_of
from xpo_lightning.models.forward.judging import is_coarse
from xpo_lightning.models.forward.lm_head import apply_head
from xpo_lightning.models.forward.norms import norms_fused
from xpo_lightning.models.forward.truth import COARSE, EXACT, FAILURES, described, name_of, relative_error
from xpo_lightning.rollout.sampling import TokenSampler
from xpo_lightning.rollout.session import Session
from xpo_lightning.rollout.workspace import Workspace


class Replay:
    """Runs the decoding steps of a session that has a workspace, by replaying captured steps.

    Args:
        session: B encoded prompts.
        uniforms: Random numbers in [0, 1), float64. (B, T)
        sampler: Draws the tokens.
    """

    def __init__(self, session: Session, uniforms: Tensor, sampler: TokenSampler) -> None:
        if session.workspace is None:
            raise ValueError("expected a session with a workspace")
        self.session, self.sampler = session, sampler
        self.workspace: Workspace = session.workspace
        self.written = self.workspace.written
        self.head = capabilities_of(session.model).head
        self.active = len(uniforms)
        self.identity = identity_of(session.model)
        self.written.begin(session.given, uniforms)
        self.workspace.column.fill_(session.width)
        self.workspace.put_features(session.first)

    @property
    def rows(self) -> int:
        """Number of rows that are computed: the active ones, rounded up so that few sizes must be captured."""
        return rows_of_bucket(self.active)

    def draw(self) -> None:
        """Draw the next token of each row."""
        self._step_for(self.rows).draw()

    def advance(self) -> None:
        """Draw a token for each row and run the model on it, by a replay if the step can be captured."""
        key = (self.rows, self.identity, self.workspace.features.data_ptr())
        if key not in self.workspace.steps:
            self.workspace.steps[key] = self._prepared()
        self.workspace.steps[key]()

    def retire(self) -> None:
        """Remove rows that have ended if fewer are then computed; waits for the device."""
        ended = self.written.ended[self.session.places[: self.active]]
        staying = int((~ended).sum())
        if staying == 0:
            self.active = 0
        elif rows_of_bucket(staying) < self.rows:
            self.active = len(self.session.retire(ended))

    def _step_for(self, rows: int) -> "_Step":
        return _Step(self.workspace, self.session.model, self.head, self.sampler, rows)

    def _prepared(self) -> Callable[[], None]:
        """Capture the step and compare its features with those of the plain step, which is returned on failure."""
        model, step, features = self.session.model, self._step_for(self.rows), self.workspace.features[: self.rows]
        kept = [(tensor, tensor.clone()) for tensor in step.state()]

        def undo() -> None:
            for tensor, value in kept:
                tensor.copy_(value)

        step()
        expected = features.clone()
        undo()
        try:
            replay = capture(replace(step, is_fused=True))
            undo()
            replay()
            off = relative_error(features, expected)
            fault = f"numbers would be off by {off:.2g} of their size" if off > limit_of(model) else None
        except FAILURES as error:
            fault = described(error)
        undo()
        if fault is None:
            return replay
        capabilities_of(model).has_refused_replays = True
        rank_zero_info(f"{name_of(model)}: tokens are not written by replayed CUDA graphs, which is slower; {fault}")
        return step


@dataclass(frozen=True)
class _Step:
    """Draws a token for each of the first rows of a workspace, and runs the model on it.

    A step is the unit of capture. It must not wait for the device, nor depend on anything but the buffers' content.
    """

    workspace: Workspace
    model: nn.Module
    head: nn.Linear | None
    sampler: TokenSampler
    rows: int
    is_fused: bool = False

    def __call__(self) -> None:
        with _no_kept_casts(), norms_fused(self.model) if self.is_fused else nullcontext():
            tokens = self.draw()
            self.workspace.features[: self.rows] = self.workspace.advance(self.model, self.head, tokens)
            self.workspace.written.step += 1
            self.workspace.column += 1

    def draw(self) -> Tensor:
        logits = apply_head(self.workspace.features[: self.rows], self.head)
        return self.workspace.written.draw(logits, self.workspace.places[: self.rows], self.sampler)

    def state(self) -> list[Tensor]:
        """Return all that a step changes, except keys and values, which the next step overwrites."""
        return [*self.workspace.written.state(), self.workspace.column, self.workspace.features]


@contextmanager
def _no_kept_casts() -> Iterator[None]:
    """Disable autocast's cache of converted weights: cached copies are freed by the time a step is replayed."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Capture the GPU work of a step, and return a function that replays it and does nothing else.

    The step first runs once without capture, since kernels cannot be loaded or selected during one.

    Raises:
        RuntimeError: The step cannot be captured, for example because it waits for the device.
    """
    step()
    try:
        return _captured(step)
    except RuntimeError:
        # A failed capture leaves the allocator in capture mode, and the random generator in the capture's memory;
        # another capture, of a trivial step, releases the generator.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), _memory())
        _memory.cache_clear()
        _captured(lambda: torch.zeros(1, device="cuda").add_(1))
        raise


def _captured(step: Callable[[], object]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    # "thread_local" lets other threads go on, such as one that pins memory; all graphs share one memory pool.
    with torch.cuda.graph(graph, pool=_memory(), capture_error_mode="thread_local"):
        step()
    return graph.replay


@cache
def _memory() -> Any:
    return torch.cuda.graph_pool_handle()


def limit_of(model: nn.Module) -> float:
    """Return the largest error allowed to a replay, in standard deviations."""
    return COARSE if is_coarse(model) else EXACT


def identity_of(model: nn.Module) -> Hashable:
    """Hash the addresses of a model's weights and its active adapters: a captured step is valid only for these."""
    tensors = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    adapters = [
        (module.disable_adapters, module.merged, tuple(module.active_adapters))
        for module in model.modules()
        if is_adapted_layer(module)
    ]
    return hash((tuple(tensors), tuple(adapters)))
