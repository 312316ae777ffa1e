"""LoRA adapters in the type of the weights that they adapt, for the time of a computation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from xpo_lightning.forward.call import is_checkpointing


@contextmanager
def adapters_cast(model: nn.Module) -> Iterator[None]:
    """Convert adapters once, in place of the activations at every layer.

    peft keeps the adapters of a bfloat16 model in float32, to be trained, and converts what goes in and out of each of
    them, which costs more than the adapters. Gradients flow to the float32 weights.

    Args:
        model: Any model; without adapters, with ones of its own type, or with ones that are spread over processes,
            nothing is done.
    """
    swapped: list[tuple[nn.Module, nn.Parameter]] = []
    # What is computed again in the backward pass must find the same adapters there.
    again = torch.is_grad_enabled() and is_checkpointing(model)
    for layer in [] if again else model.modules():
        if isinstance(layer, LoraLayer):
            dtype = layer.get_base_layer().get_parameter("weight").dtype
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                weight = matrix._parameters["weight"]
                if not isinstance(weight, nn.Parameter) or isinstance(weight, DTensor):
                    continue
                if weight.dtype != dtype and dtype.is_floating_point:
                    swapped.append((matrix, weight))
                    matrix._parameters["weight"] = _converted(weight, dtype)
    try:
        yield
    finally:
        for matrix, weight in swapped:
            matrix._parameters["weight"] = weight


def _converted(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return weight.to(dtype)  # type: ignore[return-value]  # a tensor with a history, where a leaf is expected
