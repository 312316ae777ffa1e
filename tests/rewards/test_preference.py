"""From scores to labels, and the penalty on completions that were cut."""

from typing import Any

import pytest
import torch
from conftest import ChainModel, chain_module, make_tokenizer, noise
from torch import Tensor

from xpo_lightning import Experience, InputError, Sampling
from xpo_lightning.core.batch import Pair
from xpo_lightning.data.prompts import as_prompts
from xpo_lightning.rewards.labels import LabelRule, PairScores, penalize_missing_eos, tempered
from xpo_lightning.rewards.python import PythonReward


def scored(margins: list[float]) -> PairScores:
    return PairScores(Pair(torch.tensor(margins), torch.zeros(len(margins))))


def judged(probabilities: list[float]) -> PairScores:
    wins = torch.tensor(probabilities)
    return PairScores(Pair(wins, 1 - wins), answered=~wins.isnan())


def uniforms(*rows: tuple[float, float]) -> Tensor:
    """The first number of a row draws the winner, the second the flip."""
    return torch.tensor(rows)


# ---- the rules ----


@pytest.mark.parametrize("training", [True, False])
def test_argmax_labels_are_1_for_a_win_0_for_a_loss_and_a_half_for_a_tie(training: bool):
    margins = [0.5, -1.0, 0.0, 1e-7, -0.0]
    labels = LabelRule().label(scored(margins), torch.zeros(5, 2) if training else None)
    assert labels.labels.tolist() == [1.0, 0.0, 0.5, 1.0, 0.5]
    assert labels.labels.dtype == torch.float32
    assert not labels.silent.any()


def test_argmax_of_a_judge_takes_the_side_it_finds_more_probable():
    assert LabelRule().label(judged([0.9, 0.2, 0.5, 0.500001]), None).labels.tolist() == [1.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("rule", ["argmax", "soft"])
def test_labels_of_swapped_sides_are_the_complement(rule: Any):
    margins = torch.randn(50).round()
    label = LabelRule(rule)
    labels, swapped = (label.label(scored((sign * margins).tolist()), torch.rand(50, 2)).labels for sign in (1, -1))
    torch.testing.assert_close(labels + swapped, torch.ones(50))
    assert len(set(labels.tolist())) >= 3


@pytest.mark.parametrize(
    ("ties", "draws", "expected"),
    [
        ("half", [0.1, 0.7], [1.0, 0.5, 0.5, 0.0]),
        ("policy", [0.1, 0.7], [1.0, 1.0, 1.0, 0.0]),
        ("sampler", [0.1, 0.7], [1.0, 0.0, 0.0, 0.0]),
        ("random", [0.1, 0.7], [1.0, 1.0, 0.0, 0.0]),
        ("random", [0.49, 0.5], [1.0, 1.0, 0.0, 0.0]),
        ("random", None, [1.0, 0.5, 0.5, 0.0]),
    ],
    ids=["half", "policy", "sampler", "random", "random_edge", "random_in_validation"],
)
def test_ties_go_where_they_are_told_to(ties: Any, draws: list[float] | None, expected: list[float]):
    """A coin with a number below 0.5 is the policy's. The margins 2 and -3 are no ties, so they take no notice."""
    numbers = None if draws is None else uniforms((0.9, 0.9), (draws[0], 0.9), (draws[1], 0.9), (0.0, 0.9))
    assert LabelRule(ties=ties).label(scored([2.0, 0.0, 0.0, -3.0]), numbers).labels.tolist() == expected


def test_soft_labels_are_sigmoids_of_score_differences_over_the_temperature():
    """sigma(1) = 1 / (1 + e^-1) = 0.7310586. At temperature 2: sigma(0.5) = 1 / (1 + 0.6065307) = 0.6224593."""
    margins = scored([1.0, -1.0, 0.0])
    draws = torch.zeros(3, 2)
    assert LabelRule("soft").label(margins, draws).labels.tolist() == pytest.approx([0.7310586, 0.2689414, 0.5])
    assert LabelRule("soft", temperature=2.0).label(margins, None).labels.tolist() == pytest.approx(
        [0.6224593, 0.3775407, 0.5]
    )


def test_soft_labels_of_a_judge_are_its_probabilities_at_temperature_1():
    probabilities = [0.8, 0.3, 1.0, 0.0]
    assert torch.equal(LabelRule("soft").label(judged(probabilities), None).labels, torch.tensor(probabilities))


def test_temperature_divides_the_log_odds_of_a_judge():
    """0.8 at temperature 2: the roots of 0.8 and 0.2 are 0.8944272 and 0.4472136, whose ratio is 2: 2/3.

    At temperature 0.5 squares: 0.64 against 0.04 is 16/17 = 0.9411765. 0, 1 and 0.5 stay.
    """
    certain = torch.tensor([0.8, 0.0, 1.0, 0.5])
    assert tempered(certain, 2.0).tolist() == pytest.approx([2 / 3, 0.0, 1.0, 0.5])
    assert tempered(certain, 0.5).tolist() == pytest.approx([16 / 17, 0.0, 1.0, 0.5])
    labels = LabelRule("soft", temperature=2.0).label(judged([0.8, 0.0, 1.0, 0.5]), None).labels
    assert labels.tolist() == pytest.approx([2 / 3, 0.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("preferences", "temperature", "probability"),
    [(scored([1.0] * 4), 1.0, 0.7310586), (judged([0.8] * 4), 2.0, 0.6666667)],
    ids=["scores", "judge"],
)
def test_bradley_terry_label_is_1_where_the_number_drawn_is_below_the_probability(
    preferences: PairScores, temperature: float, probability: float
):
    """0.3 and a number just below the probability win, one just above it and 0.99 lose."""
    rule = LabelRule("bradley_terry", temperature=temperature)
    drawn = uniforms((0.3, 0.9), (probability - 1e-4, 0.9), (probability + 1e-4, 0.9), (0.99, 0.9))
    assert rule.label(preferences, drawn).labels.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert rule.label(preferences, None).labels.tolist() == pytest.approx([probability] * 4)


def test_bradley_terry_wins_are_as_frequent_as_they_are_probable():
    """20,000 draws at probability sigma(-0.5) = 0.3775407: a standard error of 0.0034; the seed is fixed."""
    drawn = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    labels = LabelRule("bradley_terry").label(scored([-0.5] * 20_000), drawn).labels
    assert set(labels.tolist()) == {0.0, 1.0}
    assert labels.mean().item() == pytest.approx(0.3775407, abs=0.0105)


# ---- flips, margins and missing answers ----


@pytest.mark.parametrize(
    ("rule", "margins", "straight", "turned"),
    [
        ("argmax", [2.0, -2.0, 0.0], [1.0, 0.0, 0.5], [0.0, 1.0, 0.5]),
        ("soft", [1.0, -1.0, 0.0], [0.7310586, 0.2689414, 0.5], [0.2689414, 0.7310586, 0.5]),
        ("bradley_terry", [9.0, -9.0, 9.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]),
    ],
)
def test_flip_turns_labels_round_where_the_second_number_is_below_it(
    rule: Any, margins: list[float], straight: list[float], turned: list[float]
):
    label = LabelRule(rule, flip=0.2)
    above, below = (label.label(scored(margins), uniforms(*[(0.5, second)] * 3)).labels for second in (0.2, 0.19))
    assert above.tolist() == pytest.approx(straight)
    assert below.tolist() == pytest.approx(turned)


def test_flips_are_as_frequent_as_asked_for_and_do_not_depend_on_the_winner():
    """Of 20,000 pairs half are won. A share of 0.1 is turned round: standard error 0.003 a half; the seed is fixed."""
    drawn = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    labels = LabelRule(flip=0.1).label(scored([1.0, -1.0] * 10_000), drawn).labels
    assert (1 - labels[::2]).mean().item() == pytest.approx(0.1, abs=0.009)
    assert labels[1::2].mean().item() == pytest.approx(0.1, abs=0.009)


def test_pairs_closer_than_the_smallest_margin_are_silent_while_the_policy_trains():
    """0.4 in score, and for a judge the difference of both sides' probabilities: 0.6 - 0.4 = 0.2, 0.75 - 0.25 = 0.5."""
    rule, drawn = LabelRule(min_margin=0.4), torch.full((4, 2), 0.9)
    preferences = scored([0.5, -0.25, 0.0, -0.5])
    labels = rule.label(preferences, drawn)
    assert labels.silent.tolist() == [False, True, True, False]
    assert labels.labels.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert rule.label(judged([0.6, 0.4, 0.75, 0.25]), drawn).silent.tolist() == [True, True, False, False]
    assert not rule.label(preferences, None).silent.any()


def test_a_pair_at_exactly_the_smallest_margin_speaks():
    assert LabelRule(min_margin=0.5).label(scored([0.5, -0.5]), torch.zeros(2, 2)).silent.tolist() == [False, False]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "rule",
    [
        LabelRule(),
        LabelRule(ties="policy", flip=0.4),
        LabelRule("bradley_terry", flip=0.4),
        LabelRule("soft", temperature=2.0, min_margin=0.1),
    ],
    ids=["argmax", "ties", "bradley_terry", "soft"],
)
def test_a_pair_without_an_answer_is_silent_and_its_label_is_a_half(rule: LabelRule, training: bool):
    labels = rule.label(judged([torch.nan, 1.0]), torch.zeros(2, 2) if training else None)
    assert labels.silent.tolist() == [True, False]
    assert labels.labels[0].item() == 0.5
    assert labels.labels[1].item() in (0.0, 1.0)


def test_validation_labels_have_no_randomness():
    rule = LabelRule("bradley_terry", flip=0.4, min_margin=3.0)
    labels = rule.label(scored([1.0, -2.0]), None)
    assert labels.labels.tolist() == pytest.approx([0.7310586, 0.1192029])
    assert not labels.silent.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, r"model\.labels\.rule must be one of argmax, bradley_terry, soft, but is best"),
        ({"ties": "none"}, r"model\.labels\.ties must be one of half, policy, sampler, random, but is none"),
        ({"rule": "soft", "temperature": 0.0}, r"model\.labels\.temperature must be above 0 and finite, but is 0\.0"),
        ({"rule": "soft", "temperature": float("inf")}, r"model\.labels\.temperature"),
        ({"rule": "soft", "temperature": float("nan")}, r"model\.labels\.temperature"),
        ({"flip": 0.5}, r"model\.labels\.flip must be at least 0 and below 0\.5, but is 0\.5"),
        ({"flip": -0.1}, r"model\.labels\.flip"),
        ({"flip": float("nan")}, r"model\.labels\.flip"),
        ({"min_margin": -1.0}, r"model\.labels\.min_margin must be at least 0 and finite, but is -1\.0"),
        ({"min_margin": float("inf")}, r"model\.labels\.min_margin"),
        ({"min_margin": float("nan")}, r"model\.labels\.min_margin"),
        ({"temperature": 2.0}, r"model\.labels\.temperature=2\.0 changes nothing with model\.labels\.rule=argmax"),
        ({"rule": "soft", "ties": "policy"}, r"model\.labels\.ties=policy needs model\.labels\.rule=argmax"),
        ({"rule": "bradley_terry", "ties": "random"}, r"model\.labels\.ties=random needs model\.labels\.rule=argmax"),
    ],
)
def test_label_options_out_of_range_or_without_effect_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        LabelRule(**options)


# ---- completions that were cut ----


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
    return module.collector.collect(module.policy, as_prompts(batch, module.prompt_encoder, module.device), noise())


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
    assert pairs.scores.by_sampler.tolist() == expected
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
    pairs = module.collector.collect(module.policy, batch, noise())
    assert pairs.scores.by_policy.tolist() == [1.0]
    assert pairs.scores.by_sampler.tolist() == [-4.0]
    assert pairs.labels.tolist() == [1.0]
