"""Compares a way to compute features with the truth: the features of each row computed alone.

The comparison is in float32, where an error cannot pass for rounding. In a run of lower precision, a way must also work
in that precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.models.forward.causal_forward import base_of
from xpo_lightning.models.forward.judging import at_rest, in_float32, is_coarse, shortened

FAILURES = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Exceptions that a model raises in a way that it does not support."""
EXACT, COARSE = 1e-3, 0.3
"""Largest error that counts as rounding, in standard deviations of the truth: of any number in float32; of the median
row in lower precision, where rounding sends some tokens to other experts."""

Compute = Callable[[], Tensor]


class Truth:
    """Features of a few rows, each computed alone; other ways are compared with them.

    Args:
        model: The model, on its device.
        alone: Computes the features: each row alone, unpadded, without a cache.
        key: The configuration key of the model, for errors.
        may_shorten: Whether the first layers may stand for all; not if padding is far from the positions that are
            read, since its influence comes nearer with each layer.

    Raises:
        InputError: The model cannot compute a row alone.
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
        """Compare a way with the truth; return what is wrong with it, or None."""
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
        self._take_all_layers()  # The way works only with all of them.
        return self.fault(compute)

    def differ(self, one: Compute, other: Compute) -> bool:
        """Tell whether two computations differ by more than rounding."""
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
    """Return the largest difference in standard deviations of the truth; infinite if a number is not finite.

    If the truth itself is not finite, return 0: the code that uses these numbers reports them.

    Args:
        found: Features from the way. (N, ...)
        truth: Right features. (N, ...)
        of_median: Take the largest difference of the median row instead of that of all N rows.
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
    """Describe an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.160}"
