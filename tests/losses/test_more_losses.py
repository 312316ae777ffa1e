"""Losses of games, of other divergences, and mixes, against numbers worked by hand; and the policy that wrote."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import PROMPTS, fit_quietly
from test_bonuses import Watch, run
from torch import Tensor

from xpo_lightning import (
    BufferOptions,
    FDivergenceLoss,
    HingeLoss,
    INPOLoss,
    InputError,
    IPOLoss,
    MixedLoss,
    NashMDLoss,
    NLLLoss,
    Pair,
    PolicySampler,
    PreferenceLoss,
    ReferenceRefresh,
    SigmoidLoss,
    SPPOLoss,
    XPOLightningModule,
    xpo_loss,
)

MakeModule = Callable[..., XPOLightningModule]


def leaf(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def worked(
    loss: PreferenceLoss, label: float = 1.0, beta: float = 0.5, ratios: tuple[float, float] = (2.0, -1.0), **more: Any
) -> tuple[float, list[float]]:
    """Return the loss and its gradients, of log-ratios 2 of the policy's completion and -1 of the sampler's."""
    pair, zero = Pair(*map(leaf, ratios)), Pair(leaf(0.0).detach(), leaf(0.0).detach())
    labels = torch.tensor([label], dtype=torch.float64)
    options = {"alpha": 0.0, "beta": beta, "preference_loss": loss, **more}
    value = xpo_loss(pair, zero, labels, torch.tensor([False]), **options).preference
    value.sum().backward()
    return value.item(), [0.0 if side.grad is None else side.grad.item() for side in vars(pair).values()]


@pytest.mark.parametrize(
    ("loss", "label", "expected", "gradients"),
    [
        # p - 1/2 - beta lr = 1 - 1/2 - 1 = -1/2: -(-1/2) * 2 = 1, gradient 1/2. Lost: -3/2. Soft 0.75: -3/4.
        (NashMDLoss(), 1.0, 1.0, (0.5, 0.0)),
        (NashMDLoss(), 0.0, 3.0, (1.5, 0.0)),
        (NashMDLoss(), 0.75, 1.5, (0.75, 0.0)),
        # 1/(2 beta) = 1: (2 - 1)^2 + (-1 + 1)^2 = 1. Lost: (-1 - 1)^2 + (2 + 1)^2 = 13.
        (SPPOLoss(), 1.0, 1.0, (2.0, 0.0)),
        (SPPOLoss(), 0.0, 13.0, (6.0, -4.0)),
        (NLLLoss(), 1.0, -2.0, (-1.0, 0.0)),
        (NLLLoss(), 0.25, 0.25, (-0.25, -0.75)),
        # Sigmoid: margin 1.5, log(1 + e^-1.5) = 0.2014133, slope -0.5 * 0.1824255 = -0.0912128. Plus 0.1 * -2.
        (MixedLoss([SigmoidLoss(), NLLLoss()], [1.0, 0.1]), 1.0, 0.0014133, (-0.1912128, 0.0912128)),
        # 2 * IPO (3 - 1)^2 = 8, slope 8, less hinge max(0, 1 - 1.5) = 0.
        (MixedLoss([IPOLoss(), HingeLoss()], [2.0, -1.0]), 1.0, 8.0, (8.0, -8.0)),
    ],
)
def test_loss_gives_the_worked_number(loss: PreferenceLoss, label: float, expected: float, gradients: Any):
    value, slopes = worked(loss, label)
    assert value == pytest.approx(expected, abs=1e-6)
    assert slopes == pytest.approx(gradients, abs=1e-6)


@pytest.mark.parametrize(
    ("divergence", "slope"),
    [
        ("forward_kl", lambda u: -1 / u),
        ("hellinger", lambda u: -2 / math.sqrt(u)),
        ("jensen_shannon", lambda u: math.log(2 * u / (1 + u))),
        ("chi_squared", lambda u: u + math.log(u)),
    ],
)
def test_divergence_gives_its_own_margin(divergence: Any, slope: Callable[[float], float]):
    """By f' of the ratios e^2 and e^-1, and by central differences for the gradient."""

    def expected(a: float, b: float) -> float:
        return math.log1p(math.exp(-0.5 * (slope(math.exp(a)) - slope(math.exp(b)))))

    value, slopes = worked(FDivergenceLoss(divergence))
    assert value == pytest.approx(expected(2, -1), rel=1e-9)
    steps = [(expected(2 + 1e-5, -1) - expected(2 - 1e-5, -1)), (expected(2, -1 + 1e-5) - expected(2, -1 - 1e-5))]
    assert slopes == pytest.approx([step / 2e-5 for step in steps], abs=1e-7)
    lost, _ = worked(FDivergenceLoss(divergence), label=0.0)
    assert lost == pytest.approx(expected(-1, 2), rel=1e-9)


def test_geb_authors_margins_are_those_of_two_divergences():
    """WindyLee0822/GEB: (exp(-lr_l / 2) - exp(-lr_w / 2)) / 0.5 (Hellinger), exp(-lr_l) - exp(-lr_w) (forward KL)."""
    for divergence, margin in (
        ("hellinger", (math.exp(0.5) - math.exp(-1)) / 0.5),
        ("forward_kl", math.e - math.exp(-2)),
    ):
        value, _ = worked(FDivergenceLoss(divergence))  # type: ignore[arg-type]
        assert value == pytest.approx(math.log1p(math.exp(-0.5 * margin)), abs=1e-9)


def test_chi_squared_is_clipped_at_its_margin():
    """Beta 0.5 times (e^2 + 2 - e^-1 + 1) = 5.01, clipped at 4: log(1 + e^-4) = 0.0181499, without gradient."""
    value, slopes = worked(FDivergenceLoss("chi_squared", margin_clip=4.0))
    assert value == pytest.approx(0.0181499, abs=1e-6)
    assert slopes == [0.0, 0.0]


@pytest.mark.parametrize("divergence", ["forward_kl", "hellinger", "jensen_shannon", "chi_squared"])
def test_ratios_that_float32_cannot_hold_give_finite_losses(divergence: Any):
    for ratios in ((500.0, -500.0), (-500.0, 500.0)):
        pair = Pair(*(torch.tensor([value], requires_grad=True) for value in ratios))
        value = FDivergenceLoss(divergence)(pair, torch.tensor([1.0]), 0.1)
        value.sum().backward()
        assert value.isfinite()
        assert all(side.grad.isfinite() for side in vars(pair).values())


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 4.0), (0.25, 0.25)])
def test_inpo_gives_the_worked_number(ratio: float, expected: float):
    """Margin 3, that of pi_t 1 + 2 = 3, beta 0.5: (3 - 0 - 1)^2 = 4; (3 - 0.75 * 3 - 0.25)^2 = 0.25."""
    previous = Pair(leaf(1.0).detach(), leaf(-2.0).detach())
    value, slopes = worked(INPOLoss(ratio), previous=previous)
    assert value == pytest.approx(expected)
    assert slopes == pytest.approx([2 * math.sqrt(expected), -2 * math.sqrt(expected)])


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_inpo_equals_the_papers_formula(label: float):
    """(log pi ratio - tau/eta log ref ratio - (eta - tau)/eta log pi_t ratio - 1/(2 eta))^2, from log-probabilities."""
    tau, eta = 0.2, 0.7
    chance = torch.Generator().manual_seed(0)
    pi, ref, old = (Pair(*(-8 * torch.rand(2, 20, generator=chance, dtype=torch.float64))) for _ in range(3))

    def ratio(side: Pair[Tensor]) -> Tensor:
        return (side.by_policy - side.by_sampler) * (1 if label else -1)

    expected = (ratio(pi) - tau / eta * ratio(ref) - (eta - tau) / eta * ratio(old) - 1 / (2 * eta)) ** 2
    ours = xpo_loss(
        pi,
        ref,
        torch.full((20,), label, dtype=torch.float64),
        torch.zeros(20, dtype=torch.bool),
        alpha=0.0,
        beta=tau,
        preference_loss=INPOLoss(tau / eta),
        previous=Pair(old.by_policy - ref.by_policy, old.by_sampler - ref.by_sampler),
    )
    torch.testing.assert_close(ours.preference, expected, rtol=0, atol=1e-9)


# ---- in a run ----


def test_inpo_compares_with_the_policy_that_wrote_the_pair(make_module: MakeModule, tmp_path: Any):
    """At the first of two updates the policy is pi_t; at the second it is not, and the buffer keeps what pi_t said."""
    base = {"sampler": PolicySampler(), "alpha": 0.0, "beta": 0.5, "learning_rate": 1e-2, "max_grad_norm": None}
    ours = run(make_module(preference_loss=INPOLoss(0.25), **base), batch_size=5)
    pairs = ours.pairs[0]
    assert torch.equal(pairs.previous_logps.by_policy, pairs.completions.by_policy.logps)
    assert ours.of("loss/dpo")[0] == pytest.approx(0.25**2 * (1 - ours.of("pairs/identical")[0]), rel=1e-3)
    kinds = [{}, {"buffer": BufferOptions(memory_pairs=1)}]
    twice = [
        run(
            make_module(preference_loss=INPOLoss(0.25), epochs_per_rollout=2, **base, **kind),
            batch_size=5,
            default_root_dir=tmp_path,
        ).of("loss/dpo")
        for kind in kinds
    ]
    assert twice[0] == pytest.approx(twice[1], rel=1e-4)
    ipo = run(make_module(preference_loss=IPOLoss(), epochs_per_rollout=2, **base), batch_size=5).of("loss/dpo")
    alone = run(make_module(preference_loss=INPOLoss(1.0), epochs_per_rollout=2, **base), batch_size=5).of("loss/dpo")
    assert alone == pytest.approx(ipo, rel=1e-5)
    assert twice[0] != pytest.approx(ipo, rel=1e-2)


@pytest.mark.parametrize(
    "loss",
    [
        NashMDLoss(),
        SPPOLoss(),
        FDivergenceLoss("hellinger"),
        MixedLoss([SigmoidLoss(), NLLLoss(length_normalized=True)], [1.0, 0.5]),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_every_loss_trains_and_validates_its_own_way(make_module: MakeModule, loss: PreferenceLoss):
    results = []
    for chosen in (loss, SigmoidLoss()):
        module, watch = make_module(preference_loss=chosen, alpha=0.0, learning_rate=1e-2), Watch()
        fit_quietly(module, PROMPTS, batch_size=2, callbacks=[watch])
        results.append(watch.of("loss/dpo"))
    assert all(map(math.isfinite, results[0]))
    assert results[0] != pytest.approx(results[1], rel=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda make: make(preference_loss=INPOLoss(0.5)), r"INPOLoss .* model\.sampler=ReferenceSampler"),
        (lambda make: INPOLoss(0.0), r"model\.preference_loss\.init_args\.ratio must be"),
        (lambda make: FDivergenceLoss("hellinger", 0.0), r"model\.preference_loss\.init_args\.margin_clip must be"),
        (lambda make: MixedLoss([], []), r"weights must have a number for each of the 0 losses"),
        (lambda make: MixedLoss([SigmoidLoss()], [1.0, 2.0]), r"weights must have a number for each of the 1 losses"),
        (lambda make: MixedLoss([SigmoidLoss()], [math.inf]), r"init_args\.weights must be"),
        (lambda make: MixedLoss([INPOLoss(0.5)], [1.0]), r"INPOLoss stands alone"),
    ],
)
def test_what_a_loss_does_not_go_with_is_refused(make_module: MakeModule, make: Callable[..., Any], message: str):
    with pytest.raises(InputError, match=message):
        make(make_module)


def test_sppo_with_a_renewed_reference_starts_each_iteration_at_the_same_loss(make_module: MakeModule):
    """Log-ratios are 0 at first: 2 (1/(2 beta))^2 = 0.5 with beta 1."""
    module = make_module(
        preference_loss=SPPOLoss(),
        sampler=PolicySampler(),
        reference_refresh=ReferenceRefresh(1),
        alpha=0.0,
        beta=1.0,
        learning_rate=1e-2,
    )
    watch = run(module, batch_size=2)
    shares = [1 - identical for identical in watch.of("pairs/identical")]
    assert watch.of("loss/dpo") == pytest.approx([0.5 * share for share in shares], rel=1e-3)
