"""From scores to labels, and the penalty on completions that were cut."""

from typing import Any

import pytest
import torch
from conftest import ChainModel, chain_module, make_tokenizer, noise

from xpo_lightning import Experience, InputError, Pair, Sampling
from xpo_lightning.preference import argmax_labels, penalize_missing_eos
from xpo_lightning.prompts import as_prompts
from xpo_lightning.rewards.function import PythonReward


def test_argmax_labels_are_1_for_a_win_0_for_a_loss_and_a_half_for_a_tie():
    scores = Pair(torch.tensor([1.0, -2.0, 0.0, 1e-7, -0.0]), torch.tensor([0.5, -1.0, 0.0, 0.0, 0.0]))
    assert argmax_labels(scores).tolist() == [1.0, 0.0, 0.5, 1.0, 0.5]


def test_argmax_labels_of_swapped_sides_are_the_complement():
    scores = Pair(torch.randn(50).round(), torch.randn(50).round())
    swapped = Pair(scores.by_reference, scores.by_policy)
    labels = argmax_labels(scores)
    assert torch.equal(labels + argmax_labels(swapped), torch.ones(50))
    assert set(labels.tolist()) == {0.0, 0.5, 1.0}


def test_penalize_missing_eos_takes_from_cut_completions_alone():
    scores = penalize_missing_eos(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([True, False, False]), 0.75)
    assert scores.tolist() == [1.0, 1.25, -3.75]


# ---- in a rollout ----


def one_each(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [1.0] * len(completions)


def collected(model: ChainModel, prompts: list[list[int]], kind: str = "distinct", **options: Any) -> Experience:
    """Collect the pairs of tokenized prompts; every completion scores 1 before the penalty."""
    module = chain_module(model, make_tokenizer(kind), reward=PythonReward(one_each), **options)
    module.configure_model()
    batch = {"prompt": [f"prompt {number}" for number in range(len(prompts))], "prompt_ids": prompts}
    return module.collect(module.policy, as_prompts(batch, module.prompt_encoder, module.device), noise())


@pytest.mark.parametrize("kind", ["distinct", "pad_is_eos", "bos_is_eos", "no_pad", "chat"])
def test_missing_eos_penalty_falls_on_cut_completions_whatever_the_special_tokens_are(kind: str):
    """The chains 10-11-EOS and 20-20-20-...; EOS is followed by 20. Prompts of all lengths hold EOS, BOS or neither.

    Completions of prompts that end in 10 end by themselves and keep their 1; the others are cut and get 1 - 5 = -4.
    """
    tokenizer = make_tokenizer(kind)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id or tokenizer.eos_token_id
    model = ChainModel({10: 11, 11: eos, eos: 20, 20: 20}, otherwise=20)
    prompts = [[10], [bos, eos, 7, 10], [20], [bos, 20], [eos], [bos, 5, eos, 5, 5, 5, eos], [7] * 9 + [10]]
    pairs = collected(model, prompts, kind, sampling=Sampling(max_new_tokens=4), missing_eos_penalty=5.0)
    expected = [1.0, 1.0, -4.0, -4.0, -4.0, -4.0, 1.0]
    assert pairs.scores.by_policy.tolist() == expected
    assert pairs.scores.by_reference.tolist() == expected
    assert pairs.completions.by_policy.ended.tolist() == [score == 1.0 for score in expected]


def test_missing_eos_penalty_counts_every_eos_id():
    """Two ids end a completion; the tokenizer's own EOS, which is not among them, does not."""
    own = make_tokenizer().eos_token_id
    model = ChainModel({10: 90, 20: 91, 30: own}, otherwise=own)
    sampling = Sampling(max_new_tokens=3, eos_token_ids=[90, 91])
    pairs = collected(model, [[10], [20], [30]], sampling=sampling, missing_eos_penalty=0.5)
    assert pairs.scores.by_policy.tolist() == [1.0, 1.0, 0.5]


def test_missing_eos_penalty_spares_a_completion_that_ends_with_its_last_token():
    model = ChainModel({10: 11, 11: 90, 20: 21, 21: 22}, otherwise=90)
    sampling = Sampling(max_new_tokens=2, eos_token_ids=[90])
    pairs = collected(model, [[10], [20]], sampling=sampling, missing_eos_penalty=0.5)
    assert pairs.scores.by_policy.tolist() == [1.0, 0.5]


def test_missing_eos_penalty_spares_a_stop_string():
    a, b, c = (make_tokenizer().convert_tokens_to_ids(text) for text in "abc")
    sampling = Sampling(max_new_tokens=3, stop_strings=["b"], eos_token_ids=[])
    pairs = collected(ChainModel({a: b}, otherwise=c), [[a], [c]], sampling=sampling, missing_eos_penalty=0.5)
    assert pairs.scores.by_policy.tolist() == [1.0, 0.5]


def test_without_a_penalty_scores_are_the_rewards():
    pairs = collected(ChainModel({}, otherwise=20), [[10], [20]], sampling=Sampling(max_new_tokens=2))
    assert pairs.scores.by_policy.tolist() == [1.0, 1.0]


def test_missing_eos_penalty_without_any_ending_is_refused():
    with pytest.raises(InputError, match=r"model\.missing_eos_penalty"):
        collected(
            ChainModel({}, otherwise=20),
            [[10]],
            sampling=Sampling(max_new_tokens=2, eos_token_ids=[]),
            missing_eos_penalty=1.0,
        )


def test_labels_follow_the_penalized_scores():
    """Equal rewards tie, and both sides of a chain model are the same completion, so every label is 0.5."""
    sampling = Sampling(max_new_tokens=3)
    pairs = collected(ChainModel({}, otherwise=20), [[10], [20]], sampling=sampling, missing_eos_penalty=1.0)
    assert pairs.labels.tolist() == [0.5, 0.5]
    assert pairs.identical.all()


def test_a_policy_that_learned_to_end_beats_a_reference_that_is_cut():
    """Only the policy's table is changed, so that 20 is followed by EOS: 1 against 1 - 5."""
    tokenizer = make_tokenizer()
    module = chain_module(
        ChainModel({}, otherwise=20),
        tokenizer,
        reward=PythonReward(one_each),
        sampling=Sampling(max_new_tokens=3),
        missing_eos_penalty=5.0,
    )
    module.configure_model()
    with torch.no_grad():
        module.policy.table.weight[20, tokenizer.eos_token_id] = 200.0
    batch = as_prompts({"prompt": ["x"], "prompt_ids": [[20]]}, module.prompt_encoder, module.device)
    pairs = module.collect(module.policy, batch, noise())
    assert pairs.scores.by_policy.tolist() == [1.0]
    assert pairs.scores.by_reference.tolist() == [-4.0]
    assert pairs.labels.tolist() == [1.0]
