"""Computes the features of completions with each prompt encoded once, for all of its completions.

Features are the hidden states or logits at the positions that predict each token of a completion. Here these positions
attend to the prompt's cached keys and values, and gradients flow back through them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.models.forward.causal_forward import last_features, positions_from


def shared_features(
    model: nn.Module, prompts: Prompts, completions: Completions, head: nn.Linear | None, *, pads_right: bool
) -> Tensor:
    """Run each prompt once, and then its completions.

    Args:
        model: A transformers causal language model on the device of the prompts; it must take a cache of keys and
            values.
        prompts: B prompts.
        completions: K completions of each prompt; those of prompt b are rows b, B + b, and so on. (K * B rows)
        head: The vocabulary head, to get hidden states in place of logits.
        pads_right: Whether to pad prompts on the right, where causal attention needs no mask; needs a `head`.

    Returns:
        Features that predict each completion token: hidden states (K * B, T, D) or logits (K * B, T, V).
    """
    copies = len(completions) // len(prompts)
    cache = PromptCache()
    first, mask = run_prompts(model, prompts, cache, head, pads_right=pads_right)
    cache.copies = copies
    return run_completions(model, completions, first.repeat(copies, 1, 1), mask.repeat(copies, 1), cache, head)


def run_prompts(
    model: nn.Module, prompts: Prompts, cache: Cache, head: nn.Linear | None, *, pads_right: bool
) -> tuple[Tensor, Tensor]:
    """Encode prompts into a cache.

    Args:
        model: As in `shared_features`.
        prompts: B prompts.
        cache: Receives their keys and values.
        head: As in `shared_features`.
        pads_right: As in `shared_features`.

    Returns:
        The features of the last tokens (B, 1, F), and the mask of the cache (B, P).
    """
    if not pads_right:
        positions = positions_from(prompts.mask)
        return last_features(model, prompts.ids, prompts.mask, positions, 1, cache=cache, head=head), prompts.mask
    ids, mask = prompts.padded_right()
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    features = last_features(model, ids, None, positions, ids.shape[1], cache=cache, head=head)
    return features.take_along_dim(prompts.lengths[:, None, None] - 1, 1), mask


def run_completions(
    model: nn.Module, completions: Completions, first: Tensor, mask: Tensor, cache: Cache, head: nn.Linear | None
) -> Tensor:
    """Run completions with a cache that holds their prompts.

    Args:
        model: As in `shared_features`.
        completions: B completions.
        first: The features of the prompts' last tokens. (B, 1, F)
        mask: True on the prompts' tokens. (B, P)
        cache: The prompts' keys and values.
        head: As in `shared_features`.

    Returns:
        Features that predict each completion token. (B, T, F)
    """
    ids = completions.ids[:, :-1]  # the last token predicts nothing
    if ids.shape[1] == 0:
        return first
    seen = torch.cat([mask, completions.mask[:, :-1]], 1)
    positions = mask.sum(1)[:, None] + torch.arange(ids.shape[1], device=ids.device)
    return torch.cat([first, last_features(model, ids, seen, positions, ids.shape[1], cache=cache, head=head)], 1)


class PromptCache(Cache):
    """Keys and values of B prompts, which K * B completions share once `copies` is K.

    Layers with a sliding window keep all of them too: the mask takes care of the window.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)
        self.copies = 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the first call's keys and values (B, H, P, D); later calls return them with their own appended."""
        return super().update(key_states, value_states, layer_idx, self.copies)


class _Layer(DynamicLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        copies = args[0]
        return _appended(self.keys, key_states, copies), _appended(self.values, value_states, copies)


def _appended(old: Tensor, new: Tensor, copies: int) -> Tensor:
    """Append new states (K * B, H, N, D) to K copies of the old ones (B, H, P, D), in one copy of memory."""
    parts = [old.expand(copies, *old.shape), new.view(copies, *old.shape[:2], -1, old.shape[3])]
    return torch.cat(parts, 3).flatten(0, 1)
