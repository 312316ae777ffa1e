"""The XPO objective, against numbers worked by hand, and the optimizer step that is taken on it."""

import math
import random
from typing import Any

import pytest
import torch
from conftest import PROMPTS, Recorder, fit_quietly
from torch import Tensor, nn
from torch.optim import SGD

from xpo_lightning import Experience, InputError, IPOLoss, Pair, PreferenceLoss, SigmoidLoss, XPOLoss, xpo_loss

LOSSES = {"sigmoid": SigmoidLoss, "ipo": IPOLoss}


def leaf(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def worked(label: float, loss: PreferenceLoss, **options: Any) -> tuple[XPOLoss, Pair[Tensor]]:
    """Evaluate the pair of the docstrings below: log-ratios -10 + 12 = 2 and -20 + 15 = -5, so a margin of 7."""
    policy = Pair(leaf([-10.0]), leaf([-20.0]))
    reference = Pair(torch.tensor([-12.0], dtype=torch.float64), torch.tensor([-15.0], dtype=torch.float64))
    options = {"alpha": 0.01, "beta": 0.1, **options}
    same = torch.tensor([options.pop("identical", False)])
    labels = torch.tensor([label], dtype=torch.float64)
    return xpo_loss(policy, reference, labels, same, preference_loss=loss, **options), policy


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
    ("loss", "label", "expected"),
    [
        (SigmoidLoss(label_smoothing=0.1), 1.0, 0.4731860),
        (SigmoidLoss(label_smoothing=0.1), 0.0, 1.0331860),
        (SigmoidLoss(label_smoothing=0.1), 0.25, 0.8931860),
        (IPOLoss(label_smoothing=0.25), 1.0, 39.0),
    ],
    ids=["sigmoid-won", "sigmoid-lost", "sigmoid-soft", "ipo-won"],
)
def test_label_smoothing_when_set_mixes_both_orders(loss: PreferenceLoss, label: float, expected: float):
    """The label p becomes (1 - s) p + s (1 - p), and the loss is p * won + (1 - p) * lost.

    Sigmoid, won: 0.9 * 0.4031860 + 0.1 * 1.1031860 = 0.4731860. Lost: 0.1 and 0.9, 1.0331860.
    Soft 0.25: 0.9 * 0.25 + 0.1 * 0.75 = 0.3; 0.3 * 0.4031860 + 0.7 * 1.1031860 = 0.8931860.
    IPO, won, s = 0.25: 0.75 * 4 + 0.25 * 144 = 39.
    """
    evaluated, _ = worked(label, loss)
    assert evaluated.preference.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [-0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", LOSSES.values(), ids=LOSSES)
def test_label_smoothing_when_out_of_range_is_refused(kind: type[PreferenceLoss], value: float):
    with pytest.raises(InputError, match=r"label_smoothing must be at least 0 and below 0\.5"):
        kind(label_smoothing=value)


def loop_loss(kind: str, ratios: tuple[float, float], label: float, smoothing: float, beta: float) -> float:
    """Work the preference loss of one pair in plain Python."""
    label = (1 - smoothing) * label + smoothing * (1 - label)
    margin = ratios[0] - ratios[1]
    if kind == "sigmoid":
        return label * math.log1p(math.exp(-beta * margin)) + (1 - label) * math.log1p(math.exp(beta * margin))
    return label * (margin - 0.5 / beta) ** 2 + (1 - label) * (-margin - 0.5 / beta) ** 2


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", LOSSES)
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
        preference_loss=LOSSES[kind](smoothing),
    )
    for number, (a, b, c, d) in enumerate(rows):
        expected = 0.0 if same[number] else loop_loss(kind, (a - c, b - d), labels[number], smoothing, beta)
        assert loss.preference[number].item() == pytest.approx(expected, abs=1e-12)
        assert loss.bonus[number].item() == pytest.approx(alpha * b)
        assert loss.total[number].item() == pytest.approx(expected + alpha * b, abs=1e-12)
        assert loss.log_ratios.by_policy[number].item() == pytest.approx(a - c)
        assert loss.log_ratios.by_reference[number].item() == pytest.approx(b - d)


def test_bonus_without_preference_weight_pushes_the_reference_completion_down_by_alpha():
    """With beta 0 the sigmoid loss is log 2 whatever the margin, so the bonus alone has a gradient: +alpha.

    The objective is minimised: a positive derivative lowers log pi(reference's completion).
    """
    loss, policy = worked(1.0, SigmoidLoss(), beta=0.0)
    loss.total.sum().backward()
    assert policy.by_reference.grad.tolist() == [0.01]
    assert policy.by_policy.grad.tolist() == [0.0]


@pytest.mark.parametrize("label", [1.0, 0.0], ids=["won", "lost"])
def test_total_gradient_is_the_bonus_plus_that_of_the_preference(label: float):
    """d/dm of log(1 + e^(-beta m)) is -beta sigma(-beta m), and m = ratio(policy's) - ratio(reference's).

    Won: sigma(-0.7) = 1 / (1 + 2.0137527) = 0.3318122, times beta 0.1 is 0.0331812: the policy's completion gets
    -0.0331812 and the reference's alpha + 0.0331812 = 0.0431812.
    Lost: sigma(0.7) = 0.6681878: the policy's gets +0.0668188 and the reference's 0.01 - 0.0668188 = -0.0568188.
    """
    loss, policy = worked(label, SigmoidLoss())
    loss.total.sum().backward()
    expected = (-0.0331812, 0.0431812) if label else (0.0668188, -0.0568188)
    assert policy.by_policy.grad.item() == pytest.approx(expected[0], abs=1e-7)
    assert policy.by_reference.grad.item() == pytest.approx(expected[1], abs=1e-7)


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
def test_identical_pair_keeps_the_bonus_and_nothing_else(kind: type[PreferenceLoss]):
    """Preference 0 with gradient 0; bonus 0.01 * -20 = -0.2 with gradient alpha = 0.01."""
    loss, policy = worked(0.5, kind(), identical=True)
    assert loss.preference.item() == 0.0
    assert loss.bonus.item() == pytest.approx(-0.2)
    loss.total.sum().backward()
    assert policy.by_policy.grad.item() == 0.0
    assert policy.by_reference.grad.item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("clip", "bonus", "gradient"),
    [(None, -0.20, 0.01), (6.0, -0.20, 0.01), (3.0, -0.18, 0.0)],
    ids=["off", "inside", "beyond"],
)
def test_bonus_clip_bounds_the_log_ratio_inside_the_bonus(clip: float | None, bonus: float, gradient: float):
    """The reference's completion has log ref = -15 and log pi = -20, a log-ratio of -5.

    Clipped at 6 nothing changes: 0.01 * -20 = -0.2. Clipped at 3: 0.01 * (-15 - 3) = -0.18, with no gradient.
    The preference term is never clipped.
    """
    loss, policy = worked(1.0, SigmoidLoss(), bonus_clip=clip)
    assert loss.bonus.item() == pytest.approx(bonus)
    assert loss.preference.item() == pytest.approx(0.4031860, abs=1e-6)
    loss.bonus.sum().backward()
    assert policy.by_reference.grad.item() == pytest.approx(gradient)


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


def test_one_step_equals_the_step_written_out_by_hand(
    make_module: Any, load_model: Any, monkeypatch: pytest.MonkeyPatch
):
    """The mean over pairs of -log sigma(+-beta margin) + alpha log pi(reference's), differentiated row by row."""
    module = make_module(alpha=0.05, beta=0.2, optimizer=sgd, lr_schedule="constant", max_grad_norm=None)
    collected: list[Experience] = []
    module.configure_model()
    penalized = module.collect.__class__.__call__

    def collect(*arguments: Any) -> Experience:
        collected.append(penalized(*arguments))
        return collected[-1]

    monkeypatch.setattr(module.collect.__class__, "__call__", collect)
    fit_quietly(module, PROMPTS)
    (pairs,) = collected
    assert {0.0, 1.0} <= set(pairs.labels.tolist())
    assert not pairs.identical.any()

    model, reference, total = load_model(), load_model(), 0.0
    for row in range(len(pairs)):
        prompt = pairs.prompts.ids[row][pairs.prompts.mask[row]]
        ratios, explored = [], None
        for side in (pairs.completions.by_policy, pairs.completions.by_reference):
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
