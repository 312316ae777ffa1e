"""Shards weights over the ranks of a run (FSDP2), and gathers them while models generate and score in this process.

Each rank samples completions of its own length, so a rollout that gathered weights layer by layer would wait for ranks
that have finished. All weights are gathered once before the rollout, and resharded after it. Where an engine writes,
they stay sharded: see `models/forward/joint_passes.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from xpo_lightning.core.errors import InputError
from xpo_lightning.models.adapters import is_peft_model


def shard_all(modules: Sequence[nn.Module], mesh: Any, *, offloads: bool = False) -> None:
    """Shard all transformers models in some modules over ranks.

    Args:
        modules: Modules that hold models, or are one.
        mesh: The device mesh of `ModelParallelStrategy`.
        offloads: Whether their shards are kept in main memory.
    """
    for module in modules:
        if isinstance(module, PreTrainedModel) or is_peft_model(module):
            shard(module, mesh, offloads=offloads)
        else:
            shard_all(list(module.children()), mesh, offloads=offloads)


def shard(model: nn.Module, mesh: Any, *, offloads: bool = False) -> None:
    """Shard a model over ranks: each of its layers by itself, then the rest.

    Args:
        model: A transformers model, with or without adapters.
        mesh: The device mesh of `ModelParallelStrategy`.
        offloads: Whether its shards are kept in main memory, pinned where a GPU reads them.

    Raises:
        InputError: The mesh has tensor parallelism.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise InputError(
            "trainer.strategy: ModelParallelStrategy must have tensor_parallel_size: 1 and data_parallel_size the "
            "number of processes; tensor parallelism is not supported"
        )
    pins = mesh.device_type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pins) if offloads else OffloadPolicy()
    for part in (*layers_of(model), model):
        fully_shard(part, mesh=mesh["data_parallel"], offload_policy=policy)


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
            for root in sharded_roots(model):
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
def gradients_together(model: nn.Module, reduces: bool) -> Iterator[None]:
    """Choose whether a backward pass reduces the gradients of a sharded model over ranks, or keeps them unsharded."""
    for root in sharded_roots(model):
        root.set_requires_gradient_sync(reduces, recurse=True)
    yield


def sharded_roots(model: nn.Module) -> list[FSDPModule]:
    """Return the outermost sharded modules."""
    if isinstance(model, FSDPModule):
        return [model]
    return [root for child in model.children() for root in sharded_roots(child)]


def visit_full_tensors(
    named: Iterable[tuple[str, torch.Tensor]], visit: Callable[[str, torch.Tensor], None] | None
) -> None:
    """Gather possibly sharded tensors, one after the other, and visit each (collective).

    Args:
        named: The tensors by name, in the same order on all ranks.
        visit: Called with the name of each and all of it; None only takes part. If it raises an error, the remaining
            tensors are gathered before that is raised, since the other ranks wait for this one.
    """
    problem: Exception | None = None
    for name, tensor in named:
        whole = full_tensor(tensor.detach())
        if visit is not None and problem is None:
            try:
                visit(name, whole)
            except Exception as error:
                problem = error
    if problem is not None:
        raise problem


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a possibly sharded tensor (collective)."""
    whole_tensor: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole_tensor
