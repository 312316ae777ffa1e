"""The frozen reference that the policy is compared with."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xpo_lightning.core.checks import check_range
from xpo_lightning.core.fingerprint import fingerprint
from xpo_lightning.models.forward.causal_forward import base_of, eval_mode
from xpo_lightning.models.snapshot import Snapshot


@dataclass(frozen=True)
class ReferenceRefresh:
    """Lets the reference follow the policy, as iterative DPO does; Algorithm 1 of XPO keeps it where it was.

    Validation still compares with the first reference, so that its numbers can be compared over the run.

    Args:
        every: Batches (rollouts with the updates on them) from one refresh to the next.
        mix: The reference's weights become (1 - mix) times themselves plus mix times the policy's: 1 copies the policy,
            less is an exponential moving average.

    Raises:
        InputError: A value is out of range.
    """

    every: int
    mix: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("model.reference_refresh.every", self.every, least=1)
        check_range("model.reference_refresh.mix", self.mix, above=0, most=1)


class Reference(nn.Module):
    """The frozen reference: a copy of the untrained policy or, with adapters, the policy with its adapters off.

    Args:
        policy: The policy before training, with adapters if it has them.
        refresh: How training's reference follows the policy; None keeps it frozen.

    Attributes:
        is_offloaded: Whether the weights stay in main memory when the module moves to a device.
    """

    is_offloaded = False

    def __init__(self, policy: nn.Module, refresh: ReferenceRefresh | None = None) -> None:
        super().__init__()
        has_adapters = hasattr(policy, "disable_adapter")
        self.frozen = None if has_adapters else copy.deepcopy(policy).eval().requires_grad_(False)
        self.refresh = refresh
        self.refreshed: Snapshot | None = None
        self._policy = (policy,)  # In a tuple, or it would be registered a second time.

    def train(self, mode: bool = True) -> "Reference":
        """Stay in eval mode: with dropout, the log-probabilities that the policy is compared with would be random."""
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> "Reference":
        return self if self.is_offloaded else super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Snapshot the untrained policy, if the reference is to be refreshed; call it before training."""
        if self.refresh is not None:
            self.refreshed = Snapshot(self._policy[0], torch.float32 if self.refresh.mix < 1 else None)

    def lent(self, *, first: bool = False) -> AbstractContextManager[nn.Module]:
        """Lend the reference model in eval mode. While it is lent, the policy must not be used.

        Args:
            first: Whether to lend the reference that the run began with, without later refreshes.
        """
        refreshed = None if first else self.refreshed
        return self._first() if refreshed is None else refreshed.lent(self._policy[0])

    def after_batch(self, batches: int) -> None:
        """Refresh the reference if the number of finished batches is a multiple of `refresh.every`.

        Args:
            batches: Batches that the run has finished.
        """
        if self.refresh is not None and self.refreshed is not None and batches % self.refresh.every == 0:
            self.refreshed.take(self._policy[0], self.refresh.mix)

    def identity(self, spec: Any) -> dict[str, Any]:
        """Return the path and revision of a `ModelSpec` or `LoadedModel`, and the fingerprint of the weights."""
        return {"path": spec.path, "revision": spec.revision, "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """Return the fingerprint of the first reference's weights, which training does not change."""
        return base_fingerprint(self._policy[0] if self.frozen is None else self.frozen)

    @contextmanager
    def _first(self) -> Iterator[nn.Module]:
        if self.frozen is not None:
            yield self.frozen
            return
        policy = self._policy[0]
        with eval_mode(policy), policy.disable_adapter():  # type: ignore[operator]
            yield policy


def base_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of a model's weights without those of its adapters."""
    weights = base_of(model).named_parameters()
    return fingerprint((name.replace(".base_layer", ""), value) for name, value in weights if "lora_" not in name)
