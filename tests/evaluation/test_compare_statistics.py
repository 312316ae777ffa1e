"""The interval of a win rate: numbers worked by hand, and how often it covers the truth."""

import math

import pytest
import torch
from torch import Tensor

from xpo_lightning import InputError
from xpo_lightning.evaluation.win_rate import design_effect, student_quantile, win_rate_interval

LEVEL = 0.95
REPEATS = 2000
SIZES, RATES, TIES = (20, 100, 400), (0.5, 0.8, 0.97), (0.0, 0.05, 0.3)
CELLS = [
    (size, rate, tied, samples, alike)
    for size in SIZES
    for rate in RATES
    for tied in TIES
    for samples, alike in ((1, False), (4, False), (4, True))
    if tied / 2 <= min(rate, 1 - rate)
]
# What is known to be off, with the reason. Standard error of each: sqrt(0.95 * 0.05 / 2000) = 0.005.
# 20 coins of 0.97: the number of wins takes so few values that only 0.880 and 0.979 can be reached.
# 100 prompts whose 4 completions nearly all win or all lose: three in a hundred prompts tell the spread.
OFF = {(20, 0.97, 0.0, 1, False): (0.97, 0.99), (100, 0.97, 0.0, 4, True): (0.90, 0.95)}


def win_shares(generator: torch.Generator, size: int, rate: float, tied: float, samples: int, alike: bool) -> Tensor:
    """Draw the shares that prompts win, (REPEATS, size), of expectation `rate`.

    A comparison is a tie with probability `tied`, else a win with a probability that is the same for all prompts or,
    where those of a prompt are alike, Beta-distributed over prompts with a correlation of 1/2 within one.
    """
    chance = torch.full((REPEATS, size, 1), (rate - tied / 2) / (1 - tied), dtype=torch.float64)
    if alike:
        gammas = [torch._standard_gamma(part, generator=generator) for part in (chance, 1 - chance)]
        chance = gammas[0] / (gammas[0] + gammas[1])
    shape = (REPEATS, size, samples)
    is_tie, wins = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.where(is_tie < tied, 0.5, (wins < chance).double()).mean(2)


def coverage(size: int, rate: float, tied: float, samples: int, alike: bool) -> float:
    generator = torch.Generator().manual_seed(hash((size, rate, tied, samples, alike)) % 2**31)
    intervals = [win_rate_interval(row, LEVEL) for row in win_shares(generator, size, rate, tied, samples, alike)]
    return sum(low <= rate <= high for low, high in intervals) / REPEATS


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=[pytest.mark.slow] * bool(place % 5)) for place, cell in enumerate(CELLS)],
    ids=str,
)
def test_interval_covers_the_truth_at_its_level(cell):
    low, high = OFF.get(cell, (0.93, 0.97))
    slack = 2 * math.sqrt(LEVEL * (1 - LEVEL) / REPEATS)  # of the simulation itself
    assert low - slack <= coverage(*cell) <= high + slack


@pytest.mark.parametrize("level", [0.8, 0.99])
def test_other_levels_are_kept_as_well(level, monkeypatch):
    monkeypatch.setattr(f"{__name__}.LEVEL", level)
    error = math.sqrt(level * (1 - level) / REPEATS)
    assert coverage(100, 0.5, 0.05, 4, True) == pytest.approx(level, abs=4 * error)


def test_coins_without_ties_have_wilsons_interval_with_students_quantile():
    """8 wins of 10 with t = 2.2622, t^2 = 5.1174: centre (0.8 + 0.25587) / 1.51174 = 0.69845, half sqrt(5.1174 *

    (0.016 + 0.012794)) / 1.51174 = 0.38386 / 1.51174 = 0.25392.
    """
    wins = torch.tensor([1.0] * 8 + [0.0] * 2)
    assert win_rate_interval(wins, 0.95) == pytest.approx((0.44453, 0.95237), abs=2e-5)


def test_ties_narrow_the_interval_and_alone_do_not_make_for_certainty():
    """Of 0, 0.5, 0.5, 1 the variance is 1/8, half that of a coin. Of 20 ties it is 0, taken as 2/22 of a coin's."""
    assert design_effect(torch.tensor([0.0, 0.5, 0.5, 1.0])) == pytest.approx(0.5)
    assert design_effect(torch.full((20,), 0.5)) == pytest.approx(2 / 22)
    low, high = win_rate_interval(torch.full((20,), 0.5), 0.95)
    assert 0.4 < low < 0.46
    assert low + high == pytest.approx(1)


def test_all_won_is_not_certain_and_stays_within_bounds():
    """Wilson's lower end is n / (n + t^2) = 20 / (20 + 4.3808) = 0.8203."""
    low, high = win_rate_interval(torch.ones(20), 0.95)
    assert (low, high) == pytest.approx((0.8203, 1.0), abs=1e-4)


def test_interval_of_the_losses_is_the_mirror_of_that_of_the_wins():
    wins = torch.rand(30, generator=torch.Generator().manual_seed(1))
    low, high = win_rate_interval(wins, 0.9)
    assert win_rate_interval(1 - wins, 0.9) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(
    ("degrees", "table"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (19, 2.0930), (1000, 1.9623)]
)
def test_students_quantile_is_that_of_the_tables(degrees, table):
    assert student_quantile(0.975, degrees) == pytest.approx(table, abs=1e-4)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_level_out_of_range_is_refused(level):
    with pytest.raises(InputError, match="--level"):
        win_rate_interval(torch.tensor([0.0, 1.0]), level)


def test_a_single_prompt_has_no_interval():
    with pytest.raises(InputError, match="at least 2 prompts"):
        win_rate_interval(torch.ones(1), 0.95)
