"""Settings of sampling at the ends of their range."""

import pytest
import torch

from xpo_lightning import Sampling
from xpo_lightning.rollout.sampling import TokenSampler


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 0.0}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_the_most_likely_token_is_drawn_whatever_the_number(options):
    logits = torch.tensor([[0.0, 1.0, 0.9, -2.0]]).expand(3, 4)
    uniforms = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)
    tokens, logps = TokenSampler(Sampling(**options))(logits, torch.zeros(3, 1, dtype=torch.long), uniforms)
    assert tokens.tolist() == [1, 1, 1]
    # exp(0) + exp(1) + exp(0.9) + exp(-2) = 1 + 2.7182818 + 2.4596031 + 0.1353353 = 6.3132202; 1 - log of it
    assert logps.tolist() == pytest.approx([-0.8426460] * 3, abs=1e-6)


@pytest.mark.parametrize(("penalty", "expected"), [(0.5, 2), (1.0, 1), (2.0, 1)])
def test_a_penalty_below_1_favours_what_was_written(penalty, expected):
    """Of logits 0, 1 and 0.9, that of token 2, which the row has, becomes 0.9 / 0.5 = 1.8; at 2 it becomes 0.45."""
    sampler = TokenSampler(Sampling(temperature=0.0, repetition_penalty=penalty))
    tokens, _ = sampler(torch.tensor([[0.0, 1.0, 0.9]]), torch.tensor([[2]]), torch.zeros(1, dtype=torch.float64))
    assert tokens.tolist() == [expected]
