"""The exploration bonuses, against numbers worked by hand and the authors' formulas written out, and in a run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, Recorder, fit_quietly, loader, quiet_trainer
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from xpo_lightning import (
    Bonus,
    BonusInput,
    BufferOptions,
    COPOBonus,
    Experience,
    GEBBonus,
    InputError,
    LabelRule,
    LoRASpec,
    Pair,
    PolicySampler,
    PreviousPolicySampler,
    ReferenceRefresh,
    ReferenceSampler,
    Scored,
    SELMBonus,
    SEPOPOBonus,
    SigmoidLoss,
    VPOBonus,
    XPOBonus,
    XPOLightningModule,
    xpo_loss,
)
from xpo_lightning.losses.xpo import XPOLoss

MakeModule = Callable[..., XPOLightningModule]
FORMS = ["probability", "inverse", "arctanh"]
DIVERGENCES = ["kl", "forward_kl", "hellinger"]


def leaf(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def worked(bonus: Bonus, label: float = 1.0, **options: Any) -> tuple[XPOLoss, Pair[Tensor], Scored]:
    """Evaluate a pair with log-ratios -10 + 12 = 2 and -20 + 15 = -5, and a third completion with -7 + 4 = -3."""
    policy, third = Pair(leaf([-10.0]), leaf([-20.0])), Scored(leaf([-7.0]), leaf([-4.0]).detach())
    reference = Pair(leaf([-12.0]).detach(), leaf([-15.0]).detach())
    labels, silent = torch.tensor([label], dtype=torch.float64), torch.tensor([False])
    options = {"alpha": 0.01, "beta": 0.1, "sample": third, **options}
    loss = xpo_loss(policy, reference, labels, silent, preference_loss=SigmoidLoss(), bonus=bonus, **options)
    return loss, policy, third


@pytest.mark.parametrize(
    ("bonus", "with_third", "without"),
    [
        (XPOBonus(), -0.07, -0.2),
        (SELMBonus(), -0.003, -0.005),
        (VPOBonus(), -0.003, -0.005),
        (VPOBonus(pessimistic=True), 0.003, 0.005),
        (SEPOPOBonus(), 0.00498340, 0.00498340),
    ],
    ids=["xpo", "selm", "vpo", "vpo_pessimistic", "sepopo"],
)
def test_bonus_gives_the_worked_number(bonus: Bonus, with_third: float, without: float):
    """alpha 0.01, beta 0.1; log pi is -7 of the third completion and -20 of the sampler's, the log-ratios -3 and -5.

    XPO: 0.01 * -7, or 0.01 * -20. SELM and VPO: 0.01 * 0.1 * -3 = -0.003, or 0.01 * 0.1 * -5.
    SE-POPO, on the policy's completion: sigma(0.1 * 2) = 0.5498340, so 0.01 * 0.0498340 / 0.1 = 0.00498340.
    """
    assert worked(bonus)[0].bonus.item() == pytest.approx(with_third, abs=1e-8)
    assert worked(bonus, sample=None)[0].bonus.item() == pytest.approx(without, abs=1e-8)


@pytest.mark.parametrize(
    ("bonus", "gradients"),
    [
        (XPOBonus(), (0, 0, 0.01)),
        (SELMBonus(), (0, 0, 0.001)),
        (VPOBonus(pessimistic=True), (0, 0, -0.001)),
        (SEPOPOBonus(), (0.01 * 0.5498340 * 0.4501660, 0, 0)),
        (GEBBonus("inverse", "forward_kl"), (0, 0.01, 0)),
    ],
    ids=["xpo", "selm", "vpo", "sepopo", "geb"],
)
def test_bonus_is_on_its_own_completion(bonus: Bonus, gradients: tuple[float, float, float]):
    """SE-POPO: d sigma(beta r)/dr / beta = sigma (1 - sigma). The others are linear in one log-probability."""
    loss, policy, third = worked(bonus)
    loss.bonus.sum().backward()
    of = [leaf.grad.item() if leaf.grad is not None else 0.0 for leaf in (*vars(policy).values(), third.logps)]
    assert of == pytest.approx(gradients, abs=1e-8)


def test_a_clip_bounds_the_log_ratio_of_the_third_completion():
    """Clipped at 2, its log-ratio is -2 and log pi -4 - 2 = -6: XPO 0.01 * -6, SELM 0.01 * 0.1 * -2; no gradient."""
    for bonus, expected in ((XPOBonus(), -0.06), (SELMBonus(), -0.002)):
        loss, _, third = worked(bonus, bonus_clip=2.0)
        assert loss.bonus.item() == pytest.approx(expected)
        loss.bonus.sum().backward()
        assert third.logps.grad.item() == 0


@pytest.mark.parametrize(
    ("form", "divergence", "expected"),
    [
        ("probability", "kl", 0.25),
        ("probability", "forward_kl", 0.2876821),
        ("probability", "hellinger", -1.1180340),
        ("inverse", "kl", -3.9998400),
        ("inverse", "forward_kl", -1.3862944),
        ("inverse", "hellinger", -1.9999600),
        ("arctanh", "kl", -0.9729322),
        ("arctanh", "forward_kl", 0.0274409),
        ("arctanh", "hellinger", -1.2136442),
    ],
)
def test_geb_gives_the_worked_number(form: Any, divergence: Any, expected: float):
    """The rejected completion has pi = 1/4. (1) 1/4; -log 3/4 = 0.2876821; -sqrt(1.5 - 0.25) = -1.1180340.

    (2) -1/0.25001 = -3.9998400; log 1/4; -1/(0.5 + 1e-5) = -1.9999600. (3) u = arctanh(0.74999) =
    log(1.74999/0.25001)/2 = 0.9729322: -u; -log u = 0.0274409; -sqrt(u + 0.5) = -1.2136442.
    """
    side, other = (Scored(leaf([math.log(pi)]), leaf([-1.0])) for pi in (0.25, 0.9))
    for label, seen in ((1.0, (other, side)), (0.0, (side, other))):
        labels = torch.tensor([label], dtype=torch.float64)
        value = GEBBonus(form, divergence)(BonusInput(*seen, seen[1], labels, 0.1))
        assert value.item() == pytest.approx(expected, abs=2e-7)


# ---- parity with the authors' code, written out ----


def author_geb(form: str, divergence: str, rejected: Tensor) -> Tensor:
    """GEB's published forms (WindyLee0822/GEB), which are named geb_p, geb_f and geb_tanh there."""
    p = rejected.exp()
    tanh = torch.arctanh(1 - p - 1e-5)
    return {
        ("probability", "kl"): p,
        ("probability", "forward_kl"): -torch.log(1 - p),
        ("probability", "hellinger"): -torch.sqrt(1.5 - p),
        ("inverse", "kl"): -1 / (p + 1e-5),
        ("inverse", "hellinger"): -1 / (torch.exp(0.5 * rejected) + 1e-5),
        ("inverse", "forward_kl"): rejected,
        ("arctanh", "kl"): -tanh,
        ("arctanh", "forward_kl"): -torch.log(tanh),
        ("arctanh", "hellinger"): -torch.sqrt(tanh + 0.5),
    }[form, divergence]


AUTHORS: dict[str, tuple[Bonus, Callable[..., Tensor]]] = {
    # shenao-zhang/SELM: + alpha beta (policy_response_logps - reference_response_logps)
    "selm": (SELMBonus(), lambda first, second, third, chosen, beta: beta * (third[0] - third[1])),
    # MYC000801/SE-POPO: + alpha (sigmoid(beta first_logratio) - 1/2) / beta
    "sepopo": (
        SEPOPOBonus(),
        lambda first, second, third, chosen, beta: (1 / (1 + torch.exp(-beta * (first[0] - first[1]))) - 0.5) / beta,
    ),
    **{
        f"geb {form} {divergence}": (
            GEBBonus(form, divergence),  # type: ignore[arg-type]
            lambda first, second, third, chosen, beta, form=form, divergence=divergence: author_geb(
                form, divergence, torch.where(chosen, second[0], first[0])
            ),
        )
        for form in FORMS
        for divergence in DIVERGENCES
    },
}


@pytest.mark.parametrize("name", AUTHORS)
def test_objective_and_gradients_equal_the_authors_formula(name: str):
    bonus, author = AUTHORS[name]
    generator = torch.Generator().manual_seed(0)
    values = -torch.rand(6, 40, generator=generator, dtype=torch.float64) * 8 - 0.01
    chosen = torch.rand(40, generator=generator) < 0.5
    alpha, beta = 0.03, 0.2
    results = []
    for ours in (True, False):
        of = [row.clone().requires_grad_(number < 3) for number, row in enumerate(values)]
        first, second, third = ((of[number], of[number + 3]) for number in range(3))
        if ours:
            total = xpo_loss(
                Pair(first[0], second[0]),
                Pair(first[1], second[1]),
                chosen.double(),
                torch.zeros_like(chosen),
                alpha=alpha,
                beta=beta,
                preference_loss=SigmoidLoss(),
                bonus=bonus,
                sample=Scored(*third),
            ).total
        else:
            margin = (first[0] - first[1] - second[0] + second[1]) * torch.where(chosen, 1, -1)
            total = -logsigmoid(beta * margin) + alpha * author(first, second, third, chosen, beta)
        total.sum().backward()
        results.append((total.detach(), [torch.zeros(40) if one.grad is None else one.grad for one in of[:3]]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-6)
    for ours_grad, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours_grad.double(), theirs.double(), rtol=0, atol=1e-5)
        assert ours_grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("logp", [0.0, -1e-9, -1e4, -math.inf])
def test_geb_of_certain_and_of_impossible_completions_is_no_nan(form: Any, divergence: Any, logp: float):
    side = Scored(torch.tensor([max(logp, -1e30)], requires_grad=True), torch.tensor([-1.0]))
    value = GEBBonus(form, divergence)(BonusInput(side, side, side, torch.tensor([1.0]), 0.1))
    value.backward()
    assert value.isfinite()
    assert side.logps.grad.isfinite()


# ---- COPO ----


def seen_of(hidden: Tensor, lengths: list[int], logps: list[float], reference: list[float]) -> BonusInput:
    side = Scored(torch.tensor(logps, requires_grad=True), torch.tensor(reference), torch.tensor(lengths), hidden)
    return BonusInput(side, side, side, torch.ones(len(logps)), 0.1)


def test_copo_equals_the_authors_formula():
    """Baichenjia/COPO: -alpha (clip(exp(log ratio), max=5) * 0.1 * mean(flips^2)^p).detach() * log pi."""
    hidden = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    seen = seen_of(hidden, [4, 2, 1], [-3.0, -2.0, -9.0], [-3.5, -8.0, -1.0])
    bonus = COPOBonus(seed=7)
    value = bonus(seen)
    value.sum().backward()
    first, _, second = bonus.network.layers
    for row, last in enumerate((3, 1, 0)):
        middle = first.weight @ hidden[row, last] + first.bias
        flips = second.weight @ torch.where(middle > 0, middle, 0.01 * middle) + second.bias
        ratio = min(math.exp(float(seen.sample.logps[row] - seen.sample.reference_logps[row])), 5.0)
        weight = ratio * 0.1 * float((flips**2).mean()) ** 0.5
        assert value[row].item() == pytest.approx(-weight * float(seen.sample.logps[row]), abs=1e-6)
        assert seen.sample.logps.grad[row].item() == pytest.approx(-weight, abs=1e-6)


def test_copo_finds_what_it_has_seen_often_less_rare():
    """After many visits of one state and none of another, the mean square is near 1/visits, and not there."""
    states = torch.eye(6)[:2]
    bonus = COPOBonus(learning_rate=0.01, steps=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        bonus.learn(states[:1].repeat(4, 1), lambda rows, width: torch.rand(rows, width, generator=generator))
    seen = seen_of(states[:, None], [1, 1], [-1.0, -1.0], [-1.0, -1.0])
    often, never = bonus(seen).tolist()
    assert 0 < often < 0.5 * never


def test_copo_learns_after_a_validation(make_module: MakeModule):
    module = make_module(bonus=COPOBonus())
    quiet_trainer(limit_val_batches=1).validate(module, loader(PROMPTS, 2), verbose=False)
    recorder = Recorder()
    fit_quietly(module, PROMPTS, callbacks=[recorder])
    assert math.isfinite(recorder.of("loss/xpo")[-1])


# ---- in a run ----


class Watch(Recorder):
    """Keeps the pairs, too, and writes a checkpoint after each step if a folder is given."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.pairs: list[Experience] = []
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        super().on_train_batch_end(trainer, *rest)
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_pairs_collected(self, trainer: Any, module: Any, experience: Experience) -> None:
        self.pairs.append(experience)


def run(module: XPOLightningModule, prompts: list[str] = PROMPTS, **options: Any) -> Watch:
    watch = Watch()
    fit_quietly(module, prompts, callbacks=[watch], **options)
    return watch


def weights_of(module: XPOLightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.policy.named_parameters()}


def test_the_short_form_is_the_class(make_module: MakeModule):
    short = {target: run(make_module(bonus_on=target, alpha=0.1)).steps for target in ("sampler", "both", "rejected")}
    for target, steps in short.items():
        assert run(make_module(bonus=XPOBonus(target), alpha=0.1)).steps == steps
    assert run(make_module(alpha=0.1)).steps == short["sampler"]


@pytest.mark.parametrize(
    "bonus", [SELMBonus(), VPOBonus(), SEPOPOBonus(), GEBBonus(), GEBBonus("inverse", "hellinger"), COPOBonus()]
)
def test_every_bonus_changes_the_step(make_module: MakeModule, bonus: Bonus):
    """Two batches, so that log-ratios are not 0 any more; compared with alpha 0, and with XPO's own bonus."""
    trained = []
    for chosen, alpha in ((bonus, 0.0), (bonus, 5.0), (None, 5.0)):
        module = make_module(bonus=chosen, alpha=alpha, learning_rate=1e-2, spec={"dtype": "float32"})
        watch = run(module, PROMPTS[:2], batch_size=1)
        assert (watch.of("loss/xpo")[-1] == 0) == (alpha == 0)
        trained.append(weights_of(module))
    plain, ours, xpo = trained
    assert any(not torch.equal(plain[name], ours[name]) for name in plain)
    assert any(not torch.equal(xpo[name], ours[name]) for name in plain)


@pytest.mark.parametrize(
    ("third", "kind"),
    [
        (PolicySampler(), "all weights"),
        (ReferenceSampler(), "LoRA"),
        (PreviousPolicySampler(), "all weights"),
        pytest.param(PolicySampler(), "LoRA", marks=pytest.mark.slow),
        pytest.param(ReferenceSampler(), "all weights", marks=pytest.mark.slow),
        pytest.param(PreviousPolicySampler(), "LoRA", marks=pytest.mark.slow),
    ],
)
def test_the_third_completion_alone_is_explored(
    make_module: MakeModule, third: Any, kind: str, load_model: Callable[..., nn.Module]
):
    """Its log-probability is what alpha multiplies; the pair is that of a run without it."""
    options = {"alpha": 0.5, "lora": LoRASpec(r=4) if kind == "LoRA" else None}
    ours, without = run(make_module(bonus_sampler=third, **options)), run(make_module(**options))
    (pairs,), (plain,) = ours.pairs, without.pairs
    assert pairs.completions.by_policy.texts == plain.completions.by_policy.texts
    assert pairs.completions.by_sampler.texts == plain.completions.by_sampler.texts
    assert torch.equal(pairs.labels, plain.labels)
    assert pairs.sample.completions.texts not in (plain.completions.by_policy.texts, plain.completions.by_sampler.texts)
    # At first, policy and reference are equal, so both scored it as it was written.
    assert pairs.sample.reference_logps.tolist() == pytest.approx(pairs.sample.completions.logps.tolist(), abs=1e-4)
    assert ours.of("loss/xpo")[0] == pytest.approx(0.5 * float(pairs.sample.reference_logps.mean()), rel=1e-4)
    assert ours.of("loss/dpo")[0] == pytest.approx(without.of("loss/dpo")[0], rel=1e-4)


def test_micro_batches_and_the_buffer_keep_the_third_completion(make_module: MakeModule, tmp_path: Any):
    """A step on rows one by one is that on all at once; pairs read back from a file give the same loss."""
    base = {"bonus": SELMBonus(), "bonus_sampler": PolicySampler(), "alpha": 5.0, "learning_rate": 1e-2}
    buffered = {"buffer": BufferOptions(memory_pairs=1)}
    kinds: list[dict[str, Any]] = [{}, {"micro_batch_size": 1}, {"micro_batch_tokens": 60}, buffered]
    runs = [run(make_module(**base, **kind), batch_size=5, default_root_dir=tmp_path) for kind in kinds]
    for one in runs[1:]:
        for name in ("loss/total", "loss/xpo", "grad_norm"):
            assert one.of(name) == pytest.approx(runs[0].of(name), rel=1e-4, abs=1e-5)
    growing = run(make_module(**base, **buffered), batch_size=2, default_root_dir=tmp_path)
    assert all(math.isfinite(step["loss/xpo"]) and step["loss/xpo"] for step in growing.steps[1:])


@pytest.mark.parametrize("bonus", [COPOBonus, SELMBonus])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(make_module: MakeModule, bonus: Any, tmp_path: Any):
    """The bonus's network and the bonus sampler's earlier policies are in the checkpoint."""

    def make() -> XPOLightningModule:
        return make_module(
            bonus=bonus(), bonus_sampler=PreviousPolicySampler(), alpha=2.0, learning_rate=1e-2, entropy_bonus=0.01
        )

    module, second, whole, rest = make(), make(), Watch(tmp_path), Watch()
    prompts = PROMPTS[:2] * 5  # the same in each batch: a plain loader begins again
    fit_quietly(module, prompts, batch_size=2, callbacks=[whole])
    resume(second, prompts, tmp_path / "2.ckpt", rest)
    assert len(rest.steps) == 3
    assert rest.steps == whole.steps[2:]
    assert all(torch.equal(value, weights_of(module)[name]) for name, value in weights_of(second).items())


def resume(module: XPOLightningModule, prompts: list[str], checkpoint: Path, watch: Watch) -> None:
    quiet_trainer(callbacks=[watch]).fit(module, loader(prompts, 2), ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bonus": SELMBonus(), "bonus_on": "both"}, r"model\.bonus_on=both .* model\.bonus is SELMBonus"),
        ({"bonus_sampler": PolicySampler(), "bonus_on": "both"}, r"model\.bonus_sampler=PolicySampler .* XPOBonus"),
        ({"bonus_sampler": PolicySampler(), "bonus": GEBBonus()}, r"model\.bonus_sampler=PolicySampler .* GEBBonus"),
        (
            {"bonus_sampler": ReferenceSampler(), "reference_cache": "memory"},
            r"model\.reference_cache .* model\.bonus_sampler=ReferenceSampler",
        ),
        ({"bonus_on": "chosen"}, r"model\.bonus_on must be sampler, both, rejected or null, but is 'chosen'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(make_module: MakeModule, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        make_module(**options)


def test_values_out_of_range_are_refused():
    for name, value in {"exponent": 0, "steps": 0, "flips": 0, "width": 0, "learning_rate": 0, "max_ratio": -1}.items():
        with pytest.raises(InputError, match=rf"model\.bonus\.init_args\.{name} must be"):
            COPOBonus(**{name: value})


def test_a_checkpoint_of_another_bonus_is_refused_where_the_bonus_learns(make_module: MakeModule, tmp_path: Any):
    fit_quietly(make_module(), PROMPTS, batch_size=2, callbacks=[Watch(tmp_path)])
    with pytest.raises(InputError, match=r"model\.bonus is COPOBonus, which learns"):
        resume(make_module(bonus=COPOBonus()), PROMPTS, tmp_path / "1.ckpt", Watch())
    resume(make_module(bonus=SELMBonus()), PROMPTS, tmp_path / "1.ckpt", Watch())
    with pytest.raises(InputError, match=r"without model\.bonus_sampler"):
        resume(make_module(bonus_sampler=PolicySampler()), PROMPTS, tmp_path / "1.ckpt", Watch())


class Remembering(Bonus):
    """A bonus of one's own: the mean hidden state's distance from the mean of all that it has learned."""

    needs_hidden = learns = True

    def __init__(self) -> None:
        self.mean = torch.zeros(1)

    def __call__(self, seen: BonusInput) -> Tensor:
        return (self.observe(seen) - self.mean).square().sum(1)

    def observe(self, seen: BonusInput) -> Tensor:
        side = seen.by_policy
        mask = torch.arange(side.hidden.shape[1]) < side.lengths[:, None]
        return (side.hidden * mask[..., None]).sum(1) / side.lengths[:, None]

    def learn(self, observed: Tensor, uniforms: Callable[[int, int], Tensor]) -> None:
        self.mean = observed.mean(0)


def test_a_bonus_of_ones_own_reads_hidden_states_and_learns(make_module: MakeModule):
    learned, frozen = Remembering(), Remembering()
    frozen.learns = False
    runs = [run(make_module(bonus=one, alpha=0.01), PROMPTS * 2, batch_size=5) for one in (learned, frozen)]
    first, second = (each.of("loss/xpo") for each in runs)
    assert learned.mean.shape == (32,)
    assert first[0] == second[0]
    assert first[1] < 0.99 * second[1], "the second batch is compared with the first"
    assert runs[0].of("grad_norm")[0] != run(make_module(alpha=0.0)).of("grad_norm")[0]


class InOrder(Bonus):
    """A bonus of one's own, which learns the reference's log-probability of each pair, one after another."""

    learns = True

    def __init__(self) -> None:
        self.learned: list[float] = []

    def __call__(self, seen: BonusInput) -> Tensor:
        return seen.sample.logps

    def observe(self, seen: BonusInput) -> Tensor:
        return seen.by_policy.reference_logps[:, None]

    def learn(self, observed: Tensor, uniforms: Callable[[int, int], Tensor]) -> None:
        self.learned = observed[:, 0].tolist()


def test_bonus_learns_in_the_order_of_the_batch_whatever_the_micro_batches(make_module: MakeModule):
    bonus = InOrder()
    (pairs,) = run(make_module(bonus=bonus, micro_batch_size=2)).pairs
    kept = pairs.reference_logps.by_policy.tolist()
    assert len(set(kept)) == 5
    assert bonus.learned == kept


def test_labels_between_0_and_1_weigh_both_completions(make_module: MakeModule):
    step = run(make_module(bonus=GEBBonus("inverse", "forward_kl"), labels=LabelRule("soft"), alpha=0.5)).steps[0]
    assert step["loss/xpo"] == pytest.approx(0.5 * step["logps/rejected"], rel=1e-5)


def test_selm_with_a_refreshed_reference_trains(make_module: MakeModule):
    module = make_module(
        bonus=SELMBonus(),
        sampler=PolicySampler(),
        bonus_sampler=ReferenceSampler(),
        reference_refresh=ReferenceRefresh(2),
        alpha=1.0,
        learning_rate=1e-2,
    )
    watch = run(module, PROMPTS * 2, batch_size=2)
    assert [abs(value) > 1e-4 for value in watch.of("loss/xpo")] == [False, True, False, True, False]
