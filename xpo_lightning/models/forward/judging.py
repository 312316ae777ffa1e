"""A model in the state in which its numbers are judged: at rest, in float32, with no more layers than needed."""

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
    """Switch off dropout and gradients."""
    with torch.no_grad(), eval_mode(model):
        yield


def is_coarse(model: nn.Module) -> bool:
    """Tell whether a model computes in less than float32 here, by its weights or by autocast."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    device = next(model.parameters()).device.type
    return torch.is_autocast_enabled(device) or any(weight.dtype.itemsize < 4 for weight in weights)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[bool]:
    """Compute in float32 for a while, where no tensor of the model is quantized; tells whether that is so.

    Each weight comes back as it was: it is put aside, not converted back.
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
    """Keep a GPU from rounding factors to 10 bits, which it does in convolutions by default."""
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
    """Leave out the last layers of a model, as long as one of each kind is left; tells whether any was.

    Layers are of a kind if they are alike in classes, shapes and settings, and in what the config says of each layer.
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
    """Count the first layers that hold one of each kind."""
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
