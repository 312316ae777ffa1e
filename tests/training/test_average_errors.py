"""The standard error of numbers that are all equal is 0, not the root of a rounding error below 0."""

import math

import pytest
import torch

from xpo_lightning.training.metrics import PairAverages


def test_equal_numbers_have_no_standard_error():
    """For some of these, the mean of the squares less the square of the mean is below 0: 1000.1 six times, say."""
    for number in (1000 + tenth / 10 for tenth in range(100)):
        averages = PairAverages()
        averages.update({"objective/kl": torch.full((6,), number, dtype=torch.float64)})
        found = averages.compute()["objective/kl_stderr"].item()
        assert not math.isnan(found)
        assert found == pytest.approx(0.0, abs=1e-4)
