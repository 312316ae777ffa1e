"""Runs a causal language model once on padded rows."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from xpo_lightning.models.forward.cpu_attention import fast_attention
from xpo_lightning.models.forward.norms import fast_norms


def positions_from(mask: Tensor) -> Tensor:
    """Number the real tokens of each row from 0; padding on the left gets 0, shape (B, L) as the mask."""
    return (mask.long().cumsum(1) - 1).clamp_(min=0)


def last_features(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    keep: int,
    *,
    cache: "Cache | OwnState | None" = None,
    head: nn.Linear | None = None,
) -> Tensor:
    """Run a causal language model and return hidden states or logits at the last positions.

    On left-padded rows, a model with learned positions is wrong without position ids.

    Args:
        model: A transformers causal language model, with or without adapters.
        ids: Token ids of the new positions. (B, L)
        mask: True on real tokens, cached positions included (B, C + L); None if a token may see all before it.
        positions: Position ids of the new tokens (B, L); None leaves them to the model.
        keep: How many of the last positions to return, at least 1.
        cache: Keys and values of C earlier positions, or the model's own state after them, extended in place; None
            runs without a cache.
        head: The model's vocabulary head, if it is to be skipped; the model must return the head's output unchanged.

    Returns:
        The head's inputs (B, keep, D) or, without `head`, logits (B, keep, V).
    """
    forward = base_of(model).forward
    accepted = _parameters_of(getattr(forward, "__func__", forward))
    possible: dict[str, Any] = {"position_ids": positions, "logits_to_keep": keep, "use_cache": cache is not None}
    arguments = {name: value for name, value in possible.items() if name in accepted}
    arguments |= {"input_ids": ids, "attention_mask": None if mask is None else mask.long()}
    if isinstance(cache, OwnState):
        arguments |= {"use_cache": True, **cache.kept}
    elif cache is not None:
        arguments |= {"use_cache": True, "past_key_values": cache}
    with nullcontext() if head is None else _left_out(head), _kernels_for(model, ids, cache):
        output = model(**arguments)
    if isinstance(cache, OwnState):
        cache.keep(output, accepted)
    features: Tensor = output.logits[:, -keep:]
    # Some models finally cast logits, which here are the head's inputs, to float32.
    has_grown = head is not None and features.dtype == torch.float32 and not torch.is_autocast_enabled(ids.device.type)
    return features.to(head.weight.dtype) if head is not None and has_grown else features


class OwnState:
    """A model's own cache: outputs to pass to its next call, such as keys and values, or a recurrent state.

    Outputs are recognised by name: those that are also parameters of `forward`, except logits, loss and the like.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def keep(self, output: Any, accepted: frozenset[str]) -> None:
        """Keep the state in a model's output for its next call.

        Args:
            output: The model's output, a mapping.
            accepted: The parameters of its `forward`.

        Raises:
            NotImplementedError: The output holds no state.
        """
        given = {name: value for name, value in output.items() if value is not None}
        self.kept = {name: given[name] for name in given.keys() & accepted - _NO_STATE}
        if not self.kept:
            raise NotImplementedError("the model keeps no state to go on from")


_NO_STATE = {"logits", "hidden_states", "attentions", "loss", "labels"}


def base_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a model with adapters, and any other model itself."""
    wrapped = hasattr(model, "get_base_model")
    return cast("nn.Module", model.get_base_model()) if wrapped else model  # type: ignore[operator]


def is_checkpointing(model: nn.Module) -> bool:
    """Tell whether a model has gradient checkpointing (activation checkpointing, in newer words) switched on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every submodule back into its own mode afterwards.

    Sampling in train mode would apply dropout, and with gradient checkpointing would also lose the cache and write
    wrong tokens.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _kernels_for(model: nn.Module, ids: Tensor, cache: "Cache | OwnState | None") -> Iterator[None]:
    """Choose attention and norms; layers recomputed in the backward pass keep the model's own in both passes."""
    is_shape_fixed = getattr(cache, "column", None) is not None
    if torch.is_grad_enabled() and is_checkpointing(model):
        yield
    elif is_shape_fixed:  # The code that captures the call chooses its norms.
        with fast_attention(ids.device, is_shape_fixed=True):
            yield
    else:
        with fast_attention(ids.device), fast_norms(model, ids.device):
            yield


@contextmanager
def _left_out(head: nn.Module) -> Iterator[None]:
    """Replace a layer by the identity for a block."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


@lru_cache(maxsize=64)
def _parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
