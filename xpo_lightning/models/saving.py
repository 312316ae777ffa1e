"""Saves a policy as a folder that transformers loads, atomically."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from xpo_lightning.core.atomic_files import replacing_folder
from xpo_lightning.core.errors import InputError
from xpo_lightning.models.adapters import is_peft_model
from xpo_lightning.models.lora import shares_adapted_weights

MODEL_FILES = ("config.json", "adapter_config.json")
CALLBACK, APART = "trainer.callbacks: PolicyExport", "set merge_adapters to false"

if TYPE_CHECKING:
    from peft import PeftModel


def save_policy(policy: nn.Module, tokenizer: Any, target: Path, merge_adapters: bool, card: str) -> None:
    """Save a policy so that transformers loads it.

    Args:
        policy: A transformers causal language model, with adapters or without. It is left as it was.
        tokenizer: Its tokenizer.
        target: The folder. If it exists it is replaced once the new one is complete.
        merge_adapters: Merge adapters into a copy and save that, rather than the adapters alone.
        card: Text of the README.
    """
    check_replaceable(target)
    model: Any = merged_copy(policy) if merge_adapters and is_peft_model(policy) else policy
    with replacing_folder(target) as folder, _cached_generation(model):
        if is_peft_model(model):
            # The embeddings are the base model's own; by default peft would ask the hub to find that out.
            model.save_pretrained(str(folder), save_embedding_layers=False)
            model.generation_config.save_pretrained(folder)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def merged_copy(policy: "PeftModel") -> nn.Module:
    """Merge the adapters into a copy in main memory.

    Merging in place and unmerging would leave rounding errors in the weights, and a copy on the device might not fit.
    """
    copies = {id(weight): nn.Parameter(weight.detach().to("cpu", copy=True), False) for weight in policy.parameters()}
    return copy.deepcopy(policy, copies).cpu().merge_and_unload()  # type: ignore[no-any-return]


def can_merge(policy: Any) -> bool:
    """Tell whether adapters can be merged into the policy's weights without a loss; False if it has none."""
    if not is_peft_model(policy):
        return False
    is_quantized = getattr(policy.get_base_model(), "quantization_method", None) is not None
    return not is_quantized and not shares_adapted_weights(policy)


def check_exportable(policy: Any, merge_adapters: bool, who: str = CALLBACK, apart: str = APART) -> None:
    """Refuse a policy that cannot be saved faithfully.

    Args:
        policy: The policy.
        merge_adapters: Whether its adapters are to be merged.
        who: Who saves it, for the errors.
        apart: How to have the adapters alone saved, for the errors.

    Raises:
        InputError: It is no transformers model, adapters on tied or quantized weights would have to be merged, or
            transformers refuses the generation config.
    """
    if not hasattr(policy, "save_pretrained"):
        raise InputError(f"{who} saves transformers models, and {type(policy).__name__} is none")
    if is_peft_model(policy) and merge_adapters:
        if getattr(policy.get_base_model(), "quantization_method", None) is not None:
            raise InputError(
                f"{who} cannot merge adapters into quantized weights (model.policy.quantize) without a loss; {apart}"
            )
        if shares_adapted_weights(policy):
            raise InputError(
                f"model.lora.target_modules: adapters on weights that the model has in several places, as embeddings "
                f"that are tied to its output, cannot be merged, which {who} is to do; {apart}, or leave those layers "
                f"out"
            )
    with tempfile.TemporaryDirectory() as folder, _cached_generation(policy):
        try:
            policy.generation_config.save_pretrained(folder)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"model.policy: transformers will not save the generation config ({reason})") from error


@contextmanager
def _cached_generation(model: Any) -> Iterator[None]:
    """Switch the KV cache on in the configs while they are saved; sampling needs it, and training may disable it."""
    configs = (model.config, model.generation_config)
    switched_off = [config for config in configs if getattr(config, "use_cache", None) is False]
    for config in switched_off:
        config.use_cache = True
    try:
        yield
    finally:
        for config in switched_off:
            config.use_cache = False


def check_replaceable(target: Path, key: str = f"{CALLBACK}.folder") -> None:
    """Refuse to replace anything but an exported policy.

    Args:
        target: The folder.
        key: The option that names it, for the error.

    Raises:
        InputError: Something else is there.
    """
    if target.exists() and not any((target / name).is_file() for name in MODEL_FILES):
        raise InputError(f"{key}: '{target}' exists and is no exported policy; name another")
