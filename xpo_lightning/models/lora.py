"""LoRA adapters: finds the layers that can have them, and casts their weights during a computation."""

import inspect
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xpo_lightning.models.adapters import is_adapted_layer, is_lora_layer, is_lora_parameter
from xpo_lightning.models.forward.causal_forward import is_checkpointing


@contextmanager
def cast_lora_weights(model: nn.Module) -> Iterator[None]:
    """Cast adapter weights to the model's dtype once, instead of the activations at every layer.

    peft keeps the adapters of a bfloat16 model in float32 for training, and casts the input and the output of each,
    which costs more than the adapters themselves. Gradients flow to the float32 weights.

    Args:
        model: Any model. Adapters that are sharded or have the model's dtype are left alone. So are those of a
            parameter that holds many experts: peft adds them to the parameter itself, and casts no activations.
    """
    swapped: list[tuple[nn.Module, nn.Parameter]] = []
    # Layers recomputed in the backward pass must find the same adapter weights there.
    again = torch.is_grad_enabled() and is_checkpointing(model)
    for layer in [] if again else model.modules():
        if is_lora_layer(layer) and not is_lora_parameter(layer):
            dtype = layer.get_base_layer().get_parameter("weight").dtype
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                weight = matrix._parameters["weight"]
                if not isinstance(weight, nn.Parameter) or isinstance(weight, DTensor):
                    continue
                if weight.dtype != dtype and dtype.is_floating_point:
                    swapped.append((matrix, weight))
                    matrix._parameters["weight"] = _converted(matrix, weight, dtype)
    try:
        yield
    finally:
        for matrix, weight in swapped:
            matrix._parameters["weight"] = weight


def shares_adapted_weights(model: nn.Module) -> bool:
    """Tell whether a weight with adapters is tied to another layer, so that merging would change both."""
    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    layers = [layer.get_base_layer() for layer in model.modules() if is_adapted_layer(layer)]
    return any(owners[id(weight)] > 1 for layer in layers for weight in layer.parameters(recurse=False))


def find_unsuitable_linears(model: nn.Module) -> dict[str, str]:
    """Find linear layers whose adapters would fail or have no effect.

    Args:
        model: A model without adapters.

    Returns:
        The reason for each layer, by its full name.
    """
    reasons = {}
    fits: dict[type[nn.Module], bool] = {}
    for prefix, parent in model.named_modules():
        for name, layer in parent.named_children():
            if not isinstance(layer, nn.Linear):
                continue
            kind, full = type(layer), f"{prefix}.{name}".removeprefix(".")
            if kind not in fits:
                fits[kind] = _maps_rows(layer)
            if not fits[kind]:
                reasons[full] = f"{kind.__name__} returns something else than a linear layer does"
            elif _is_passed_by(parent, name):
                reasons[full] = f"{type(parent).__name__} multiplies with its weight itself"
    return reasons


@torch.no_grad()
def _maps_rows(layer: nn.Linear) -> bool:
    """Test whether a subclass of `nn.Linear` maps rows as `nn.Linear` does; a router returns several tensors."""
    if type(layer).forward is nn.Linear.forward or not layer.weight.is_floating_point():
        return True  # Weights that are no floats are quantized, by a library that peft knows.
    rows = torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    try:
        with torch.random.fork_rng([rows.device] if rows.device.type == "cuda" else []):
            mapped = layer(rows)
    except Exception:  # A layer that fails on rows, in whatever way, is no plain linear layer.
        return False
    return isinstance(mapped, torch.Tensor) and mapped.shape == (1, layer.out_features)


def _is_passed_by(parent: nn.Module, name: str) -> bool:
    """Tell whether a module's code reads a layer's weight without calling the layer, as Mamba's fused kernels do."""
    try:
        code = inspect.getsource(type(parent))
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{name}\.weight\b(?!\[|\.(dtype|device|shape)\b)", code) is not None


_copies: "weakref.WeakKeyDictionary[nn.Module, Tensor]" = weakref.WeakKeyDictionary()


def _converted(matrix: nn.Module, weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Cast a weight; without gradients, into a buffer that is kept, so that captured steps can read it again."""
    if torch.is_grad_enabled():
        return weight.to(dtype)  # type: ignore[return-value]  # a tensor with a history, where a leaf is expected
    copy = _copies.get(matrix)
    if copy is None or (copy.dtype, copy.shape, copy.device) != (dtype, weight.shape, weight.device):
        with torch.inference_mode(False):
            _copies[matrix] = copy = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    return copy.copy_(weight)  # type: ignore[return-value]
