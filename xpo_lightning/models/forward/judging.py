"""Prepares a model for comparing outputs: eval mode, float32, no more layers than needed."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from xpo_lightning.models.forward.causal_forward import base_of, eval_mode


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients for a block."""
    with torch.no_grad(), eval_mode(model):
        yield


def is_coarse(model: nn.Module) -> bool:
    """Tell whether a model computes in a lower precision than float32, by its weights or by autocast."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    device = next(model.parameters()).device.type
    return torch.is_autocast_enabled(device) or any(weight.dtype.itemsize < 4 for weight in weights)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[bool]:
    """Compute in float32 for a block, unless the model is quantized; yields whether it does.

    Afterwards each weight is exactly as before: the original is kept and put back, not converted back.
    """
    tensors = list(chain(model.parameters(), model.buffers()))
    exact = all(tensor.is_floating_point() for tensor in model.parameters())
    aside = [(tensor, tensor.data) for tensor in tensors if exact and tensor.is_floating_point()]
    device = next(model.parameters()).device.type
    try:
        for tensor, data in aside:
            if data.dtype != torch.float32:
                tensor.data = data.float()
        with torch.autocast(device, enabled=False if exact else torch.is_autocast_enabled(device)), _without_tf32():
            yield exact
    finally:
        for tensor, data in aside:
            tensor.data = data


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Switch TF32 off for a block: it rounds factors to 10 bits, in convolutions by default."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@contextmanager
def shortened(model: nn.Module) -> Iterator[bool]:
    """Drop a model's last layers for a block, but keep one of each kind; yields whether any were dropped.

    Nothing is dropped if more than half of the layers would stay. Layers are of one kind if they agree in classes,
    shapes, settings and the config's values per layer.
    """
    layers = layer_list(model)
    if layers is not None and layers not in _kept:
        _kept[layers] = _layers_of_every_kind(layers, getattr(base_of(model), "config", None))
    keep = 0 if layers is None else _kept[layers]
    if layers is None or 2 * keep > len(layers):
        yield False
        return
    everything = layers._modules
    layers._modules = dict(list(everything.items())[:keep])
    try:
        yield True
    finally:
        layers._modules = everything


_kept: "weakref.WeakKeyDictionary[nn.ModuleList, int]" = weakref.WeakKeyDictionary()


def layer_list(model: nn.Module) -> nn.ModuleList | None:
    """Return the list of modules that holds most of a model's weights, the outermost of several."""
    lists = [module for module in base_of(model).modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda one: sum(weight.numel() for weight in one.parameters()), default=None)


def _layers_of_every_kind(layers: nn.ModuleList, config: Any) -> int:
    """Count how many of the first layers it takes to have one of each kind."""
    text: dict[str, Any] = {} if config is None else config.get_text_config(decoder=True).to_dict()
    of_each = [value for value in text.values() if isinstance(value, list | tuple) and len(value) == len(layers)]
    kinds = [(_kind(layer), repr([values[place] for values in of_each])) for place, layer in enumerate(layers)]
    return max(kinds.index(kind) for kind in kinds) + 1


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    settings = []
    for name, module in layer.named_modules():
        simple = [
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | None) and not key.endswith(("idx", "index", "layer_id"))
        ]
        settings.append((name, type(module), tuple(simple)))
    return tuple(settings), tuple((name, weight.shape) for name, weight in layer.named_parameters())
