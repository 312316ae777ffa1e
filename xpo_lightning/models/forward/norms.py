"""Computes RMS norms with one kernel, where models' own code takes eight."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest error that counts as rounding, by type, relative to the largest number."""

FUSING = {"cuda"}
"""Types of devices on which one kernel is faster than eight."""


def fast_norms(model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Fuse a model's norms for a block, if that is faster on its device."""
    return norms_fused(model) if device.type in FUSING else nullcontext()


@contextmanager
def norms_fused(model: nn.Module) -> Iterator[None]:
    """Compute a model's norms with torch's `rms_norm` for a block, if they differ from it by rounding only.

    Args:
        model: Any model; its norms are tested once.
    """
    if model not in _found:
        _found[model] = _fusible(model)
    swapped = []
    for norm, eps, shift in _found[model]:
        if "forward" not in vars(norm):
            norm.forward = partial(_fused, norm.forward, norm, eps, shift)
            swapped.append(norm)
    try:
        yield
    finally:
        for norm in swapped:
            del norm.forward


Norm = tuple[nn.Module, float, float]
"""A norm, its epsilon (added to the mean square), and the shift that is added to its weight."""
_found: "weakref.WeakKeyDictionary[nn.Module, list[Norm]]" = weakref.WeakKeyDictionary()


def _fused(plainly: Callable[[Tensor], Tensor], norm: nn.Module, eps: float, shift: float, hidden: Tensor) -> Tensor:
    weight: Tensor = norm.weight  # type: ignore[assignment]
    if hidden.dtype != weight.dtype:
        return plainly(hidden)
    return nn.functional.rms_norm(hidden, weight.shape, weight + shift if shift else weight, eps)


@torch.no_grad()
def _fusible(model: nn.Module) -> list[Norm]:
    """Find the norms that can be fused; tests one norm of each class."""
    shifts: dict[type[nn.Module], float | None] = {}
    found: list[Norm] = []
    for norm in model.modules():
        weight, kind = getattr(norm, "weight", None), type(norm)
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
            continue
        if len(list(norm.parameters())) != 1:
            continue
        if kind not in shifts:
            shifts[kind] = next((shift for shift in (0.0, 1.0) if _is_rms(norm, weight, eps, shift)), None)
        shift = shifts[kind]
        if shift is not None:
            found.append((norm, eps, shift))
    return found


def _is_rms(norm: nn.Module, weight: Tensor, eps: float, shift: float) -> bool:
    if weight.dtype not in ROUNDING:
        return False
    rows = torch.linspace(-2, 3, 2 * len(weight), dtype=torch.float32, device=weight.device).sin().to(weight.dtype)
    try:
        plain = norm(rows.view(2, -1))
    except Exception:  # Not called with hidden states, so no norm of this kind.
        return False
    fused = nn.functional.rms_norm(rows.view(2, -1), weight.shape, weight + shift if shift else weight, eps)
    off = (plain.float() - fused.float()).abs().max() if plain.shape == fused.shape else torch.tensor(float("inf"))
    return plain.dtype == fused.dtype and bool(off <= ROUNDING[weight.dtype] * fused.float().abs().max())
