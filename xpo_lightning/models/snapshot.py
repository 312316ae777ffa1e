"""Earlier versions of the policy, stored as copies of its trainable weights only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.models.forward.causal_forward import eval_mode
from xpo_lightning.models.lora import cast_lora_weights


class Snapshot:
    """Copies of a policy's trainable weights.

    Args:
        policy: The policy to copy; with adapters, only their weights are copied.
        dtype: Type of the copies; None is that of the weights. An average needs float32: in bfloat16 small changes
            would be rounded away.
        device: Where the copies are; None is where the weights are.
    """

    def __init__(self, policy: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self.weights = {
            name: weight.detach().to(device or weight.device, dtype or weight.dtype, copy=True)
            for name, weight in _trained(policy).items()
        }

    def take(self, policy: nn.Module, mix: float = 1.0) -> None:
        """Set the copies to (1 - mix) times themselves plus mix times the policy's current weights."""
        for name, weight in _trained(policy).items():
            kept = self.weights[name].to(weight.device)
            self.weights[name] = kept.lerp_(weight.detach().to(kept.dtype), mix)

    @contextmanager
    def lent(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Lend the policy with the copied weights, in eval mode, without gradients; then restore its own weights."""
        # By name, which fails where other tensors stand for the weights, as in `cast_lora_weights`.
        trained = {name: policy.get_parameter(name) for name in self.weights}
        own = {name: weight.data for name, weight in trained.items()}
        for name, weight in trained.items():
            weight.data = self.weights[name].to(weight.device, weight.dtype)
        try:
            with torch.no_grad(), eval_mode(policy), cast_lora_weights(policy):
                yield policy
        finally:
            for name, weight in trained.items():
                weight.data = own[name]

    def state(self) -> dict[str, Tensor]:
        """Return the copies, for a checkpoint."""
        return {name: weight.cpu() for name, weight in self.weights.items()}

    def load_state(self, state: dict[str, Any], key: str) -> None:
        """Load the copies from a checkpoint.

        Args:
            state: The return value of `state`.
            key: The option that the copies belong to, for the error.

        Raises:
            InputError: Their names or shapes differ from the policy's.
        """
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        if {name: weight.shape for name, weight in state.items()} != shapes:
            raise InputError(f"ckpt_path: the checkpoint's weights for {key} do not fit the policy's")
        # Copied, because a checkpoint may be mapped from its file.
        self.weights = {name: state[name].to(weight.device, copy=True) for name, weight in self.weights.items()}


def _trained(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
