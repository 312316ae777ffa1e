"""Reads from a model's config the lengths at which its behaviour may change: windows, chunks, context marks."""

import re
from typing import Any

from torch import nn

from xpo_lightning.models.forward.causal_forward import base_of
from xpo_lightning.models.forward.judging import layer_list

_NAMES = re.compile("window|chunk|original_max_position|local|span|floor|context|block|stride|reach")
"""Names of such settings; a length whose name is missing here is only probed later, once a row reaches it."""

BASE = 48
"""Tokens of the rows that are probed first."""
OPERATIONS = {"cpu": 1e11, "cuda": 1e13}
"""Most operations to spend on probing a config's lengths before any row reaches them, by type of device."""

MARGIN = 14
"""Tokens by which probed rows exceed a length."""
_COPIES = 30
"""Forward passes over the longest row, roughly, until a right way is found."""


def named_lengths(model: nn.Module) -> tuple[list[int], list[int]]:
    """Collect the integers in a model's config, nested settings included.

    Returns:
        Those whose name suggests a length, and all others, each in ascending order.
    """
    likely: set[int] = set()
    others: set[int] = set()

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}.{key}", inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                collect(name, inner)
        elif isinstance(value, int) and not isinstance(value, bool) and not name.endswith(("_id", "_ids", "_index")):
            (likely if _NAMES.search(name) else others).add(value)

    collect("", text_config(model))
    return sorted(likely), sorted(others - likely)


def context_length(model: nn.Module) -> int | None:
    """Return the most tokens that a model takes, or None where its config names no limit."""
    for name, module in model.named_modules():
        # RoBERTa's family numbers its positions from after the pad id.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return len(module.get_parameter("weight")) - int(padding) - 1
    config: Any = getattr(base_of(model), "config", None)
    return None if config is None else context_length_in(config)


def context_length_in(config: Any) -> int | None:
    """Return the most tokens that a model takes by its config, or None where that names no limit."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length and length > 0 else None


def vocabulary_size(config: Any) -> int | None:
    """Return how many tokens a model embeds by its config, or None where that does not say."""
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return int(size) if size else None


def special_tokens(model: nn.Module) -> set[int]:
    """Collect the token ids that a config names: padding, placeholders of images, and so on."""
    named = (value for name, value in text_config(model).items() if name.endswith(("_token_id", "_token_index")))
    return {token for value in named for token in (value if isinstance(value, list) else [value]) if token is not None}


def text_config(model: nn.Module) -> dict[str, Any]:
    """Return the config of a model, or of its text part, as a dict; empty if it has no config."""
    config: Any = getattr(base_of(model), "config", None)
    return {} if config is None else config.get_text_config(decoder=True).to_dict()


def first_reach(model: nn.Module) -> int:
    """Choose how long the first probed rows are: beyond each length that the config names, as far as that is cheap."""
    device = next(model.parameters()).device.type
    layers = layer_list(model)
    weights = sum(weight.numel() for weight in (model if layers is None else layers[0]).parameters())
    cheap = OPERATIONS.get(device, OPERATIONS["cuda"]) / (2 * weights * _COPIES)
    marks = [mark for mark in named_lengths(model)[0] if mark <= cheap]
    reach = max([BASE, *(mark + MARGIN for mark in marks)])
    longest = context_length(model)
    return reach if longest is None else min(reach, longest)
