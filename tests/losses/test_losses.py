"""The preference losses, against numbers worked by hand."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from worked_pair import LOSSES, worked

from xpo_lightning import InputError, Pair
from xpo_lightning.losses.preference import DPOPositiveLoss, HingeLoss, IPOLoss, PreferenceLoss, RobustLoss, SigmoidLoss


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
