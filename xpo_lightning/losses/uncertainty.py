"""DEPO's bonus: an upper confidence bound on pairs, from the hidden states of all pairs so far."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.bonus import Bonus, BonusInput, Scored


class DEPOBonus(Bonus):
    """DEPO's bonus: -b (log pi(y) + log pi(y')), b = scale / sqrt(K) |w|_(V^-1) without gradient, for a pair y, y'.

    w = [phi(y), phi(y')] are both completions' mean last hidden states, V = regularization I + the sum of w w^T over
    the pairs so far, and K the mean curvature s(beta m)(1 - s(beta m)) of the logistic loss at their margins m (Zhang
    et al. 2026, arXiv 2605.04477). So a positive alpha *raises* pairs unlike those seen before. b is the paper's, as a
    digest of it has it. Ours are the mean in K, that each phi is scaled to length 1, and how b enters the loss, as the
    policy gradient of its mean: docs/methods.md.

    It is longer than other bonuses: it has a matrix of (2 D)^2 float64 numbers, which learns and goes into checkpoints.

    Args:
        scale: beta_conf, the width of the confidence interval.
        regularization: What V is before the first pair, times the identity.

    Raises:
        InputError: A value is out of range.
    """

    needs_hidden = learns = True

    def __init__(self, scale: float = 0.02, regularization: float = 1.0) -> None:
        check_range("model.bonus.init_args.scale", scale, above=0, is_finite=True)
        check_range("model.bonus.init_args.regularization", regularization, above=0, is_finite=True)
        self.scale, self.regularization = scale, regularization
        self.inverse: Tensor | None = None  # V^-1
        self.curvatures, self.pairs = 0.0, 0

    def __call__(self, seen: BonusInput) -> Tensor:
        """See `Bonus.__call__`."""
        with torch.no_grad():
            states = self.observe(seen)[:, :-1].double()
            width = (states @ self._inverse_of(states) * states).sum(1).clamp(min=0).sqrt()
            curvature = self.curvatures / self.pairs if self.pairs else 0.25  # that of equal models
            weight: Tensor = (self.scale * width / curvature**0.5).to(seen.by_policy.logps.dtype)
        return -weight * (seen.by_policy.logps + seen.by_sampler.logps)

    def observe(self, seen: BonusInput) -> Tensor:
        """Return w and the curvature of each pair, (B, 2 D + 1)."""
        margin = seen.beta * (seen.by_policy.log_ratios - seen.by_sampler.log_ratios)
        curvature = (torch.sigmoid(margin) * torch.sigmoid(-margin)).float()[:, None]
        return torch.cat([mean_state(seen.by_policy), mean_state(seen.by_sampler), curvature], 1)

    def learn(self, observed: Tensor, uniforms: Callable[[int, int], Tensor]) -> None:
        """Add the pairs to V, by Woodbury's formula for its inverse, and to K."""
        states = observed[:, :-1].double()
        inverse = self._inverse_of(states)
        half = states @ inverse
        small = torch.eye(len(states), dtype=half.dtype, device=half.device) + half @ states.T
        self.inverse = inverse - half.T @ torch.linalg.solve(small, half)
        self.curvatures, self.pairs = self.curvatures + float(observed[:, -1].double().sum()), self.pairs + len(states)

    def state(self) -> dict[str, Any]:
        """Return V^-1 and the sum behind K; no matrix before the first pair."""
        inverse = None if self.inverse is None else self.inverse.cpu()
        seen = {"inverse": inverse, "curvatures": self.curvatures, "pairs": self.pairs}
        return {**super().state(), **seen, "regularization": self.regularization}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore V^-1 and K."""
        if state["regularization"] != self.regularization:
            raise InputError(
                f"ckpt_path: the checkpoint's model.bonus has regularization {state['regularization']}, and now it is "
                f"{self.regularization}; resume with that which it was made with"
            )
        self.inverse = None if state["inverse"] is None else state["inverse"].clone()
        self.curvatures, self.pairs = state["curvatures"], state["pairs"]

    def _inverse_of(self, states: Tensor) -> Tensor:
        """Return V^-1 on the device of some states; it is made when their size is known."""
        if self.inverse is None:
            self.inverse = torch.eye(states.shape[1], dtype=torch.float64) / self.regularization
        self.inverse = self.inverse.to(states.device)
        return self.inverse


def mean_state(side: Scored) -> Tensor:
    """Return the mean of the hidden states that predict each completion's tokens, scaled to length 1, (B, D).

    Raises:
        ValueError: The hidden states or the lengths are missing.
    """
    if side.hidden is None or side.lengths is None:
        raise ValueError("a bonus that reads hidden states must have needs_hidden set to True")
    real = torch.arange(side.hidden.shape[1], device=side.hidden.device) < side.lengths[:, None]
    total = side.hidden.float().where(real[..., None], 0.0).sum(1)  # the mean, but for its length
    return torch.nn.functional.normalize(total, dim=1)
