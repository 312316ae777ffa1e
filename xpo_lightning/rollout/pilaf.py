"""A sampler of both completions, from the policy moved away from the reference and towards it: PILAF."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xpo_lightning.core.batch import Completions
from xpo_lightning.core.checks import check_range
from xpo_lightning.rollout.context import RolloutContext
from xpo_lightning.rollout.samplers import Sampler


class PILAFSampler(Sampler):
    """For half of the prompts, pi^(1 + beta) / ref^beta and pi^(1 - beta) ref^beta write a pair, else the policy does.

    These are the policy times exp(r) and exp(-r), r = beta log pi/ref, token by token (Feng et al. 2025, arXiv
    2502.04270, PILAF). The first is on the policy's side of the pair. A coin for each prompt decides. Both models read
    each prompt and each token, so it costs as much as both writing two completions.

    Args:
        beta: How far from the policy the two are; the paper has `model.beta`.

    Raises:
        InputError: `beta` is not above 0, or infinite.
    """

    writes_both = True

    def __init__(self, beta: float = 0.1) -> None:
        check_range("model.sampler.init_args.beta", beta, above=0, is_finite=True)
        self.beta = beta

    def write(self, context: RolloutContext, uniforms: Sequence[Tensor]) -> list[Completions]:
        """See `Sampler.write`; write the sampler's side with the first half of the numbers, and then the policy's."""
        *numbers, coins = uniforms
        share, half = torch.where(coins[:, 0] < 0.5, self.beta, 0.0), len(numbers) // 2
        towards = context.generate_with_mixture(numbers[:half], share)
        return towards + context.generate_with_mixture(numbers[half:], -share)
