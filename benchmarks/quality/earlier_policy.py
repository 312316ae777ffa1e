"""An engine that writes in this process with a copy of the policy, as an engine elsewhere has one."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from xpo_lightning import RolloutEngine
from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.rollout.engine import GenerationRequest


class EarlierPolicy(RolloutEngine):
    """Writes the policy's completions with the weights that it was sent last; the reference writes by itself.

    Args:
        sync_every: How many training batches are written with the same weights.
        ahead: 1 has the next batch written while this one is trained on.
    """

    copies_weights = True
    has_reference = takes_adapters = False

    def __init__(self, sync_every: int = 1, ahead: int = 0) -> None:
        super().__init__(None, sync_every, ahead)
        self._copy: nn.Module | None = None

    def sync(self, policy: nn.Module) -> None:
        """See `RolloutEngine.sync`."""
        if self._copy is None:
            self._copy = copy.deepcopy(policy).eval().requires_grad_(False)
        self._copy.load_state_dict(policy.state_dict())

    def write(self, prompts: Prompts, asked: Sequence[GenerationRequest]) -> list[list[Completions]]:
        """See `RolloutEngine.write`."""
        model: Any = self._copy
        return [self.rollout.write(model, prompts, each.uniforms) for each in asked]
