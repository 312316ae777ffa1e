"""Options of the objective, the labels and the judge, at work in a run: none is without effect."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import PROMPTS, Recorder, fit_quietly, loader, longer_is_better, noise, quiet_trainer
from torch import Tensor

from xpo_lightning import (
    DPOPositiveLoss,
    Experience,
    HingeLoss,
    InputError,
    IPOLoss,
    Judge,
    LabelRule,
    PerIteration,
    PreferenceLoss,
    PythonReward,
    RobustLoss,
    SigmoidLoss,
    XPOLightningModule,
)
from xpo_lightning.data.prompts import as_prompts

MakeModule = Callable[..., XPOLightningModule]
MANY = PROMPTS * 12


def collected(module: XPOLightningModule, *, training: bool = True) -> Experience:
    module.configure_model()
    prompts = as_prompts(MANY, module.prompt_encoder, module.device)
    return module.collector.collect(module.policy, prompts, noise(), training=training)


def margins_of(pairs: Experience) -> Tensor:
    own, others = (
        torch.tensor(longer_is_better([], list(side.texts), {}))
        for side in (pairs.completions.by_policy, pairs.completions.by_sampler)
    )
    return own - others


def step_of(module: XPOLightningModule) -> dict[str, float]:
    """Take a step, and return what was logged of it."""
    recorder = Recorder()
    fit_quietly(module, PROMPTS, callbacks=[recorder])
    (step,) = recorder.steps
    return step


# ---- labels ----


def test_soft_labels_are_the_sigmoids_of_the_margins_in_training_and_in_validation(make_module: MakeModule):
    for training in (True, False):
        pairs = collected(make_module(labels=LabelRule("soft", temperature=2.0)), training=training)
        assert pairs.labels.tolist() == pytest.approx(torch.sigmoid(margins_of(pairs) / 2).tolist(), abs=1e-6)


def test_bradley_terry_labels_are_drawn_in_training_and_expected_in_validation(make_module: MakeModule):
    module = make_module(labels=LabelRule("bradley_terry"))
    pairs = collected(module)
    assert set(pairs.labels.tolist()) == {0.0, 1.0}
    against = ((pairs.labels - 0.5) * margins_of(pairs) < 0).sum()
    assert 0 < against < len(pairs) / 2, "the worse one wins at times"
    held_out = collected(module, training=False)
    assert held_out.labels.tolist() == pytest.approx(torch.sigmoid(margins_of(held_out)).tolist(), abs=1e-6)


def test_flips_and_margins_are_of_training_alone(make_module: MakeModule):
    straight = collected(make_module())
    flipped = collected(make_module(labels=LabelRule(flip=0.3)))
    assert straight.completions.by_policy.texts == flipped.completions.by_policy.texts
    turned = (straight.labels != flipped.labels).float().mean()
    assert 0.1 < turned < 0.5
    close = make_module(labels=LabelRule(min_margin=3.0))
    assert torch.equal(collected(close).silent, margins_of(straight).abs() < 3.0)
    assert not collected(close, training=False).silent.any()
    held_out = collected(make_module(labels=LabelRule(flip=0.3)), training=False)
    assert torch.equal(held_out.labels, (torch.sign(margins_of(held_out)) + 1) / 2)


def test_pairs_within_the_margin_train_on_the_bonus_alone(make_module: MakeModule):
    step = step_of(make_module(labels=LabelRule(min_margin=1e6), alpha=0.1))
    assert step["loss/dpo"] == 0.0
    assert step["pairs/silent"] == 1.0
    assert step["loss/total"] == pytest.approx(0.1 * step["logps/reference_completions"])
    assert step["grad_norm"] > 0


@pytest.mark.parametrize(
    ("ties", "label"), [("half", {0.5}), ("policy", {1.0}), ("sampler", {0.0}), ("random", {0.0, 1.0})]
)
def test_ties_go_where_the_rule_says(make_module: MakeModule, ties: Any, label: set[float]):
    constant = PythonReward(lambda prompts, completions, columns: [1.0] * len(completions))
    assert set(collected(make_module(reward=constant, labels=LabelRule(ties=ties))).labels.tolist()) == label


# ---- the loss ----


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (SigmoidLoss(), math.log(2)),
        (IPOLoss(), (1 / (2 * 0.1)) ** 2),
        (HingeLoss(), 1.0),
        (RobustLoss(flip_rate=0.2), math.log(2)),
        (DPOPositiveLoss(), math.log(2)),
        (SigmoidLoss(length_normalized=True), math.log(2)),
    ],
    ids=["sigmoid", "ipo", "hinge", "robust", "dpo_positive", "length_normalized"],
)
def test_first_loss_is_that_of_a_margin_of_zero(make_module: MakeModule, loss: PreferenceLoss, expected: float):
    """Policy and reference are equal at first, so each log-ratio is 0, whatever the labels."""
    step = step_of(make_module(preference_loss=loss, alpha=0.0, beta=0.1))
    assert step["loss/dpo"] == pytest.approx(expected * (1 - step["pairs/identical"]), rel=1e-3)


def test_the_positive_penalty_begins_above_rounding(make_module: MakeModule):
    """At first the preferred one has lost nothing but rounding, which differs with the size of a forward pass."""
    first = [step_of(make_module(preference_loss=DPOPositiveLoss(), micro_batch_size=size)) for size in (1, 2, 3, None)]
    plain = step_of(make_module())
    assert [step["grad_norm"] for step in first] == pytest.approx([plain["grad_norm"]] * 4, rel=1e-3)


def test_length_normalisation_changes_the_step(make_module: MakeModule):
    """The gradient of a log-ratio per token is a fraction of that of the sum: completions have 6 at most."""
    whole, each = (
        step_of(make_module(preference_loss=SigmoidLoss(length_normalized=flag), alpha=0.0))["grad_norm"]
        for flag in (False, True)
    )
    assert whole / 6.5 < each < whole / 3


@pytest.mark.parametrize("bonus_on", ["sampler", "both", "rejected"])
def test_exploration_is_on_the_completions_that_are_asked_for(make_module: MakeModule, bonus_on: Any):
    step = step_of(make_module(bonus_on=bonus_on, alpha=0.25))
    expected = {
        "sampler": step["logps/reference_completions"],
        "both": step["logps/chosen"] + step["logps/rejected"],
        "rejected": step["logps/rejected"],
    }[bonus_on]
    assert step["loss/xpo"] == pytest.approx(0.25 * expected, rel=1e-5)
    assert len({round(value, 4) for value in (step["logps/reference_completions"], step["logps/rejected"])}) == 2


def test_alpha_may_be_given_in_units_of_beta(make_module: MakeModule):
    step = step_of(make_module(alpha=0.05, beta=0.4, alpha_in_beta=True))
    assert step["alpha"] == pytest.approx(0.02)
    assert step["loss/xpo"] == pytest.approx(0.02 * step["logps/reference_completions"])


def test_entropy_bonus_is_taken_from_the_loss_and_raises_the_entropy(make_module: MakeModule):
    step = step_of(make_module(entropy_bonus=0.7))
    assert 0 < step["objective/token_entropy"] < math.log(304)
    assert step["loss/total"] == pytest.approx(
        step["loss/dpo"] + step["loss/xpo"] - 0.7 * step["objective/token_entropy"], rel=1e-5
    )
    entropies = []
    for weight in (1e-6, 5.0):
        module, recorder = make_module(entropy_bonus=weight, learning_rate=0.01, alpha=0.0), Recorder()
        fit_quietly(module, MANY, batch_size=10, callbacks=[recorder])
        entropies.append(recorder.of("objective/token_entropy"))  # of the distributions; that of samples varies by 1
    assert entropies[1][0] == entropies[0][0], "the first step is taken from the same weights"
    assert entropies[1][-1] > entropies[0][-1] + 0.3, "4.84 to 4.89 against 4.19 to 4.44 with eight seeds"


def test_alpha_may_change_from_iteration_to_iteration(make_module: MakeModule):
    recorder = Recorder()
    module = make_module(alpha=PerIteration([1e-5, 5e-6, 0.0], batches=2), updates_per_rollout=2)
    fit_quietly(module, PROMPTS[:2] * 7, batch_size=2, callbacks=[recorder])
    assert recorder.of("alpha") == pytest.approx([1e-5, 1e-5, 5e-6, 5e-6, 0.0, 0.0, 0.0])


# ---- judges ----


class Longer(Judge):
    """Finds the longer completion better with probability 0.9, and says nothing about some prompts."""

    def __init__(self, invalid: Any = "skip", silent_about: str = "nothing") -> None:
        super().__init__(invalid)
        self.silent_about = silent_about
        self.asked: list[tuple[str, str]] = []

    def compare(self, prompts: Any, firsts: Any, seconds: Any, columns: Any) -> Tensor:
        self.asked += zip(firsts, seconds, strict=True)
        answers = [
            math.nan if self.silent_about in prompt else 0.9 if len(a) > len(b) else 0.5 if len(a) == len(b) else 0.1
            for prompt, a, b in zip(prompts, firsts, seconds, strict=True)
        ]
        return torch.tensor(answers)


@pytest.mark.parametrize(("rule", "certain"), [("argmax", 1.0), ("soft", 0.9)])
def test_a_judges_answers_become_labels_and_scores(make_module: MakeModule, rule: Any, certain: float):
    pairs = collected(make_module(reward=Longer(), labels=LabelRule(rule)))
    for row in range(len(pairs)):
        own, other = (len(side.texts[row]) for side in (pairs.completions.by_policy, pairs.completions.by_sampler))
        label = certain if own > other else 0.5 if own == other else 1 - certain
        assert pairs.labels[row].item() == pytest.approx(label)
        assert pairs.scores.by_policy[row].item() + pairs.scores.by_sampler[row].item() == pytest.approx(1.0)


def test_completions_of_one_text_are_not_shown_to_a_judge(make_module: MakeModule):
    judge = Longer()
    pairs = collected(make_module(reward=judge, sampling=type(make_module().sampling)(max_new_tokens=1, top_k=2)))
    both = list(zip(pairs.completions.by_policy.texts, pairs.completions.by_sampler.texts, strict=True))
    same = [one == other for one, other in both]
    assert any(same)
    assert judge.asked == [pair for pair, equal in zip(both, same, strict=True) if not equal]
    assert all(label == 0.5 for label, equal in zip(pairs.labels.tolist(), same, strict=True) if equal)


def test_pairs_without_an_answer_are_skipped_or_tied_or_end_the_run(make_module: MakeModule):
    """The prompts with a dog, one of five, get no answer."""
    pairs = {
        invalid: collected(make_module(reward=Longer(invalid, "dog"), labels=LabelRule("soft")))
        for invalid in ("skip", "tie")
    }
    silent = [("dog" in prompt) for prompt in MANY]
    for invalid, found in pairs.items():
        assert found.answered.tolist() == [not one for one in silent]
        assert found.silent.tolist() == (silent if invalid == "skip" else [False] * len(MANY))
        assert all(label == 0.5 for label, one in zip(found.labels.tolist(), silent, strict=True) if one)
    with pytest.raises(InputError, match=r"Longer gave no usable answer for 12 of \d+ pairs; set .*invalid to skip"):
        collected(make_module(reward=Longer("error", "dog")))
    assert step_of(make_module(reward=Longer("skip", "dog")))["pairs/unanswered"] == pytest.approx(0.2)


@pytest.mark.parametrize("invalid", ["skip", "tie"])
def test_a_judge_decides_the_win_rate_of_validation(make_module: MakeModule, invalid: str):
    """A pair without an answer is half a win, or left out."""
    module = make_module(reward=Longer(invalid, silent_about="dog"))
    (numbers,) = quiet_trainer().validate(module, loader(MANY), verbose=False)
    pairs = module.collector.collect(
        module.policy, as_prompts(MANY, module.prompt_encoder, module.device), module._rng(1, 0)
    )
    lengths = [
        (len(own), len(other), "dog" in prompt)
        for own, other, prompt in zip(
            pairs.completions.by_policy.texts, pairs.completions.by_sampler.texts, MANY, strict=True
        )
    ]
    counted = [length for length in lengths if invalid == "tie" or not length[2]]
    wins = torch.tensor([0.5 if silent or own == other else float(own > other) for own, other, silent in counted])
    assert numbers["eval/win_rate"] == pytest.approx(float(wins.mean()))
    assert numbers["eval/win_rate_stderr"] == pytest.approx(float(wins.std() / len(wins) ** 0.5), rel=1e-4)
    scores = [0.5 if silent or own == other else 0.9 if own > other else 0.1 for own, other, silent in counted]
    assert numbers["eval/objective/model_scores"] == pytest.approx(sum(scores) / len(scores))
    assert numbers["eval/pairs/unanswered"] == pytest.approx(0.2)


def test_a_judge_that_raises_ends_the_run_with_its_own_message(make_module: MakeModule):
    class Broken(Judge):
        def compare(self, prompts: Any, firsts: Any, seconds: Any, columns: Any) -> Tensor:
            raise StopIteration("no more patience")

    with pytest.raises(InputError, match=r"judge .*Broken raised StopIteration: no more patience"):
        step_of(make_module(reward=Broken()))


@pytest.mark.parametrize("option", [{"entropy_bonus": -1.0}, {"entropy_bonus": math.inf}, {"bonus_clip": 0.0}])
def test_values_out_of_range_are_refused(make_module: MakeModule, option: dict[str, float]):
    with pytest.raises(InputError, match=rf"model\.{next(iter(option))} must be"):
        make_module(**option)
