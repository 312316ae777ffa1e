"""Computes a confidence interval of a mean win rate over prompts, with ties and several completions per prompt."""

import math
from functools import cache
from statistics import NormalDist

from torch import Tensor

from xpo_lightning.core.errors import InputError


def win_rate_interval(wins: Tensor, level: float) -> tuple[float, float]:
    """Return a confidence interval of the expected win rate, for independently drawn prompts.

    It is Wilson's (1927) score interval, which holds its level near 0 and 1 and never leaves [0, 1], with two changes.
    A prompt counts as more than one coin toss if its value varies less than a coin's: the number of prompts is divided
    by the design effect, the variance of the values over p (1 - p) (Korn and Graubard 1998). And since that is
    estimated, the quantile is Student's.

    Args:
        wins: For each prompt, the share of comparisons won, ties as half a win; in [0, 1]. (B,)
        level: Probability that the interval covers the true win rate, in (0, 1).

    Returns:
        The lower and the upper end.

    Raises:
        InputError: The level is out of range, or there are fewer than two prompts.
    """
    check_level(level)
    count = len(wins)
    if count < 2:
        raise InputError(f"an interval needs at least 2 prompts, but there are {count}")
    mean = float(wins.double().mean())
    squared = student_quantile((1 + level) / 2, count - 1) ** 2
    effective = count / design_effect(wins)
    centre = (mean + squared / (2 * effective)) / (1 + squared / effective)
    spread = mean * (1 - mean) / effective + squared / (4 * effective**2)
    half = math.sqrt(squared * spread) / (1 + squared / effective)
    return max(0.0, centre - half), min(1.0, centre + half)


def check_level(level: float) -> None:
    """Refuse a confidence level outside of (0, 1)."""
    if not 0 < level < 1:
        raise InputError(f"--level must be above 0 and below 1, but is {level}")


def design_effect(wins: Tensor) -> float:
    """Return the variance of a prompt's value, relative to that of a coin with the same mean.

    Args:
        wins: As in `win_rate_interval`. (B,)

    Returns:
        At most 1, since no values in [0, 1] vary more; 1 if all prompts are won or all lost, since the spread is then
        unknown; and at least that of B ties with one more win and one more loss, so that ties alone do not give
        certainty.
    """
    values = wins.double()
    mean = float(values.mean())
    coin = mean * (1 - mean)
    if coin < 1e-12:
        return 1.0
    return max(float(values.var(correction=0)) / coin, 2 / (len(values) + 2))


@cache
def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t, found by bisection of its distribution function."""
    low, high = 0.0, 1e3
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    if degrees > 10**5:
        return NormalDist().inv_cdf(probability)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < probability else (low, middle)
    return low


def _student_cdf(value: float, degrees: int) -> float:
    """P(T < value) for value >= 0, by the finite series in the angle atan(value / sqrt(degrees)).

    Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    angle = math.atan(value / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = (cosine if odd else 1.0) if degrees > 1 else 0.0
    for k in range(2 if odd else 1, degrees - 1, 2):
        term *= cosine**2 * k / (k + 1)
        total += term
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + within) / 2
