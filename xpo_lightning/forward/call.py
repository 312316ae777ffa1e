"""One call of a causal language model on padded rows."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from xpo_lightning.forward.attention import fast_attention


def positions_from(mask: Tensor) -> Tensor:
    """Number the real tokens of each row from 0; padding on the left gets 0, shape (B, L) as the mask."""
    return (mask.long().cumsum(1) - 1).clamp_(min=0)


def last_features(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    keep: int,
    *,
    cache: Cache | None = None,
    head: nn.Linear | None = None,
) -> Tensor:
    """Run a causal language model and return what it has at the last positions: hidden states, or logits.

    Position ids are always passed: with padding on the left, a model with learned positions is wrong without them.

    Args:
        model: A transformers causal language model, with or without adapters.
        ids: Token ids of the new positions. (B, L)
        mask: True on real tokens, cached positions included (B, C + L); None where each row may see all before it.
        positions: Position ids of the new tokens. (B, L)
        keep: How many of the last positions to return, at least 1.
        cache: Keys and values of C earlier positions, extended in place; None runs without a cache.
        head: The model's vocabulary head, where it is to be left out; its logits must be the model's.

    Returns:
        The head's inputs (B, keep, D) or, without `head`, logits (B, keep, V).
    """
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
    arguments["attention_mask"] = None if mask is None else mask.long()
    if cache is not None:
        arguments["past_key_values"] = cache
    accepted = _parameters_of_forward(model)
    if "position_ids" in accepted:
        arguments["position_ids"] = positions
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = keep
    with nullcontext() if head is None else _left_out(head), _attention_for(model, ids):
        features: Tensor = model(**arguments).logits
    return features[:, -keep:]


def base_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a model with adapters, and any other model itself."""
    wrapped = hasattr(model, "get_base_model")
    return cast("nn.Module", model.get_base_model()) if wrapped else model  # type: ignore[operator]


def is_checkpointing(model: nn.Module) -> bool:
    """Tell whether a model has gradient checkpointing (activation checkpointing, in newer words) switched on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
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


def _attention_for(model: nn.Module, ids: Tensor) -> AbstractContextManager[None]:
    """Choose the attention; layers that will be computed again in the backward pass must find the same then."""
    again = torch.is_grad_enabled() and is_checkpointing(model)
    return nullcontext() if again else fast_attention(ids.device)


@contextmanager
def _left_out(head: nn.Module) -> Iterator[None]:
    """Let a layer hand on what it is given."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


def _parameters_of_forward(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(base_of(model).forward).parameters)
