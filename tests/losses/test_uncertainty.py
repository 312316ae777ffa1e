"""DEPO's bonus: against numbers worked by hand and the formula written out by rows, and in a run."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROMPTS, fit_quietly
from test_bonuses import Watch, resume, run, weights_of
from torch import Tensor

from xpo_lightning import BonusInput, DEPOBonus, InputError, PolicySampler, Scored, XPOLightningModule

MakeModule = Callable[..., XPOLightningModule]


def no_numbers(rows: int, width: int) -> Tensor:
    raise AssertionError("nothing is random")


def pairs_of(states: list[list[float]], logps: tuple[float, float] = (-3.0, -2.0)) -> BonusInput:
    """Make pairs with one state a side, that of a completion of one token, and log-ratios of 0 and 1."""
    ours, theirs = (torch.tensor([[row[side]] for row in states])[:, None] for side in (0, 1))
    one = torch.ones(len(states), dtype=torch.long)
    sides = [
        Scored(torch.full((len(states),), logp, requires_grad=True), torch.full((len(states),), of), one, hidden)
        for logp, of, hidden in zip(logps, (-3.0, -3.0), (ours, theirs), strict=True)
    ]
    return BonusInput(*sides, sides[1], torch.ones(len(states)), 0.5)


def test_bonus_gives_the_worked_number_and_gradient():
    """States of size 1 have length 1 and a sign. At first V = I, so that |w|^2 = 2, and K = 1/4: b = 0.1 sqrt 2 / 0.5.

    b = 0.28284271, and the bonus -b (-3 - 2). After 3 pairs w = (1, 1), V = I + 3 w w' and |w|^2 = 2/(1 + 3 * 2) = 2/7,
    but 2 of (1, -1), which is orthogonal. K is s(m)(1 - s(m)) at m = 0.5 (0 - 1): 0.23500371, its root 0.48477181.
    """
    bonus, seen = DEPOBonus(scale=0.1), pairs_of([[0.7, 5.0]])
    value = bonus(seen)
    assert value.tolist() == pytest.approx([0.28284271 * 5], rel=1e-6)
    value.sum().backward()
    assert [side.logps.grad.item() for side in (seen.by_policy, seen.by_sampler)] == pytest.approx([-0.28284271] * 2)
    with torch.no_grad():
        bonus.learn(bonus.observe(pairs_of([[1.0, 2.0]] * 3)), no_numbers)
    seen, other = bonus(pairs_of([[1.0, 1.0], [3.0, -1.0]])).tolist()
    assert seen == pytest.approx(0.1 * math.sqrt(2 / 7) / 0.48477181 * 5, rel=1e-6)
    assert other == pytest.approx(0.1 * math.sqrt(2) / 0.48477181 * 5, rel=1e-6)


def naive(learned: list[BonusInput], seen: BonusInput, scale: float, regularization: float) -> list[float]:
    """Evaluate the formula pair by pair, with V added up and inverted as a whole."""

    def wide(pairs: BonusInput, row: int) -> np.ndarray:
        both = []
        for side in (pairs.by_policy, pairs.by_sampler):
            mean = np.mean([side.hidden[row, step].double().numpy() for step in range(int(side.lengths[row]))], axis=0)
            both.append(mean / np.linalg.norm(mean))
        return np.concatenate(both)

    matrix, curvatures = regularization * np.eye(2 * seen.by_policy.hidden.shape[2]), []
    for pairs in learned:
        for row in range(len(pairs.labels)):
            state = wide(pairs, row)
            matrix += np.outer(state, state)
            ratios = [
                float(side.logps[row] - side.reference_logps[row]) for side in (pairs.by_policy, pairs.by_sampler)
            ]
            chance = 1 / (1 + math.exp(-pairs.beta * (ratios[0] - ratios[1])))
            curvatures.append(chance * (1 - chance))
    values = []
    for row in range(len(seen.labels)):
        state = wide(seen, row)
        width = math.sqrt(state @ np.linalg.inv(matrix) @ state) / math.sqrt(np.mean(curvatures))
        values.append(-scale * width * float(seen.by_policy.logps[row] + seen.by_sampler.logps[row]))
    return values


def random_pairs(seed: int, rows: int = 6, size: int = 5) -> BonusInput:
    generator = torch.Generator().manual_seed(seed)

    def side() -> Scored:
        hidden = torch.randn(rows, 4, size, generator=generator)
        lengths = torch.randint(1, 5, (rows,), generator=generator)
        for row, length in enumerate(lengths.tolist()):
            hidden[row, length:] = math.nan  # padding
        logps = -torch.rand(2, rows, generator=generator) * 9
        return Scored(logps[0], logps[1], lengths, hidden)

    first, second = side(), side()
    return BonusInput(first, second, second, torch.ones(rows), 0.3)


def test_bonus_equals_the_formula_written_out():
    """Over batches of different sizes, values to 1e-6."""
    bonus, learned = DEPOBonus(0.4, 0.2), [random_pairs(seed, rows) for seed, rows in enumerate((6, 1, 9, 30))]
    for pairs in learned:
        bonus.learn(bonus.observe(pairs), no_numbers)
    seen = random_pairs(9)
    assert bonus(seen).tolist() == pytest.approx(naive(learned, seen, 0.4, 0.2), abs=1e-6)


# ---- in a run ----


def made(make_module: MakeModule, **options: Any) -> XPOLightningModule:
    options = {"bonus": DEPOBonus(), "alpha": 2.0, "sampler": PolicySampler(), "learning_rate": 1e-2, **options}
    return make_module(**options)


def test_it_acts_and_learns_and_a_resumed_run_goes_on(make_module: MakeModule, tmp_path: Any):
    """The same prompts in each batch, so that what was seen counts for less and less; alpha 0 trains otherwise."""
    prompts = PROMPTS[:2] * 5
    module, whole = made(make_module), Watch(tmp_path)
    fit_quietly(module, prompts, batch_size=2, callbacks=[whole])
    terms = [step["loss/xpo"] / -(step["logps/chosen"] + step["logps/rejected"]) for step in whole.steps]
    assert terms[0] == pytest.approx(2.0 * 0.02 * math.sqrt(2) / 0.5, rel=0.1)
    assert all(later < 0.9 * terms[0] for later in terms[2:])
    plain = made(make_module, alpha=0.0)
    run(plain, prompts, batch_size=2)
    assert any(not torch.equal(value, weights_of(plain)[name]) for name, value in weights_of(module).items())
    second, rest = made(make_module), Watch()
    resume(second, prompts, tmp_path / "2.ckpt", rest)
    assert rest.steps == whole.steps[2:]
    assert all(torch.equal(value, weights_of(module)[name]) for name, value in weights_of(second).items())
    with pytest.raises(InputError, match=r"regularization 1\.0, and now it is 2\.0"):
        resume(made(make_module, bonus=DEPOBonus(regularization=2.0)), prompts, tmp_path / "2.ckpt", Watch())


def test_what_does_not_fit_is_refused(make_module: MakeModule):
    for name in ("scale", "regularization"):
        with pytest.raises(InputError, match=rf"model\.bonus\.init_args\.{name} must be"):
            DEPOBonus(**{name: 0.0})
    with pytest.raises(InputError, match=r"model\.bonus_sampler=PolicySampler .* DEPOBonus"):
        made(make_module, bonus_sampler=PolicySampler())
