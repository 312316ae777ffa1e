"""Clips of losses have two sides, each with the number worked by hand and no gradient beyond."""

import pytest
import torch

from xpo_lightning import FDivergenceLoss, Pair


@pytest.mark.parametrize(("label", "expected"), [(1.0, 0.0181499), (0.0, 4.0181499)])
def test_chi_squared_is_clipped_at_its_margin_either_way(label, expected):
    """Beta 0.5 times (e^2 + 2 - e^-1 + 1) = 5.01, clipped at 4: log(1 + e^-4); of the other order, log(1 + e^4)."""
    ratios = Pair(*(torch.tensor([value], requires_grad=True) for value in (2.0, -1.0)))
    loss = FDivergenceLoss("chi_squared", margin_clip=4.0)(ratios, torch.tensor([label]), 0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.sum().backward()
    assert (ratios.by_policy.grad.item(), ratios.by_sampler.grad.item()) == (0.0, 0.0)
