"""Applies the vocabulary head at the positions of completions only, with its own backward passes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xpo_lightning.models.forward.cpu import linear, products_summed

CHUNK = {"cpu": 2**22, "cuda": 2**26}
"""Most logits computed at a time, by type of device; on a CPU they should stay in its cache."""
KEPT = 2**26
"""Most probabilities kept for the backward pass; if there are more, it recomputes them, this many at a time."""
_LEAST = -1e4
"""A log-probability whose exponential is 0, and whose product with 0 is 0, unlike that of minus infinity."""


def head_logps(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Score tokens under a linear vocabulary head.

    Logits exist for a few positions at a time. The gradient of a token's log-probability with respect to its logits is
    one-hot minus softmax, whatever the loss does with it: its negative is computed in the forward pass, where the
    logits are at hand, and the backward pass only scales it.

    Args:
        hidden: The last hidden states, at the positions that predict the targets. (N, D)
        head: The vocabulary head; its weight is (V, D).
        targets: Token ids. (N,)

    Returns:
        log softmax(head(hidden))[targets], natural, in float32. (N,)
    """
    logps: Tensor = _HeadLogps.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return logps


def logps_and_entropies(features: Tensor, head: nn.Linear | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Score tokens, and measure the entropy of the distribution that each was drawn from.

    The head's logits exist for a few positions at a time; the backward pass recomputes them.

    Args:
        features: Hidden states at the positions that predict the targets (N, D) or, without `head`, logits (N, V).
        head: The vocabulary head; its weight is (V, D).
        targets: Token ids. (N,)

    Returns:
        The targets' natural log-probabilities, and the entropies -sum p log p over the vocabulary in nats, in float32.
        (N,) each
    """
    weight, bias = (None, None) if head is None else (head.weight, head.bias)
    logps, entropies = _LogpsAndEntropies.apply(features, weight, bias, targets)  # type: ignore[no-untyped-call]
    return logps, entropies


def chosen_logps(logits: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Return the log-probabilities of chosen tokens, with all digits where the probability itself has underflowed.

    The largest probability is exp(largest logit) / sum of exp(logits).

    Args:
        logits: In float32. (N, V)
        probabilities: Their softmax. (N, V)
        chosen: Token ids. (N, 1)

    Returns:
        Natural log-probabilities. (N,)
    """
    gaps = logits.gather(1, chosen)[:, 0] - logits.amax(1)
    return gaps + probabilities.amax(1).log()


def apply_head(features: Tensor, head: nn.Linear | None) -> Tensor:
    """Turn features (N, F) into logits (N, V), without gradient; without a head they are logits already."""
    return features if head is None else linear(features, head.weight, head.bias)


class _HeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wants_hidden, *wants_head, _ = ctx.needs_input_grad
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if wants_hidden else None  # -d logp / d hidden
        shape = (len(hidden), len(weight))
        kept = weight.new_empty(shape) if any(wants_head) and shape[0] * shape[1] <= KEPT else None
        for rows in _cut(hidden, weight, CHUNK["cpu" if hidden.device.type == "cpu" else "cuda"]):
            logits = linear(hidden[rows], weight, bias).float()
            wanted = targets[rows, None]
            place = None if kept is None else kept[rows]
            fits = place is not None and place.dtype == logits.dtype
            probabilities = torch.softmax(logits, 1, out=place if fits else None)
            logps[rows] = chosen_logps(logits, probabilities, wanted)
            if slopes is None and kept is None:
                continue
            residual = _residual(probabilities, wanted)
            if not fits:
                residual = residual.to(weight.dtype) if place is None else place.copy_(residual)
            if slopes is not None:
                slopes[rows] = linear(residual, weight.t())
        ctx.save_for_backward(hidden, weight, bias, targets, logps, slopes, kept)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight, bias, targets, _, slopes, kept = ctx.saved_tensors
        _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        scale = -grads[0][:, None]
        of_hidden = None if slopes is None else (slopes * scale).to(hidden.dtype)
        if not (wants_weight or wants_bias):
            return of_hidden, None, None, None
        scaled = (hidden * scale).to(weight.dtype)
        if kept is not None:
            of_weight = products_summed(kept, scaled) if wants_weight else None
            of_bias = scale[:, 0].to(kept.dtype) @ kept if wants_bias else None
            return of_hidden, of_weight, of_bias, None
        sum_of_weight = torch.zeros_like(weight, dtype=torch.float32)
        sum_of_bias = weight.new_zeros(len(weight), dtype=torch.float32)
        for rows in _cut(hidden, weight, KEPT):
            probabilities = linear(hidden[rows].to(weight.dtype), weight, bias).float().softmax(1)
            residual = _residual(probabilities, targets[rows, None]).to(weight.dtype)
            sum_of_weight += products_summed(residual, scaled[rows])
            sum_of_bias += scale[rows, 0].to(residual.dtype) @ residual
        of_weight = sum_of_weight.to(weight.dtype) if wants_weight else None
        return of_hidden, of_weight, sum_of_bias.to(weight.dtype) if wants_bias else None, None


class _LogpsAndEntropies(torch.autograd.Function):
    """With p = softmax(logits), d logp / d logits is one-hot - p, and d entropy / d logits is -p (log p + entropy)."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        logps = features.new_empty(len(features), dtype=torch.float32)
        entropies = torch.empty_like(logps)
        for rows in _cut(features, weight, CHUNK["cpu" if features.device.type == "cpu" else "cuda"]):
            log_p = _logits(features[rows], weight, bias).log_softmax(1)
            logps[rows] = log_p.gather(1, targets[rows, None])[:, 0]
            entropies[rows] = -(log_p.exp() * log_p.clamp_(min=_LEAST)).sum(1)
        ctx.save_for_backward(features, weight, bias, targets, entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        features, weight, bias, targets, entropies = ctx.saved_tensors
        wants_features, wants_weight, wants_bias, _ = ctx.needs_input_grad
        of_logps, of_entropies = (grad[:, None] for grad in grads)
        of_features = torch.empty_like(features) if wants_features else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for rows in _cut(features, weight, KEPT):
            log_p = _logits(features[rows], weight, bias).log_softmax(1).clamp_(min=_LEAST)
            p = log_p.exp()
            slopes = log_p.add_(entropies[rows, None]).mul_(of_entropies[rows]).add_(of_logps[rows]).neg_().mul_(p)
            slopes = slopes.scatter_add_(1, targets[rows, None], of_logps[rows])
            if weight is not None:
                slopes = slopes.to(weight.dtype)
            if of_features is not None:
                of_features[rows] = slopes if weight is None else linear(slopes, weight.t())
            if of_weight is not None:
                of_weight += products_summed(slopes, features[rows].to(slopes.dtype))
            if of_bias is not None:
                of_bias += slopes.sum(0)
        return (
            of_features,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
        )


def _logits(features: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Turn features into logits (N, V), in float32; without a weight they are logits already."""
    return (features if weight is None else linear(features.to(weight.dtype), weight, bias)).float()


def _residual(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Subtract the one-hot targets (N, 1) from probabilities (N, V), in place."""
    return probabilities.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=probabilities.dtype))


def _cut(features: Tensor, weight: Tensor | None, most: int) -> Iterator[slice]:
    step = max(1, most // (features.shape[1] if weight is None else len(weight)))
    return (slice(start, start + step) for start in range(0, len(features), step))
