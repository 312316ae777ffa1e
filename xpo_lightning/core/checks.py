"""Checks of options: one error for a number out of range, with the config key that it stands under."""

import math
from typing import Any

from xpo_lightning.core.argument_types import fits
from xpo_lightning.core.errors import InputError


def check_range(
    key: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    is_finite: bool = False,
    or_null: bool = False,
) -> None:
    """Refuse a number out of range; None, an option that is not set, passes.

    Args:
        key: What the message calls the option, for example `model.lora.r`.
        value: The number.
        least: Smallest value allowed.
        above: Bound that the value must exceed.
        below: Bound that the value must stay under.
        most: Largest value allowed.
        is_finite: Whether infinity is refused; NaN always is, given any bound.
        or_null: Whether the message says that null is allowed too.

    Raises:
        InputError: It is out of range.
    """
    if value is None:
        return
    if not fits(value, float):
        raise InputError(f"{key} must be a number, but is {value!r:.60}, a {type(value).__name__}")
    bounds = [
        ("at least", least, least is None or value >= least),
        ("above", above, above is None or value > above),
        ("below", below, below is None or value < below),
        ("at most", most, most is None or value <= most),
    ]
    if all(holds for _, _, holds in bounds) and (math.isfinite(value) or not is_finite):
        return
    parts = [f"{name} {bound:g}" for name, bound, _ in bounds if bound is not None] + ["finite"] * is_finite
    wanted = " and ".join(parts) + (", or null" if len(parts) > 1 else " or null") * or_null
    raise InputError(f"{key} must be {wanted}, but is {value}")
