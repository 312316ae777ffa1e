"""The pair of completions whose losses the tests work out by hand, and the losses by name."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from xpo_lightning import Pair
from xpo_lightning.losses.preference import DPOPositiveLoss, HingeLoss, IPOLoss, PreferenceLoss, RobustLoss, SigmoidLoss
from xpo_lightning.losses.xpo import XPOLoss, xpo_loss

LOSSES = {
    "sigmoid": SigmoidLoss,
    "ipo": IPOLoss,
    "hinge": HingeLoss,
    "robust": partial(RobustLoss, 0.2),
    "positive": partial(DPOPositiveLoss, 3.0),
}


def leaf(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def worked(label: float, loss: PreferenceLoss, **options: Any) -> tuple[XPOLoss, Pair[Tensor]]:
    """Evaluate the pair of the tests' docstrings: log-ratios -10 + 12 = 2 and -20 + 15 = -5, so a margin of 7."""
    policy = Pair(leaf([-10.0]), leaf([-20.0]))
    reference = Pair(torch.tensor([-12.0], dtype=torch.float64), torch.tensor([-15.0], dtype=torch.float64))
    options = {"alpha": 0.01, "beta": 0.1, **options}
    silent = torch.tensor([options.pop("silent", False)])
    labels = torch.tensor([label], dtype=torch.float64)
    return xpo_loss(policy, reference, labels, silent, preference_loss=loss, **options), policy
