"""Random numbers of a rollout are a function of seed, stream, batch and row alone."""

import random

import numpy as np
import pytest
import torch

from xpo_lightning.core.rng import RolloutRNG, Stream, random_state, set_random_state


@pytest.mark.parametrize("processes", [2, 3])
def test_a_row_has_the_same_numbers_on_any_number_of_processes(processes):
    """Rank r of n has rows r, r + n, ... of the global batch, here of 6 rows."""
    alone = RolloutRNG(7, number=4).uniforms(6, 5)
    assert alone.dtype == torch.float64
    for rank in range(processes):
        own = RolloutRNG(7, number=4, rank=rank, world_size=processes).uniforms(6 // processes, 5)
        assert torch.equal(own, alone[rank::processes])


def test_numbers_are_finer_than_float32():
    numbers = RolloutRNG(0).uniforms(50, 50)
    assert (numbers != numbers.float().double()).float().mean() > 0.9


def test_seed_stream_and_batch_each_give_other_numbers():
    sources = [RolloutRNG(1), RolloutRNG(2), RolloutRNG(1, Stream.VALIDATION), RolloutRNG(1, number=1)]
    first = [source.uniforms(1, 1).item() for source in sources]
    assert len(set(first)) == len(first)
    assert first == [
        source.uniforms(1, 1).item()
        for source in (RolloutRNG(1), RolloutRNG(2), RolloutRNG(1, Stream.VALIDATION), RolloutRNG(1, number=1))
    ]


def test_the_global_random_state_goes_on_where_it_was():
    state = random_state()
    drawn = [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)]
    set_random_state(state)
    assert [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)] == drawn
