"""One call of a causal language model on rows that are padded on the left."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Cache


def positions_from(mask: Tensor) -> Tensor:
    """Number the real tokens of each row from 0; padding on the left gets 0, shape (B, L) as the mask."""
    return (mask.long().cumsum(1) - 1).clamp_(min=0)


def last_logits(
    model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, keep: int, cache: Cache | None = None
) -> Tensor:
    """Run a causal language model and return the logits of the last positions.

    Position ids are always passed: with padding on the left, a model with learned positions is wrong without them.

    Args:
        model: A transformers causal language model, with or without adapters.
        ids: Token ids of the new positions. (B, L)
        mask: True on real tokens, cached positions included. (B, cached + L)
        positions: Position ids of the new tokens. (B, L)
        keep: How many of the last positions to return logits for.
        cache: Keys and values of earlier positions, extended in place; None runs without a cache.

    Returns:
        Logits. (B, keep, V)
    """
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": cache is not None}
    if cache is not None:
        arguments["past_key_values"] = cache
    accepted = _parameters_of_forward(model)
    if "position_ids" in accepted:
        arguments["position_ids"] = positions
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = keep
    logits: Tensor = model(**arguments).logits
    return logits[:, -keep:]


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


def _parameters_of_forward(model: nn.Module) -> frozenset[str]:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return frozenset(inspect.signature(base.forward).parameters)
