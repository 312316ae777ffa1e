"""Remembers what probing a model has found, for models that equal it: a reference needs no probe of its own."""

import hashlib
from collections.abc import Callable, Hashable, Iterator
from itertools import chain
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from xpo_lightning.models.forward.truth import FAILURES
from xpo_lightning.models.sharding import is_sharded

_SETTINGS = (bool, int, float, str, torch.dtype, torch.device, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_found: dict[Hashable, str | None] = {}


def remember(identity: Hashable | None, question: Hashable, probe: Callable[[], str | None]) -> str | None:
    """Return what a probe finds; do not probe again if this model, or one that equals it, was asked the same before.

    Args:
        identity: What `identity_of` returns of the model that is probed.
        question: What is asked of it.
        probe: Probes the model; returns what is wrong, or None.
    """
    if identity is None:
        return probe()
    key = (identity, question)
    if key not in _found:
        _found[key] = probe()
    return _found[key]


def identity_of(model: nn.Module) -> Hashable | None:
    """Return what two models share if they have the same code, settings and weights, and compute in the same precision.

    Returns:
        None if code may run that does not belong to the classes of its modules, or if its weights cannot be read.
    """
    if is_sharded(model) or any("forward" in vars(one) or any(vars(one)[h] for h in _HOOKS) for one in model.modules()):
        return None
    tensors = [tensor for _, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.numel()]
    try:
        numbers = [number for tensor in tensors for number in _numbers_of(tensor)]
        values = torch.stack(numbers).tolist() if numbers else []
    except FAILURES:
        return None
    device = tensors[0].device.type if tensors else "cpu"
    precision = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    shapes = [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in model.named_parameters()]
    configs: dict[int, str] = {}
    settings = [(name, _settings_of(module, configs)) for name, module in model.named_modules()]
    text = repr((precision, shapes, settings, [number.hex() for number in values]))
    return hashlib.sha256(text.encode()).hexdigest(), tuple(dict.fromkeys(_code_of(model)))


def _code_of(model: nn.Module) -> Iterator[Any]:
    """Yield the classes of a model's modules, their `forward`, and functions that the modules hold."""
    for module in model.modules():
        yield type(module)
        yield type(module).forward
        yield from (one for one in vars(module).values() if isinstance(one, FunctionType | BuiltinFunctionType | type))


def _settings_of(module: nn.Module, configs: dict[int, str]) -> list[tuple[str, str]]:
    """List the settings of a module and of its config, apart from the mode, which a probe sets itself.

    Args:
        module: The module.
        configs: Texts of configs by their `id`, which this adds to: the modules of a model share one config.
    """
    named = {name: value for name, value in vars(module).items() if name != "training"}
    found = [(name, _text_of(value)) for name, value in named.items() if _is_setting(value)]
    for name, value in named.items():
        if hasattr(value, "to_dict"):
            if id(value) not in configs:
                configs[id(value)] = _text_of(value.to_dict()) + str(getattr(value, "_attn_implementation", None))
            found.append((name, configs[id(value)]))
    return found


def _text_of(value: Any) -> str:
    """Write a value so that equal ones read the same; the order of a set is not its own."""
    if isinstance(value, dict):
        return str([(repr(name), _text_of(one)) for name, one in value.items()])
    if isinstance(value, list | tuple | set | frozenset):
        texts = map(_text_of, value)
        return str(sorted(texts) if isinstance(value, set | frozenset) else list(texts))
    return repr(value)


def _is_setting(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_setting(one) for one in chain(value, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_setting(one) for one in value)
    return isinstance(value, _SETTINGS)


@torch.no_grad()
def _numbers_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the sum of a tensor, its first and its last number."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    yield tensor.sum(dtype=torch.float32).cpu().double()
    for place in (0, -1):
        yield tensor[(place,) * tensor.ndim].cpu().double()
