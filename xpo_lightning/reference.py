"""The frozen reference that the policy is compared with."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from xpo_lightning.forward import evaluating


class Reference(nn.Module):
    """The frozen reference: a copy of the untrained policy or, with adapters, the policy with its adapters off.

    Args:
        policy: The policy before training, with adapters if it has them.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        has_adapters = hasattr(policy, "disable_adapter")
        self.frozen = None if has_adapters else copy.deepcopy(policy).eval().requires_grad_(False)
        self._policy = (policy,)  # In a tuple, or it would be registered a second time.

    @contextmanager
    def lent(self) -> Iterator[nn.Module]:
        """Lend the reference model in eval mode. While it is lent, the policy's adapters are off."""
        if self.frozen is not None:
            yield self.frozen
            return
        policy = self._policy[0]
        with evaluating(policy), policy.disable_adapter():  # type: ignore[operator]
            yield policy

    def fingerprint(self) -> str:
        """Hash the names, shapes and first values of the weights.

        Two references that differ by training have two fingerprints; it is no guard against forgery.
        """
        digest = hashlib.sha256()
        model = self.frozen if self.frozen is not None else self._policy[0].get_base_model()  # type: ignore[operator]
        for name, weight in sorted(model.named_parameters()):
            if "lora_" not in name:
                head = weight.detach().flatten()[:256].float().cpu()
                digest.update(f"{name.replace('.base_layer', '')} {tuple(weight.shape)} ".encode())
                digest.update(head.numpy().tobytes())
        return digest.hexdigest()
