"""What a model gives for each row alone, and how far another way to compute it is off.

Numbers are judged in float32, where a wrong way cannot pass for rounding; in a run of coarser numbers a way has to work
in these as well.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.models.forward.causal_forward import base_of
from xpo_lightning.models.forward.judging import at_rest, in_float32, is_coarse, shortened

FAILURES = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What models raise that cannot do what is tried."""
EXACT, COARSE = 1e-3, 0.3
"""Largest error that counts as rounding, in standard deviations of the truth: of any number in float32; of the median
row in coarser numbers, where rounding sends some tokens to other experts."""

Compute = Callable[[], Tensor]


class Truth:
    """The truth of a few rows.

    Args:
        model: The model, on its device.
        alone: Computes the truth with it: each row alone, unpadded, without a cache.
        key: The config's key of the model, for errors.
        may_shorten: Whether the first layers may stand for all; not where padding is far from what is read, since it
            comes nearer with each layer.

    Raises:
        InputError: The model cannot do that.
    """

    is_shortened: bool
    """Whether the first layers stand for all."""

    def __init__(self, model: nn.Module, alone: Compute, key: str, *, may_shorten: bool = True) -> None:
        self.model, self.alone, self.key = model, alone, key
        try:
            self._compute(is_shortened=may_shorten)
        except torch.OutOfMemoryError:
            raise
        except FAILURES:
            self._take_all_layers()

    def fault(self, compute: Compute) -> str | None:
        """Compare a way with the truth; say what is wrong with it, or return None where nothing is."""
        try:
            return self._fault(compute)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            if not self.is_shortened:
                return described(error)
        try:
            with self._judged(exactly=True, is_shortened=False):
                compute()
        except FAILURES as error:
            return described(error)
        self._take_all_layers()  # It counts on all of them.
        return self.fault(compute)

    def differ(self, one: Compute, other: Compute) -> bool:
        """Tell whether two computations give other numbers."""
        with self._judged(exactly=True):
            return relative_error(one(), other()) > (EXACT if self.is_exact else COARSE)

    def _compute(self, *, is_shortened: bool) -> None:
        self.is_shortened = is_shortened
        with self._judged(exactly=True) as self.is_exact:
            self.exact = self.alone()
        self.coarse: Tensor | None = None
        if self.is_exact and is_coarse(self.model):
            with self._judged(exactly=False):
                self.coarse = self.alone()

    def _take_all_layers(self) -> None:
        try:
            self._compute(is_shortened=False)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            raise InputError(
                f"{self.key}: {name_of(self.model)} cannot compute a row of text ({described(error)}); "
                f"give another model"
            ) from error

    def _fault(self, compute: Compute) -> str | None:
        for truth, exactly in ((self.exact, True), (self.coarse, False)):
            if truth is None:
                continue
            with self._judged(exactly=exactly):
                error = relative_error(compute(), truth, of_median=not (exactly and self.is_exact))
            if error > (EXACT if exactly and self.is_exact else COARSE):
                return f"numbers would be off by {error:.2g} of their size"
        return None

    @contextmanager
    def _judged(self, *, exactly: bool, is_shortened: bool | None = None) -> Iterator[bool]:
        is_shortened = self.is_shortened if is_shortened is None else is_shortened
        with (
            at_rest(self.model),
            shortened(self.model) if is_shortened else nullcontext(),
            in_float32(self.model) if exactly else nullcontext(False) as is_exact,
        ):
            yield is_exact


def relative_error(found: Tensor, truth: Tensor, *, of_median: bool = False) -> float:
    """Return the largest difference in standard deviations of the truth; infinite where a number is not finite.

    A truth that is not finite judges nothing; whoever computes with it will say so.

    Args:
        found: What a way gives. (N, ...)
        truth: What is right. (N, ...)
        of_median: Of the median of the N rows, not of all of them.
    """
    found, truth = found.detach().float(), truth.detach().float()
    if not bool(truth.isfinite().all()):
        return 0.0
    if found.shape != truth.shape or not bool(found.isfinite().all()):
        return float("inf")
    largest = (found - truth).abs().flatten(1).amax(1) if found.ndim > 1 else (found - truth).abs()
    return float((largest.median() if of_median else largest.max()) / truth.std(correction=0).clamp_min(1e-12))


def name_of(model: nn.Module) -> str:
    """Return the name of a model's class."""
    return type(base_of(model)).__name__


def described(error: Exception) -> str:
    """Say in one line what went wrong."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.160}"
