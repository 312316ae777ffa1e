"""Shards weights over the ranks of a run (FSDP2), and gathers them while models generate and score.

Each rank samples completions of its own length, so a rollout that gathered weights layer by layer would wait for ranks
that have finished. All weights are gathered once before the rollout, and resharded after it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from xpo_lightning.core.errors import InputError
from xpo_lightning.models.adapters import is_peft_model


def shard_all(modules: Sequence[nn.Module], mesh: Any) -> None:
    """Shard all transformers models in some modules over ranks.

    Args:
        modules: Modules that hold models, or are one.
        mesh: The device mesh of `ModelParallelStrategy`.
    """
    for module in modules:
        if isinstance(module, PreTrainedModel) or is_peft_model(module):
            shard(module, mesh)
        else:
            shard_all(list(module.children()), mesh)


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard a model over ranks: each of its layers by itself, then the rest.

    Args:
        model: A transformers model, with or without adapters.
        mesh: The device mesh of `ModelParallelStrategy`.

    Raises:
        InputError: The mesh has tensor parallelism.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise InputError(
            "trainer.strategy: ModelParallelStrategy must have tensor_parallel_size: 1 and data_parallel_size the "
            "number of processes; tensor parallelism is not supported"
        )
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformer: the members of its longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len) if lists else []


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model is sharded over ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def unsharded(*models: nn.Module) -> Iterator[None]:
    """Gather the weights of models for a block (collective); inside it, ranks need not stay in step.

    Args:
        models: Any models; unsharded ones stay as they are.
    """
    with ExitStack() as stack:
        for model in models:
            for root in _roots(model):
                stack.enter_context(_unsharded(root))
        yield


@contextmanager
def _unsharded(root: FSDPModule) -> Iterator[None]:
    modules = [module for module in root.modules() if isinstance(module, FSDPModule)]  # type: ignore[attr-defined]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            # The root's own weights, vocabulary head included, stay gathered from forward to backward pass.
            module.set_reshard_after_forward(module is not root, recurse=False)


def gather_full_model(model: nn.Module, build: Callable[[], nn.Module], *, here: bool) -> nn.Module | None:
    """Gather a sharded model into an unsharded copy in main memory (collective).

    Args:
        model: Any model; an unsharded one is returned as it is.
        build: Builds a model of the same architecture; its weights are overwritten.
        here: Whether this rank wants the copy; the others get None.
    """
    if not is_sharded(model):
        return model
    weights = {}
    for name, value in model.state_dict().items():
        whole_value = full_tensor(value)
        if here:
            weights[name] = whole_value.cpu()
    if not here:
        return None
    with torch.random.fork_rng(devices=[]):
        copy = build()
    copy.load_state_dict(weights)
    return copy


@contextmanager
def gradients_together(model: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Synchronise the gradients of a sharded model on the last micro-batch only."""
    for root in _roots(model):
        root.set_requires_gradient_sync(is_last, recurse=True)
    yield


def _roots(model: nn.Module) -> list[FSDPModule]:
    """Return the outermost sharded modules."""
    if isinstance(model, FSDPModule):
        return [model]
    return [root for child in model.children() for root in _roots(child)]


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a possibly sharded tensor (collective)."""
    whole_tensor: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole_tensor
