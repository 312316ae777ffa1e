"""The XPO objective, against numbers worked by hand, and the optimizer step that is taken on it."""

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, Recorder, fit_quietly
from torch import Tensor, nn
from torch.optim import SGD

from xpo_lightning import Experience, InputError, Pair
from xpo_lightning.losses.preference import DPOPositiveLoss, HingeLoss, IPOLoss, PreferenceLoss, RobustLoss, SigmoidLoss
from xpo_lightning.losses.xpo import XPOLoss, xpo_loss

LOSSES = {
    "sigmoid": SigmoidLoss,
    "ipo": IPOLoss,
    "hinge": HingeLoss,
    "robust": partial(RobustLoss, 0.2),
    "positive": partial(DPOPositiveLoss, 3.0),
}
SMOOTHED = ["sigmoid", "ipo", "hinge", "positive"]


def leaf(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def worked(label: float, loss: PreferenceLoss, **options: Any) -> tuple[XPOLoss, Pair[Tensor]]:
    """Evaluate the pair of the docstrings below: log-ratios -10 + 12 = 2 and -20 + 15 = -5, so a margin of 7."""
    policy = Pair(leaf([-10.0]), leaf([-20.0]))
    reference = Pair(torch.tensor([-12.0], dtype=torch.float64), torch.tensor([-15.0], dtype=torch.float64))
    options = {"alpha": 0.01, "beta": 0.1, **options}
    silent = torch.tensor([options.pop("silent", False)])
    labels = torch.tensor([label], dtype=torch.float64)
    return xpo_loss(policy, reference, labels, silent, preference_loss=loss, **options), policy


@pytest.mark.parametrize(
    ("label", "expected"), [(1.0, 0.4031860), (0.0, 1.1031860), (0.5, 0.7531860)], ids=["won", "lost", "tied"]
)
def test_sigmoid_loss_with_margin_7_gives_the_worked_number(label: float, expected: float):
    """beta 0.1 times margin 7 is 0.7.

    Won: log(1 + e^-0.7) = log 1.4965853 = 0.4031860. Lost: log(1 + e^0.7) = log 3.0137527 = 1.1031860.
    Tied: the mean, 0.7531860. Bonus: 0.01 * -20 = -0.2.
    """
    loss, _ = worked(label, SigmoidLoss())
    assert loss.preference.item() == pytest.approx(expected, abs=1e-6)
    assert loss.bonus.item() == pytest.approx(-0.2)
    assert loss.total.item() == pytest.approx(expected - 0.2, abs=1e-6)


@pytest.mark.parametrize(("label", "expected"), [(1.0, 4.0), (0.0, 144.0), (0.25, 109.0)], ids=["won", "lost", "soft"])
def test_ipo_loss_with_margin_7_gives_the_worked_number(label: float, expected: float):
    """1 / (2 * 0.1) = 5. Won: (7 - 5)^2 = 4. Lost: (-7 - 5)^2 = 144. Soft 0.25: 0.25 * 4 + 0.75 * 144 = 109."""
    loss, _ = worked(label, IPOLoss())
    assert loss.preference.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("label", "beta", "expected"),
    [(1.0, 0.1, 0.3), (0.0, 0.1, 1.7), (0.5, 0.1, 1.0), (0.25, 0.1, 1.35), (1.0, 0.2, 0.0), (0.0, 0.2, 2.4)],
    ids=["won", "lost", "tied", "soft", "won_beyond_the_hinge", "lost_beyond_the_hinge"],
)
def test_hinge_loss_with_margin_7_gives_the_worked_number(label: float, beta: float, expected: float):
    """Beta 0.1. Won: 1 - 0.7 = 0.3. Lost: 1 + 0.7 = 1.7. Tied: the mean, 1. Soft: 0.25 * 0.3 + 0.75 * 1.7 = 1.35.

    Beta 0.2. Won: 1 - 1.4 is below 0, so 0. Lost: 2.4.
    """
    loss, _ = worked(label, HingeLoss(), beta=beta)
    assert loss.preference.item() == pytest.approx(expected)


@pytest.mark.parametrize(("beta", "gradient"), [(0.1, -0.1), (0.2, 0.0)], ids=["inside", "beyond"])
def test_hinge_loss_has_gradient_minus_beta_up_to_the_hinge_and_none_beyond(beta: float, gradient: float):
    loss, policy = worked(1.0, HingeLoss(), beta=beta)
    loss.preference.sum().backward()
    assert policy.by_policy.grad.tolist() == [gradient]
    assert policy.by_sampler.grad.tolist() == [-gradient]


@pytest.mark.parametrize(
    ("label", "flip_rate", "expected"),
    [
        (1.0, 0.2, 0.1698527),
        (0.0, 0.2, 1.3365193),
        (0.5, 0.2, 0.7531860),
        (0.25, 0.2, 1.0448527),
        (1.0, 0.0, 0.4031860),
    ],
    ids=["won", "lost", "tied", "soft", "none_flipped"],
)
def test_robust_loss_with_margin_7_gives_the_worked_number(label: float, flip_rate: float, expected: float):
    """The sigmoid loss is 0.4031860 won and 1.1031860 lost; s = 0.2, so 1 - 2s = 0.6.

    Won: (0.8 * 0.4031860 - 0.2 * 1.1031860) / 0.6 = (0.3225488 - 0.2206372) / 0.6 = 0.1698527.
    Lost: (0.8 * 1.1031860 - 0.2 * 0.4031860) / 0.6 = (0.8825488 - 0.0806372) / 0.6 = 1.3365193.
    Tied: the mean, 0.7531860. Soft 0.25: 0.0424632 + 1.0023895 = 1.0448527.
    """
    loss, _ = worked(label, RobustLoss(flip_rate))
    assert loss.preference.item() == pytest.approx(expected, abs=2e-7)


def test_robust_loss_of_flipped_labels_is_the_sigmoid_loss_of_the_true_ones_on_average():
    """With label 1 and a share of 0.3 turned round: 0.7 of the pairs keep 1, and 0.3 get 0."""
    kept, turned = (worked(label, RobustLoss(0.3))[0].preference.item() for label in (1.0, 0.0))
    true = worked(1.0, SigmoidLoss())[0].preference.item()
    assert 0.7 * kept + 0.3 * turned == pytest.approx(true, abs=1e-12)


@pytest.mark.parametrize(
    ("label", "penalty", "expected"),
    [
        (1.0, 3.0, 0.4031860),
        (0.0, 3.0, 2.3050833),
        (0.5, 3.0, 1.3541347),
        (0.25, 3.0, 1.8296090),
        (0.0, 0.0, 1.1031860),
        (0.0, 50.0, 25.7),
    ],
    ids=["won", "lost", "tied", "soft", "no_penalty", "usual_penalty"],
)
def test_dpo_positive_loss_gives_the_worked_number(label: float, penalty: float, expected: float):
    """Won: the preferred completion's log-ratio is 2, above 0, so the sigmoid loss of margin 7: 0.4031860.

    Lost: the margin is -7 and the preferred log-ratio -5, so beta * (-7 - 3 * 5) = -2.2, and
    log(1 + e^2.2) = 2.2 + log 1.1108032 = 2.3050833. Tied: the mean, 1.3541347.
    Soft 0.25: 0.25 * 0.4031860 + 0.75 * 2.3050833 = 1.8296090.
    Penalty 50: beta * (-7 - 250) = -25.7, and log(1 + e^25.7) is 25.7.
    """
    loss, _ = worked(label, DPOPositiveLoss(penalty))
    assert loss.preference.item() == pytest.approx(expected, abs=1e-6)


def test_dpo_positive_penalty_raises_the_preferred_completion_and_no_other():
    """Lost, so the sampler's is preferred, at log-ratio -5: beta * (-7 - 3 * 5) = -2.2 and sigma(2.2) = 0.9002495.

    Its derivative is -beta * sigma * (1 + 3) = -0.3600998, the other's is beta * sigma = 0.0900250.
    """
    loss, policy = worked(0.0, DPOPositiveLoss(3.0))
    loss.preference.sum().backward()
    assert policy.by_sampler.grad.item() == pytest.approx(-0.3600998, abs=1e-7)
    assert policy.by_policy.grad.item() == pytest.approx(0.0900250, abs=1e-7)


@pytest.mark.parametrize(
    ("loss", "label", "expected"),
    [
        (SigmoidLoss(length_normalized=True), 1.0, 0.6209570),
        (SigmoidLoss(length_normalized=True), 0.0, 0.7709570),
        (IPOLoss(length_normalized=True), 1.0, 12.25),
        (HingeLoss(length_normalized=True), 1.0, 0.85),
        (RobustLoss(0.2, length_normalized=True), 1.0, 0.5709570),
        (DPOPositiveLoss(3.0, length_normalized=True), 0.0, 0.9432489),
        (SigmoidLoss(0.1, length_normalized=True), 1.0, 0.6359570),
    ],
    ids=["sigmoid-won", "sigmoid-lost", "ipo", "hinge", "robust", "positive", "smoothed"],
)
def test_length_normalized_losses_divide_log_ratios_by_tokens(loss: PreferenceLoss, label: float, expected: float):
    """The log-ratios 2 of 4 tokens and -5 of 5 tokens are 0.5 and -1 a token: a margin of 1.5, times 0.1 is 0.15.

    Sigmoid, won: log(1 + e^-0.15) = 0.6209570. Lost: 0.15 more. IPO: (1.5 - 5)^2 = 12.25. Hinge: 1 - 0.15 = 0.85.
    Robust, won, s = 0.2: (0.8 * 0.6209570 - 0.2 * 0.7709570) / 0.6 = 0.5709570.
    Positive, lost: 0.1 * (-1.5 - 3 * 1) = -0.45, and log(1 + e^0.45) = 0.45 + log 1.6376282 = 0.9432489.
    Smoothed by 0.1, won: 0.9 * 0.6209570 + 0.1 * 0.7709570 = 0.6359570.
    """
    lengths = Pair(torch.tensor([4]), torch.tensor([5]))
    evaluated, _ = worked(label, loss, lengths=lengths)
    assert evaluated.preference.item() == pytest.approx(expected, abs=1e-6)
    assert evaluated.bonus.item() == pytest.approx(-0.2)
    assert evaluated.log_ratios.by_sampler.item() == -5.0


@pytest.mark.parametrize("kind", LOSSES.values(), ids=LOSSES)
def test_lengths_change_nothing_unless_a_loss_is_length_normalized(kind: Callable[..., PreferenceLoss]):
    lengths = Pair(torch.tensor([4]), torch.tensor([5]))
    plain, with_lengths, normalized = (
        worked(0.25, kind(length_normalized=on), lengths=given)[0].preference
        for on, given in ((False, None), (False, lengths), (True, lengths))
    )
    assert torch.equal(plain, with_lengths)
    assert abs(plain - normalized).item() > 0.01


def test_length_normalized_loss_without_lengths_is_an_error():
    with pytest.raises(ValueError, match="needs the completions' lengths"):
        worked(1.0, SigmoidLoss(length_normalized=True))


@pytest.mark.parametrize(
    ("loss", "label", "expected"),
    [
        (SigmoidLoss(label_smoothing=0.1), 1.0, 0.4731860),
        (SigmoidLoss(label_smoothing=0.1), 0.0, 1.0331860),
        (SigmoidLoss(label_smoothing=0.1), 0.25, 0.8931860),
        (IPOLoss(label_smoothing=0.25), 1.0, 39.0),
        (HingeLoss(label_smoothing=0.1), 1.0, 0.44),
        (DPOPositiveLoss(3.0, label_smoothing=0.1), 1.0, 0.5933757),
    ],
    ids=["sigmoid-won", "sigmoid-lost", "sigmoid-soft", "ipo-won", "hinge-won", "positive-won"],
)
def test_label_smoothing_when_set_mixes_both_orders(loss: PreferenceLoss, label: float, expected: float):
    """The label p becomes (1 - s) p + s (1 - p), and the loss is p * won + (1 - p) * lost.

    Sigmoid, won: 0.9 * 0.4031860 + 0.1 * 1.1031860 = 0.4731860. Lost: 0.1 and 0.9, 1.0331860.
    Soft 0.25: 0.9 * 0.25 + 0.1 * 0.75 = 0.3; 0.3 * 0.4031860 + 0.7 * 1.1031860 = 0.8931860.
    IPO, won, s = 0.25: 0.75 * 4 + 0.25 * 144 = 39. Hinge, won: 0.9 * 0.3 + 0.1 * 1.7 = 0.44.
    Positive, won: 0.9 * 0.4031860 + 0.1 * 2.3050833 = 0.5933757.
    """
    evaluated, _ = worked(label, loss)
    assert evaluated.preference.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [-0.1, 0.5, 1.0, float("nan")])
@pytest.mark.parametrize("kind", LOSSES.values(), ids=LOSSES)
def test_label_smoothing_when_out_of_range_is_refused(kind: Callable[..., PreferenceLoss], value: float):
    with pytest.raises(InputError, match=r"label_smoothing must be at least 0 and below 0\.5"):
        kind(label_smoothing=value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(RobustLoss, 0.5), r"init_args\.flip_rate must be at least 0 and below 0\.5, but is 0\.5"),
        (partial(RobustLoss, -0.1), r"init_args\.flip_rate"),
        (partial(RobustLoss, float("nan")), r"init_args\.flip_rate"),
        (partial(RobustLoss, 0.2, label_smoothing=0.1), r"init_args\.label_smoothing=0\.1 does not go with RobustLoss"),
        (partial(DPOPositiveLoss, -1.0), r"init_args\.penalty must be at least 0 and finite, but is -1\.0"),
        (partial(DPOPositiveLoss, float("inf")), r"init_args\.penalty"),
        (partial(DPOPositiveLoss, float("nan")), r"init_args\.penalty"),
    ],
)
def test_loss_options_that_make_no_sense_are_refused(build: Callable[[], PreferenceLoss], message: str):
    with pytest.raises(InputError, match=rf"model\.preference_loss\.{message}"):
        build()


def loop_loss(kind: str, ratios: tuple[float, float], label: float, smoothing: float, beta: float) -> float:
    """Work the preference loss of one pair in plain Python."""
    label = (1 - smoothing) * label + smoothing * (1 - label)

    def sigmoid(scaled: float) -> float:
        return math.log1p(math.exp(-scaled))

    def preferred(chosen: float, rejected: float) -> float:
        margin = chosen - rejected
        return {
            "sigmoid": sigmoid(beta * margin),
            "ipo": (margin - 0.5 / beta) ** 2,
            "hinge": max(0.0, 1 - beta * margin),
            "robust": (0.8 * sigmoid(beta * margin) - 0.2 * sigmoid(-beta * margin)) / 0.6,
            "positive": sigmoid(beta * (margin - 3 * max(0.0, -chosen))),
        }[kind]

    return label * preferred(*ratios) + (1 - label) * preferred(*ratios[::-1])


@pytest.mark.parametrize(
    ("kind", "smoothing"), [*((kind, 0.0) for kind in LOSSES), *((kind, 0.2) for kind in SMOOTHED)]
)
def test_xpo_loss_on_random_pairs_equals_a_python_loop(kind: str, smoothing: float):
    chance = random.Random(0)
    rows = [[chance.uniform(-60, -1) for _ in range(4)] for _ in range(50)]
    labels = [chance.choice([0.0, 0.3, 0.5, 1.0]) for _ in rows]
    same = [chance.random() < 0.2 for _ in rows]
    alpha, beta = 0.03, 0.25
    columns = torch.tensor(rows, dtype=torch.float64).T
    loss = xpo_loss(
        Pair(columns[0], columns[1]),
        Pair(columns[2], columns[3]),
        torch.tensor(labels, dtype=torch.float64),
        torch.tensor(same),
        alpha=alpha,
        beta=beta,
        preference_loss=LOSSES[kind](label_smoothing=smoothing),
    )
    for number, (a, b, c, d) in enumerate(rows):
        expected = 0.0 if same[number] else loop_loss(kind, (a - c, b - d), labels[number], smoothing, beta)
        assert loss.preference[number].item() == pytest.approx(expected, abs=1e-12)
        assert loss.bonus[number].item() == pytest.approx(alpha * b)
        assert loss.total[number].item() == pytest.approx(expected + alpha * b, abs=1e-12)
        assert loss.log_ratios.by_policy[number].item() == pytest.approx(a - c)
        assert loss.log_ratios.by_sampler[number].item() == pytest.approx(b - d)


def test_bonus_without_preference_weight_pushes_the_samplers_completion_down_by_alpha():
    """With beta 0 the sigmoid loss is log 2 whatever the margin, so the bonus alone has a gradient: +alpha.

    The objective is minimised: a positive derivative lowers log pi(sampler's completion).
    """
    loss, policy = worked(1.0, SigmoidLoss(), beta=0.0)
    loss.total.sum().backward()
    assert policy.by_sampler.grad.tolist() == [0.01]
    assert policy.by_policy.grad.tolist() == [0.0]


@pytest.mark.parametrize("label", [1.0, 0.0], ids=["won", "lost"])
def test_total_gradient_is_the_bonus_plus_that_of_the_preference(label: float):
    """d/dm of log(1 + e^(-beta m)) is -beta sigma(-beta m), and m = ratio(policy's) - ratio(sampler's).

    Won: sigma(-0.7) = 1 / (1 + 2.0137527) = 0.3318122, times beta 0.1 is 0.0331812: the policy's completion gets
    -0.0331812 and the sampler's alpha + 0.0331812 = 0.0431812.
    Lost: sigma(0.7) = 0.6681878: the policy's gets +0.0668188 and the sampler's 0.01 - 0.0668188 = -0.0568188.
    """
    loss, policy = worked(label, SigmoidLoss())
    loss.total.sum().backward()
    expected = (-0.0331812, 0.0431812) if label else (0.0668188, -0.0568188)
    assert policy.by_policy.grad.item() == pytest.approx(expected[0], abs=1e-7)
    assert policy.by_sampler.grad.item() == pytest.approx(expected[1], abs=1e-7)


def test_alpha_0_equals_online_dpo_exactly():
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (-40 * torch.rand(20, generator=generator) for _ in range(4))
    labels = (torch.arange(20) % 2).float()
    grads = []
    for dpo in (False, True):
        first, second = a.clone().requires_grad_(), b.clone().requires_grad_()
        if dpo:
            chosen = torch.where(labels == 1, first - c, second - d)
            rejected = torch.where(labels == 1, second - d, first - c)
            total = -nn.functional.logsigmoid(0.1 * (chosen - rejected))
        else:
            none = torch.zeros(20, dtype=torch.bool)
            options = {"alpha": 0.0, "beta": 0.1, "preference_loss": SigmoidLoss()}
            total = xpo_loss(Pair(first, second), Pair(c, d), labels, none, **options).total
        total.sum().backward()
        grads.append((total.detach(), first.grad, second.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", LOSSES.values(), ids=LOSSES)
def test_silent_pair_keeps_the_bonus_and_nothing_else(kind: Callable[..., PreferenceLoss]):
    """Preference 0 with gradient 0; bonus 0.01 * -20 = -0.2 with gradient alpha = 0.01."""
    loss, policy = worked(0.5, kind(), silent=True)
    assert loss.preference.item() == 0.0
    assert loss.bonus.item() == pytest.approx(-0.2)
    loss.total.sum().backward()
    assert policy.by_policy.grad.item() == 0.0
    assert policy.by_sampler.grad.item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("bonus_on", "label", "bonus", "gradients"),
    [
        ("sampler", 1.0, -0.2, (0.0, 0.01)),
        ("sampler", 0.0, -0.2, (0.0, 0.01)),
        ("both", 1.0, -0.3, (0.01, 0.01)),
        ("both", 0.0, -0.3, (0.01, 0.01)),
        ("rejected", 1.0, -0.2, (0.0, 0.01)),
        ("rejected", 0.0, -0.1, (0.01, 0.0)),
        ("rejected", 0.5, -0.15, (0.005, 0.005)),
        ("rejected", 0.75, -0.175, (0.0025, 0.0075)),
    ],
)
@pytest.mark.parametrize("silent", [False, True], ids=["speaking", "silent"])
def test_bonus_is_on_the_completions_that_it_is_meant_for(
    bonus_on: Any, label: float, bonus: float, gradients: tuple[float, float], silent: bool
):
    """Log pi is -10 of the policy's completion and -20 of the sampler's; alpha is 0.01.

    Both: 0.01 * (-10 - 20) = -0.3. Rejected with label 0.75: 0.01 * (0.75 * -20 + 0.25 * -10) = -0.175.
    The objective is minimised, so gradients above 0 push the log-probabilities down.
    """
    loss, policy = worked(label, SigmoidLoss(), bonus_on=bonus_on, silent=silent)
    assert loss.bonus.item() == pytest.approx(bonus)
    assert (loss.preference.item() == 0) == silent
    loss.bonus.sum().backward()
    by_policy, by_sampler = (
        0.0 if side.grad is None else side.grad.item() for side in (policy.by_policy, policy.by_sampler)
    )
    assert (by_policy, by_sampler) == pytest.approx(gradients)


def test_bonus_on_anything_else_is_refused():
    with pytest.raises(InputError, match=r"model\.bonus_on must be 'sampler', 'both' or 'rejected', but is 'chosen'"):
        worked(1.0, SigmoidLoss(), bonus_on="chosen")


@pytest.mark.parametrize(
    ("bonus_on", "bonus", "gradients"),
    [("both", -0.29, (0.01, 0.0)), ("rejected", -0.19, (0.0025, 0.0))],
)
def test_bonus_clip_bounds_each_log_ratio_by_itself(bonus_on: Any, bonus: float, gradients: tuple[float, float]):
    """The log-ratios are 2 and -5, so at 4 the sampler's log pi becomes -15 - 4 = -19 and has no gradient.

    Both: 0.01 * (-10 - 19) = -0.29. Rejected with label 1: 0.01 * -19 = -0.19; with label 0.75 the policy's completion
    has a quarter of the gradient.
    """
    loss, _ = worked(1.0, SigmoidLoss(), bonus_on=bonus_on, bonus_clip=4.0)
    assert loss.bonus.item() == pytest.approx(bonus)
    soft, policy = worked(0.75, SigmoidLoss(), bonus_on=bonus_on, bonus_clip=4.0)
    soft.bonus.sum().backward()
    assert (policy.by_policy.grad.item(), policy.by_sampler.grad.item()) == pytest.approx(gradients)


# ---- entropy ----


def test_entropy_is_maximised_by_its_weight():
    """0.5 times 3 nats are taken from the objective: 0.4031860 - 0.2 - 1.5; raising the entropy lowers it."""
    entropies = leaf([3.0])
    loss, _ = worked(1.0, SigmoidLoss(), entropies=entropies, entropy_weight=0.5)
    assert loss.entropy.tolist() == [-1.5]
    assert loss.total.item() == pytest.approx(0.4031860 - 0.2 - 1.5, abs=1e-6)
    loss.total.sum().backward()
    assert entropies.grad.tolist() == [-0.5]


def test_silent_pair_keeps_its_entropy_term():
    loss, _ = worked(0.5, SigmoidLoss(), silent=True, entropies=leaf([3.0]), entropy_weight=0.5)
    assert loss.entropy.tolist() == [-1.5]


@pytest.mark.parametrize("given", [False, True], ids=["missing", "measured"])
def test_entropy_term_without_a_weight_is_0(given: bool):
    loss, _ = worked(1.0, SigmoidLoss(), entropies=leaf([3.0]) if given else None)
    assert loss.entropy.tolist() == [0.0]
    assert torch.equal(loss.total, loss.preference + loss.bonus)


def test_entropy_weight_without_entropies_is_an_error():
    with pytest.raises(ValueError, match="needs the policy's entropies"):
        worked(1.0, SigmoidLoss(), entropy_weight=0.1)


# ---- the bonus's clip ----


@pytest.mark.parametrize(
    ("clip", "bonus", "gradient"),
    [(None, -0.20, 0.01), (6.0, -0.20, 0.01), (3.0, -0.18, 0.0)],
    ids=["off", "inside", "beyond"],
)
def test_bonus_clip_bounds_the_log_ratio_inside_the_bonus(clip: float | None, bonus: float, gradient: float):
    """The sampler's completion has log ref = -15 and log pi = -20, a log-ratio of -5.

    Clipped at 6 nothing changes: 0.01 * -20 = -0.2. Clipped at 3: 0.01 * (-15 - 3) = -0.18, with no gradient.
    The preference term is never clipped.
    """
    loss, policy = worked(1.0, SigmoidLoss(), bonus_clip=clip)
    assert loss.bonus.item() == pytest.approx(bonus)
    assert loss.preference.item() == pytest.approx(0.4031860, abs=1e-6)
    loss.bonus.sum().backward()
    assert policy.by_sampler.grad.item() == pytest.approx(gradient)


def test_bonus_clip_bounds_log_ratios_above_as_well_as_below():
    """Log ref is -15: log-ratios -9, 1 and 9 clipped at 4 give -15 - 4 = -19, -15 + 1 = -14 and -15 + 4 = -11."""
    policy, reference = leaf([-24.0, -14.0, -6.0]), leaf([-15.0, -15.0, -15.0]).detach()
    zero = torch.zeros_like(reference)
    options = {"alpha": 1.0, "beta": 0.1, "preference_loss": SigmoidLoss(), "bonus_clip": 4.0}
    loss = xpo_loss(Pair(zero, policy), Pair(zero, reference), zero, zero.bool(), **options)
    assert loss.bonus.tolist() == [-19.0, -14.0, -11.0]
    loss.bonus.sum().backward()
    assert policy.grad.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("edge", [-4.0, 4.0])
def test_bonus_clip_at_its_edge_is_continuous(edge: float):
    """A step of 1e-6 nats across the edge moves the bonus by at most alpha * 1e-6."""
    zero = torch.zeros(2, dtype=torch.float64)
    policy = torch.tensor([edge - 5e-7, edge + 5e-7], dtype=torch.float64) - 15
    loss = xpo_loss(
        Pair(zero, policy),
        Pair(zero, zero - 15),
        zero,
        zero.bool(),
        alpha=1.0,
        beta=0.1,
        preference_loss=SigmoidLoss(),
        bonus_clip=4.0,
    )
    assert abs((loss.bonus[1] - loss.bonus[0]).item()) <= 1.0001e-6
    assert loss.bonus[0].item() == pytest.approx(-15 + edge, abs=1e-6)


# ---- one optimizer step ----


def sgd(parameters: list[nn.Parameter]) -> SGD:
    return SGD(parameters, lr=0.5)


def trained(make_module: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Take one SGD step on eight prompts; return the weights and what was logged."""
    recorder = Recorder()
    module = make_module(alpha=0.05, beta=0.2, optimizer=sgd, lr_schedule="constant", **options)
    fit_quietly(module, (PROMPTS * 2)[:8], callbacks=[recorder])
    weights = {name: weight.detach().clone() for name, weight in module.policy.named_parameters()}
    return weights, recorder.steps[0]


@pytest.mark.parametrize("max_grad_norm", [None, 0.01], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_of_any_size_take_the_same_step(make_module: Any, size: int, max_grad_norm: float | None):
    whole, logged = trained(make_module, micro_batch_size=8, max_grad_norm=max_grad_norm)
    split, logged_too = trained(make_module, micro_batch_size=size, max_grad_norm=max_grad_norm)
    for name, weight in whole.items():
        torch.testing.assert_close(split[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    assert logged_too["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-5)
    assert logged_too["loss/total"] == pytest.approx(logged["loss/total"], rel=1e-5)


def test_clipped_step_has_the_length_of_the_limit(make_module: Any, load_model: Any):
    """SGD moves the weights by the learning rate times the clipped gradient: 0.5 * 0.01 = 0.005."""
    weights, logged = trained(make_module, max_grad_norm=0.01)
    before = dict(load_model().named_parameters())
    moved = sum((weight - before[name]).double().square().sum().item() for name, weight in weights.items()) ** 0.5
    assert logged["grad_norm"] > 0.02
    assert moved == pytest.approx(0.005, rel=1e-3)


def test_one_step_equals_the_step_written_out_by_hand(make_module: Any, load_model: Any):
    """The mean over pairs of -log sigma(+-beta margin) + alpha log pi(sampler's), differentiated row by row."""
    module = make_module(alpha=0.05, beta=0.2, optimizer=sgd, lr_schedule="constant", max_grad_norm=None)
    collected: list[Experience] = []
    module.configure_model()

    class Keep(pl.Callback):
        def on_pairs_collected(self, trainer: pl.Trainer, pl_module: Any, experience: Experience) -> None:
            collected.append(experience)

    fit_quietly(module, PROMPTS, callbacks=[Keep()])
    (pairs,) = collected
    assert {0.0, 1.0} <= set(pairs.labels.tolist())
    assert not pairs.identical.any()

    model, reference, total = load_model(), load_model(), 0.0
    for row in range(len(pairs)):
        prompt = pairs.prompts.ids[row][pairs.prompts.mask[row]]
        ratios, explored = [], None
        for side in (pairs.completions.by_policy, pairs.completions.by_sampler):
            ids = torch.cat([prompt, side.ids[row][side.mask[row]]])[None]
            logps = []
            for scorer in (model, reference):
                steps = scorer(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                logps.append(steps.gather(1, ids[0, len(prompt) :, None]).sum())
            ratios.append(logps[0] - logps[1].detach())
            explored = logps[0]
        margin, label = 0.2 * (ratios[0] - ratios[1]), pairs.labels[row].item()
        won, lost = nn.functional.logsigmoid(margin), nn.functional.logsigmoid(-margin)
        total = total - label * won - (1 - label) * lost + 0.05 * explored
    (total / len(pairs)).backward()
    after = dict(module.policy.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(after[name], weight.detach() - 0.5 * weight.grad, rtol=1e-4, atol=1e-5, msg=name)
