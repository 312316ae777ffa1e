"""Tells peft's models and layers apart without importing peft, which takes seconds that a run without adapters saves.

A module can be one of peft's only if peft has been imported.
"""

import sys
from typing import TYPE_CHECKING

from typing_extensions import TypeIs

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer


def is_peft_model(module: object) -> "TypeIs[PeftModel]":
    """Tell whether this is a model that peft has put adapters into."""
    return _is(module, "peft", "PeftModel")


def is_adapted_layer(module: object) -> "TypeIs[BaseTunerLayer]":
    """Tell whether this is a layer with adapters of any kind."""
    return _is(module, "peft.tuners.tuners_utils", "BaseTunerLayer")


def is_lora_layer(module: object) -> "TypeIs[LoraLayer]":
    """Tell whether this is a layer with low-rank adapters."""
    return _is(module, "peft.tuners.lora", "LoraLayer")


def is_lora_parameter(module: object) -> bool:
    """Tell whether this is a parameter with low-rank adapters, such as the experts of a layer."""
    return _is(module, "peft.tuners.lora.layer", "ParamWrapper")


def _is(module: object, package: str, name: str) -> bool:
    imported = sys.modules.get(package)
    return imported is not None and isinstance(module, getattr(imported, name))
