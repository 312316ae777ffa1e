"""The frozen reference that the policy is compared with."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from xpo_lightning.forward import evaluating
from xpo_lightning.identity import fingerprint


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

    def identity(self, spec: Any) -> dict[str, Any]:
        """Say which reference this is: the path and revision of a `ModelSpec` or `LoadedModel`, and the weights."""
        return {"path": spec.path, "revision": spec.revision, "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """Return the fingerprint of the reference's weights, which is the same however the policy is trained."""
        model = self.frozen if self.frozen is not None else self._policy[0].get_base_model()  # type: ignore[operator]
        weights = model.named_parameters()
        return fingerprint((name.replace(".base_layer", ""), value) for name, value in weights if "lora_" not in name)
