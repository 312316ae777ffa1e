"""Marks of pairs, alone and joined with those of a preference data set, and the padding of their prompts."""

from dataclasses import replace

import torch
from conftest import completions_of, prompts_of

from xpo_lightning import Experience, Pair
from xpo_lightning.core.batch import BonusSample, join_experiences


def pairs_of(prompts: list[list[int]], policy: list[list[int]], sampler: list[list[int]]) -> Experience:
    numbers = torch.arange(len(prompts), dtype=torch.float32)
    return Experience(
        prompts=prompts_of(prompts),
        completions=Pair(completions_of(policy), completions_of(sampler)),
        scores=Pair(numbers + 0.25, numbers + 0.5),
        labels=torch.ones(len(prompts)),
        reference_logps=Pair(-1 - numbers, -10 - numbers),
    )


def test_a_pair_has_no_preference_if_it_is_silent_or_both_sides_are_the_same():
    pairs = pairs_of([[1], [2], [3]], [[5], [6], [7]], [[5], [8], [9]])
    assert pairs.without_preference.tolist() == [True, False, False]
    marked = replace(pairs, silent=torch.tensor([False, True, False]))
    assert marked.without_preference.tolist() == [True, True, False]


def test_a_pair_is_as_long_as_its_longest_completion():
    pairs = pairs_of([[1], [2, 2, 2]], [[5, 5], [6]], [[5], [8, 8, 8]])
    assert pairs.sizes == [(1, 2), (3, 3)]
    third = BonusSample(completions_of([[4, 4, 4, 4], [4]]), torch.zeros(2))
    assert replace(pairs, sample=third).sizes == [(1, 4), (3, 3)]


def test_padding_moves_from_the_left_to_the_right():
    ids, mask = prompts_of([[1, 2, 3], [4], [5, 6]]).padded_right()
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]


def test_joined_pairs_keep_their_own_marks_and_those_of_a_data_set_have_none():
    sampled = replace(
        pairs_of([[1, 2, 3], [4]], [[5, 5], [6]], [[7], [8]]),
        silent=torch.tensor([True, False]),
        answered=torch.tensor([False, True]),
        comparisons=torch.tensor([3.0, 1.0]),
        sample=BonusSample(completions_of([[4], [3]]), torch.tensor([-7.0, -8.0])),
    )
    offline = replace(pairs_of([[9, 9]], [[1, 2, 3]], [[2]]), offline=torch.tensor([True]))
    joined = join_experiences(sampled, offline)
    assert joined.prompts.ids.tolist() == [[1, 2, 3], [0, 0, 4], [0, 9, 9]]
    assert joined.prompts.mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
    assert joined.completions.by_policy.ids.tolist() == [[5, 5, 0], [6, 0, 0], [1, 2, 3]]
    assert joined.silent.tolist() == [True, False, False]
    assert joined.answered.tolist() == [False, True, True]
    assert joined.offline.tolist() == [False, False, True]
    assert joined.comparisons.tolist() == [3.0, 1.0, 0.0]
    assert joined.reference_logps.by_sampler.tolist() == [-10.0, -11.0, -10.0]
    assert joined.sample.reference_logps.tolist() == [-7.0, -8.0, -10.0]
    assert joined.sampled.prompts.raw == ("prompt 0", "prompt 1")
    assert joined.sampled.silent.tolist() == [True, False]
    assert offline.sampled is None
