"""Schedules of alpha, beta and the learning rate, by hand and as a run logs them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import PROMPTS, Recorder, completions_of, fit_quietly, loader, noise, prompts_of, quiet_trainer

from xpo_lightning import Constant, Cosine, InputError, IPOLoss, Linear, PerEpoch, PerIteration, XPOLightningModule
from xpo_lightning.core.batch import Experience, Pair
from xpo_lightning.losses.schedules import Progress, as_schedule, learning_rate_factor
from xpo_lightning.training.optimizer import WarmupThenDecay
from xpo_lightning.training.update_plan import UpdatePlan

MakeModule = Callable[..., XPOLightningModule]


def at(step: int = 0, epoch: int = 0, total: int | None = None) -> Progress:
    return Progress(step, epoch, total)


def test_constant_is_the_same_everywhere():
    assert [Constant(0.3)(at(step, step, 5)) for step in range(5)] == [0.3] * 5


def test_per_epoch_beyond_its_list_keeps_the_last_value():
    schedule = PerEpoch([3, 2.0])
    assert [schedule(at(step=100, epoch=epoch)) for epoch in range(5)] == [3.0, 2.0, 2.0, 2.0, 2.0]


def test_per_iteration_counts_batches_and_keeps_the_last_value():
    schedule = PerIteration([1e-5, 5e-6, 0], batches=2)
    found = [schedule(Progress(step=9, epoch=7, total_steps=None, batches=batches)) for batches in range(7)]
    assert found == [1e-5, 1e-5, 5e-6, 5e-6, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": []}, "must not be empty"),
        ({"values": [1.0], "batches": 0}, "at least 1"),
        ({"values": [float("nan")]}, "finite"),
    ],
)
def test_per_iteration_without_sense_is_refused(options: Any, message: str):
    with pytest.raises(InputError, match=message):
        PerIteration(**options)


def test_per_epoch_without_values_is_refused():
    with pytest.raises(InputError, match="must not be empty"):
        PerEpoch([])


@pytest.mark.parametrize(
    ("step", "linear", "cosine"),
    [(0, 1.0, 1.0), (2, 0.8, 0.8828427), (4, 0.6, 0.6), (8, 0.2, 0.2), (20, 0.2, 0.2)],
    ids=["first", "quarter", "half", "end", "past_the_end"],
)
def test_linear_and_cosine_from_1_to_a_fifth_over_8_steps(step: int, linear: float, cosine: float):
    """Linear: 1 - 0.8 * step / 8. Cosine: 1 - 0.8 (1 - cos(pi step / 8)) / 2; cos 45 deg = 0.7071068, so 0.8828427."""
    assert Linear(1.0, 0.2, steps=8)(at(step)) == pytest.approx(linear)
    assert Cosine(1.0, 0.2, steps=8)(at(step)) == pytest.approx(cosine)


def test_linear_without_steps_takes_the_length_of_the_run():
    assert Linear(0.0, 1.0)(at(step=3, total=12)) == pytest.approx(0.25)


def test_linear_without_steps_in_a_run_without_end_is_refused():
    with pytest.raises(InputError, match=r"trainer\.max_steps"):
        Linear(0.0, 1.0)(at(step=3))


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_schedule_over_less_than_a_step_is_refused(kind: type[Linear]):
    with pytest.raises(InputError, match="at least 1"):
        kind(0.0, 1.0, steps=0)


def test_as_schedule_takes_numbers_lists_and_schedules():
    own = Linear(0.0, 1.0, 2)
    assert as_schedule(own) is own
    assert as_schedule(2)(at()) == 2.0
    assert [as_schedule([1, 5])(at(epoch=epoch)) for epoch in (0, 1)] == [1.0, 5.0]


# ---- learning rate ----

COSINE_6 = [1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]
FACTORS: dict[str, tuple[dict[str, Any], list[float]]] = {
    # Warm-up of ceil(0.25 * 8) = 2 steps at 1/2 and 1, then 1 - share over the other 6.
    "linear": ({"shape": "linear", "warmup_ratio": 0.25}, [0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0]),
    # (1 + cos(pi share)) / 2 for shares 0, 1/6, ..., 5/6.
    "cosine": ({"shape": "cosine", "warmup_ratio": 0.25}, [0.5, 1.0, *COSINE_6, 0.0]),
    # ceil(0.3 * 8) = ceil(2.4) = 3.
    "rounded_up": ({"shape": "constant", "warmup_ratio": 0.3}, [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    "in_steps": ({"shape": "linear", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
    "no_warmup": ({"shape": "linear"}, [1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0]),
    "steps_0_beat_ratio": ({"shape": "constant", "warmup_ratio": 0.5, "warmup_steps": 0}, [1.0] * 9),
    "warmup_is_the_run": ({"shape": "linear", "warmup_steps": 8}, [step / 8 for step in range(1, 9)]),
}


@pytest.mark.parametrize(("options", "expected"), FACTORS.values(), ids=FACTORS)
def test_learning_rate_factor_over_8_steps(options: dict[str, Any], expected: list[float]):
    options = {"warmup_ratio": 0.0, "warmup_steps": None, "total_steps": 8, **options}
    assert [learning_rate_factor(step, **options) for step in range(len(expected))] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("ratio", "steps", "expected"),
    [
        (0.07, 100, 7),  # 7.000000000000001 in floats
        (0.07, 101, 8),
        (0.1, 30, 3),
        (0.29, 100, 29),
        (0.14, 50, 7),  # 7.000000000000001
        (0.55, 100, 55),  # 55.00000000000001
        (0.56, 100, 56),  # 56.00000000000001
        (3 * 0.1, 10, 3),  # 0.30000000000000004, as a script may work it out
        (1 / 3, 99, 33),
        (1 / 3, 100, 34),
        (2 / 3, 99, 66),
        (1e-6, 10, 1),
        (0.0, 10, 0),
    ],
)
def test_warmup_steps_are_exact(ratio: float, steps: int, expected: int):
    """The peak is reached at the last step of the warm-up, not after it."""
    factors = [learning_rate_factor(step, "constant", ratio, None, steps) for step in range(steps)]
    assert sum(factor < 1 for factor in factors) == max(expected - 1, 0)
    assert factors[0] == (1 / expected if expected else 1.0)


def test_learning_rate_factor_of_an_endless_constant_run():
    options = {"shape": "constant", "warmup_ratio": 0.0, "warmup_steps": 2, "total_steps": None}
    assert [learning_rate_factor(step, **options) for step in (0, 1, 2, 10_000)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_learning_rate_factor_past_the_end_is_0(shape: Any):
    assert learning_rate_factor(99, shape, 0.0, None, 8) == pytest.approx(0.0)


# ---- in a run ----


def logged(module: XPOLightningModule, name: str, batch_size: int = 3, **options: Any) -> list[float]:
    """Train on five prompts, two batches an epoch, and return what was logged at each step."""
    recorder = Recorder()
    fit_quietly(module, PROMPTS, batch_size=batch_size, callbacks=[recorder], **options)
    return recorder.of(name)


def test_alpha_list_in_a_longer_run_is_one_value_an_epoch(make_module: MakeModule):
    """Two batches an epoch, three epochs, two values; TRL's XPO fails at its second step here."""
    alphas = logged(make_module(alpha=[0.5, 0.25], beta=0.1), "alpha", max_epochs=3)
    assert alphas == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.25, 0.25])


def test_beta_list_weighs_the_loss_of_its_epoch(make_module: MakeModule):
    """At learning rate 0 every margin stays 0, and IPO's loss is (1 / (2 beta))^2: 5^2 = 25, then 1.25^2 = 1.5625."""
    recorder = Recorder()
    module = make_module(beta=[0.1, 0.4], preference_loss=IPOLoss(), learning_rate=0.0)
    fit_quietly(module, PROMPTS, max_epochs=2, callbacks=[recorder])
    assert recorder.of("pairs/identical") == [0.0, 0.0]
    assert recorder.of("beta") == pytest.approx([0.1, 0.4])
    assert recorder.of("loss/dpo") == pytest.approx([25.0, 1.5625], rel=1e-4)


def test_alpha_scales_the_logged_bonus(make_module: MakeModule):
    """Loss/xpo is alpha times the mean log-probability of the reference's completions."""
    recorder = Recorder()
    fit_quietly(make_module(alpha=[0.5, 0.25]), PROMPTS, max_epochs=2, callbacks=[recorder])
    for alpha, step in zip((0.5, 0.25), recorder.steps, strict=True):
        assert step["loss/xpo"] == pytest.approx(alpha * step["logps/reference_completions"], rel=1e-5)


def test_linear_alpha_falls_over_the_whole_run(make_module: MakeModule):
    """Six steps from 0.6 to 0: 0.6 - 0.1 * step."""
    alphas = logged(make_module(alpha=Linear(0.6, 0.0)), "alpha", max_epochs=3)
    assert alphas == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], abs=1e-6)


def test_linear_alpha_with_steps_holds_its_end(make_module: MakeModule):
    alphas = logged(make_module(alpha=Linear(0.6, 0.2, steps=2)), "alpha", max_steps=4, max_epochs=-1)
    assert alphas == pytest.approx([0.6, 0.4, 0.2, 0.2])


def test_learning_rate_of_a_run_warms_up_then_falls(make_module: MakeModule):
    """Six steps, ceil(0.3 * 6) = 2 of warm-up: 1/2, 1, then 1, 3/4, 2/4, 1/4 of the peak."""
    rates = logged(make_module(learning_rate=0.004, warmup_ratio=0.3), "lr", max_epochs=3)
    assert rates == pytest.approx([0.002, 0.004, 0.004, 0.003, 0.002, 0.001])


def test_learning_rate_counts_every_update_of_a_rollout(make_module: MakeModule):
    """Two rollouts of two updates each, 4 steps in all: the last update of each, steps 1 and 3, at 3/4 and 1/4."""
    rates = logged(make_module(learning_rate=0.004, updates_per_rollout=2), "lr")
    assert rates == pytest.approx([0.003, 0.001])


def test_first_step_at_the_peak_learning_rate_moves_the_weights_by_it(make_module: MakeModule):
    """AdamW's first step moves a weight whose gradient is not tiny by the learning rate, whatever the gradient."""
    module = make_module(learning_rate=0.004, lr_schedule="constant", warmup_steps=2)
    module.configure_model()
    before = [weight.detach().clone() for weight in module.policy.parameters()]
    fit_quietly(module, PROMPTS)
    moves = [(after - old).abs().max() for after, old in zip(module.policy.parameters(), before, strict=True)]
    assert torch.stack(moves).max().item() == pytest.approx(0.002, rel=1e-3)


def test_schedule_without_an_end_in_an_endless_run_is_refused_before_the_first_step(make_module: MakeModule):
    with pytest.raises(InputError, match=r"model\.lr_schedule and model\.warmup_ratio need the length of the run"):
        fit_quietly(make_module(), PROMPTS, max_epochs=-1)


def test_cosine_alpha_of_a_run(make_module: MakeModule):
    """Two steps from 1 to 0: 1, then (1 + cos(pi / 2)) / 2 = 0.5."""
    alphas = logged(make_module(alpha=Cosine(1.0, 0.0)), "alpha")
    assert alphas == pytest.approx([1.0, (1 + math.cos(math.pi / 2)) / 2])


def test_schedule_over_the_whole_run_before_it_begins_has_its_first_value(make_module: MakeModule):
    """The sanity check runs before the length of the run is known, and `validate` never knows it."""
    module = make_module(alpha=Linear(start=1e-3, end=0.0), micro_batch_size=2)
    recorder = Recorder()
    trainer = quiet_trainer(callbacks=[recorder], log_every_n_steps=1)
    trainer.fit(module, loader(PROMPTS, 2), loader(PROMPTS, 2))
    assert recorder.of("alpha") == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    (numbers,) = quiet_trainer().validate(module, loader(PROMPTS, 2), verbose=False)
    assert numbers["eval/loss/xpo"] == pytest.approx(1e-3 * numbers["eval/logps/reference_completions"])


def test_max_steps_is_kept_when_a_batch_makes_several_updates(make_module: MakeModule):
    trainer = fit_quietly(make_module(updates_per_rollout=2), PROMPTS, 5, max_steps=3, max_epochs=-1)
    assert trainer.global_step == 3


def experience_of(pairs: int) -> Experience:
    side = completions_of([[1, 2]] * pairs)
    numbers = torch.zeros(pairs)
    return Experience(
        prompts_of([[3]] * pairs), Pair(side, side), Pair(numbers, numbers), numbers, Pair(numbers, numbers)
    )


@pytest.mark.parametrize(("pairs", "updates", "sizes"), [(6, 4, [1, 2, 1, 2]), (5, 4, [1, 1, 1, 2]), (3, 5, [1, 1, 1])])
def test_update_plan_takes_as_many_updates_as_it_was_told(pairs: int, updates: int, sizes: list[int]):
    plan = UpdatePlan(micro_batch_size=1, micro_batch_tokens=None, updates_per_rollout=updates, epochs_per_rollout=1)
    steps = list(plan.steps(experience_of(pairs), noise()))
    assert [len(micro_batches) for micro_batches in steps] == sizes
    assert sorted(row for step in steps for rows in step for row in rows) == list(range(pairs))


def test_resumed_schedule_takes_its_settings_from_the_config_and_its_place_from_the_checkpoint():
    weight = torch.nn.Parameter(torch.zeros(1))

    def schedule(rate: float, shape: Any) -> WarmupThenDecay:
        made = WarmupThenDecay(torch.optim.SGD([weight], lr=rate), shape, 0.0, None)
        made.begin(10)
        return made

    before = schedule(1.0, "linear")
    for _ in range(4):
        before.optimizer.step()
        before.step()
    after = schedule(0.5, "constant")
    after.load_state_dict(before.state_dict())
    after.begin(10)
    assert after.last_epoch == 4
    assert after.optimizer.param_groups[0]["lr"] == 0.5
