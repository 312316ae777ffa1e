"""Controls the random numbers that a model draws in training, for dropout or expert routing, say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.models.adapters import is_lora_layer
from xpo_lightning.models.forward.causal_forward import last_features, positions_from

DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_TOKENS = 8


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the probability of every dropout module, and every dropout probability that a layer keeps as a number."""
    for module in model.modules():
        if isinstance(module, DROPOUTS):
            module.p = probability
    _set_numbers(model, "dropout", probability)


def keep_all_layers(model: nn.Module) -> None:
    """Disable layer dropping in training: in every layer, completions attend to the keys and values of their prompt."""
    _set_numbers(model, "layerdrop", 0.0)


def _set_numbers(model: nn.Module, word: str, number: float) -> None:
    """Set the attributes that hold a number and whose name contains a word."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if word in name and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(module, name, number)


@torch.no_grad()
def stop_random_draws(model: nn.Module) -> list[str]:
    """Run modules that draw random numbers in eval mode from now on, except adapters' dropout.

    Forward passes of a few tokens find these modules, until none draws.

    Args:
        model: A causal language model in train mode, on its device. With sharded weights this is collective.

    Returns:
        The names of their classes.

    Raises:
        InputError: A module draws in eval mode as well.
    """
    stopped: dict[nn.Module, None] = {}
    while drawing := _find_drawing(model):
        for module in drawing:
            if module in stopped:
                raise InputError(
                    f"model.policy.dropout: {type(module).__name__} draws random numbers even in eval mode, so the "
                    f"policy cannot be trained without noise; set model.policy.dropout to null to train with it"
                )
            module.register_forward_pre_hook(_enter_eval_mode)
            module.register_forward_hook(_leave_eval_mode, always_call=True)
            stopped[module] = None
    return sorted({type(module).__name__ for module in stopped})


def _enter_eval_mode(module: nn.Module, _: Any) -> None:
    """Put a module into eval mode for a call; its submodules keep their mode."""
    module._mode_outside = module.training  # type: ignore[assignment]
    module.training = False


def _leave_eval_mode(module: nn.Module, _: Any, __: Any) -> None:
    """Restore the mode before the call, from which other code knows that the model trains."""
    module.training = module._mode_outside  # type: ignore[assignment]


def _find_drawing(model: nn.Module) -> list[nn.Module]:
    """Run a model and return the modules that drew random numbers themselves, not through a submodule."""
    device = next(model.parameters()).device
    ids = torch.arange(_TOKENS, device=device)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    found: dict[nn.Module, None] = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _watched(model, device, found):
        last_features(model, ids, mask, positions_from(mask), 1)
    layers = [layer for layer in model.modules() if is_lora_layer(layer)]
    wanted = {module for layer in layers for module in layer.lora_dropout.modules()}
    return [module for module in found if module not in wanted]


@contextmanager
def _watched(model: nn.Module, device: torch.device, found: dict[nn.Module, None]) -> Iterator[None]:
    """Add each module that advances the random generators to `found`.

    The generators' state is restored after such a module, so that the modules around it are added only if they draw
    themselves.
    """
    before: list[list[Tensor]] = []

    def enter(module: nn.Module, _: Any) -> None:
        before.append(_random_states(device))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        states = before.pop()
        if not all(map(torch.equal, states, _random_states(device))):
            _set_random_states(device, states)
            found[module] = None

    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


def _set_random_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
