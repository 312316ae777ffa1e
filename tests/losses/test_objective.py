"""The XPO objective: preference, exploration bonus and entropy, against numbers worked by hand and a plain loop."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from worked_pair import LOSSES, leaf, worked

from xpo_lightning import InputError, Pair
from xpo_lightning.losses.preference import PreferenceLoss, SigmoidLoss
from xpo_lightning.losses.xpo import xpo_loss

SMOOTHED = ["sigmoid", "ipo", "hinge", "positive"]


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
