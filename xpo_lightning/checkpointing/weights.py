"""Selects the trained weights for a checkpoint, and checks a checkpoint against the model and its reference."""

from typing import Any

from torch import Tensor, nn

from xpo_lightning.core.errors import InputError


def trained_state(state: dict[str, Tensor], policy: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the entries that a checkpoint needs: the policy's, without its frozen weights.

    Args:
        state: State dict of the Lightning module.
        policy: The policy.
        prefix: Prefix of the policy's entries.

    Returns:
        The entries of the policy's trained weights and of its buffers.
    """
    # Tied weights have several names, and each is in the state.
    weights = policy.named_parameters(remove_duplicate=False)
    frozen = {prefix + name for name, weight in weights if not weight.requires_grad}
    # The quantization state of a weight has entries below the weight's name.
    belonging = tuple(f"{name}." for name in frozen)
    own = {name: value for name, value in state.items() if name.startswith(prefix) and name not in frozen}
    return {name: value for name, value in own.items() if not name.startswith(belonging)}


def let_frozen_be_missing(module: nn.Module, keys: Any) -> None:
    """Let a state dict lack what the module's own one leaves out; a hook behind `load_state_dict`.

    What copies the module, such as an average of its weights, or contains it, loads strictly.

    Args:
        module: The Lightning module.
        keys: `missing_keys` and `unexpected_keys` of all that is loaded, to be changed in place.
    """
    if not keys.missing_keys:
        return
    left_out = tuple(f".{name}" for name in nn.Module.state_dict(module).keys() - module.state_dict().keys())
    keys.missing_keys[:] = [name for name in keys.missing_keys if not f".{name}".endswith(left_out)]


def check_trained_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that lacks trained weights, or has those of another model.

    Raises:
        InputError: Names or shapes differ.
    """
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or unknown:
        raise InputError(
            f"ckpt_path: the checkpoint does not belong to this model: {len(missing)} weights are missing from it "
            f"{missing[:3]} and {len(unknown)} are unknown {unknown[:3]}; resume with the model.policy and model.lora "
            f"that it was saved with"
        )
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise InputError(
                f"ckpt_path: '{name}' has shape {tuple(state[name].shape)} in the checkpoint, but {tuple(value.shape)} "
                f"in this model; resume with the model.policy and model.lora that it was saved with"
            )


def check_reference(saved: dict[str, Any] | None, current: dict[str, Any]) -> None:
    """Refuse to resume with another reference than the one that the checkpoint was trained against.

    Raises:
        InputError: The reference's weights differ.
    """
    if saved is not None and saved["fingerprint"] != current["fingerprint"]:
        raise InputError(
            f"ckpt_path: the checkpoint was trained against the reference '{saved['path']}' (revision "
            f"{saved['revision']}), but model.policy.path='{current['path']}' (revision {current['revision']}) "
            f"has other weights; name the model it was trained from"
        )
