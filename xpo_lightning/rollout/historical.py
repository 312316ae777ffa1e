"""A sampler that draws from all earlier iterates of the policy: historical sampling."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import Completions
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.rng import RolloutRNG, Stream
from xpo_lightning.models.snapshot import Snapshot
from xpo_lightning.rollout.context import RolloutContext
from xpo_lightning.rollout.samplers import Sampler


class HistoricalPolicySampler(Sampler):
    """One of the policy's iterates so far, drawn uniformly for each batch, writes the second completion.

    Historical sampling (Xie et al. 2024, arXiv 2405.21046, Algorithm 3). The first iterate is the untrained policy, the
    last one the policy as it was when the iteration began. At most `keep` are held, a reservoir (Vitter 1985): each
    iterate so far is in it with the same probability, so that a draw from it is one from all of them. They are in the
    CPU's memory and in checkpoints, each as large as the trained weights.

    It is longer than other samplers: what it holds is bounded, and goes on with a resumed run.

    Args:
        every: Number of batches (rollouts with the updates on them) in an iteration.
        keep: Most iterates that are held.

    Raises:
        InputError: `every` or `keep` is below 1.
    """

    def __init__(self, every: int = 1, keep: int = 8) -> None:
        check_range("model.sampler.init_args.every", every, least=1)
        check_range("model.sampler.init_args.keep", keep, least=1)
        self.every, self.keep, self.kept_policies = every, keep, keep

    def begin(self, policy: nn.Module) -> None:
        """Hold the untrained policy alone."""
        self.held, self.chosen, self.seed = [_copied(policy)], 0, torch.initial_seed()

    def after_batch(self, batches: int, policy: nn.Module) -> None:
        """At the end of an iteration, offer the policy to the reservoir; then draw the next batch's sampler."""
        into, of = RolloutRNG(self.seed, Stream.SAMPLER, batches).uniforms(1, 2)[0].tolist()
        if batches % self.every == 0:
            place = int(into * (batches // self.every + 1))  # of as many iterates
            if len(self.held) < self.keep:
                self.held.append(_copied(policy))
            elif place < self.keep:
                self.held[place] = _copied(policy)
        self.chosen = int(of * len(self.held))

    def write(self, context: RolloutContext, uniforms: Sequence[Tensor]) -> list[Completions]:
        """See `Sampler.write`."""
        return context.generate_with(self.held[self.chosen].lent(context.policy), uniforms)

    def state(self) -> dict[str, Any]:
        """Return the iterates that are held, and which of them writes next."""
        return {**super().state(), "held": [one.state() for one in self.held], "chosen": self.chosen}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the iterates."""
        if "held" not in state:
            raise InputError(
                f"model.sampler is HistoricalPolicySampler, but the checkpoint was made with {state['class']}, so no "
                f"earlier policies are known; resume with that, or begin a new run from the exported policy"
            )
        if len(state["held"]) > self.keep:
            raise InputError(
                f"ckpt_path: the checkpoint holds {len(state['held'])} earlier policies, and "
                f"model.sampler.init_args.keep is {self.keep}; resume with the keep that it was made with"
            )
        self.held, self.chosen = [copy.copy(self.held[0]) for _ in state["held"]], state["chosen"]
        for one, weights in zip(self.held, state["held"], strict=True):
            one.load_state(weights, "model.sampler")


def _copied(policy: nn.Module) -> Snapshot:
    return Snapshot(policy, device=torch.device("cpu"))
