"""Sums of standardised rewards, also over several processes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from conftest import PROMPTS, loader, longer_is_better, quiet_trainer
from torch import Tensor
from two_processes import in_two

from xpo_lightning import PythonReward, XPOLightningModule
from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.errors import InputError, NonFiniteError
from xpo_lightning.core.fault_tolerance.guard import Guard, StopAsked
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.weighted_sum import WeightedSum


class Listed(Reward):
    """Gives each completion the number that it is."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        return self.scale * torch.tensor([float(text) for text in completions])


def scores_of(reward: Reward, completions: Sequence[str]) -> list[float]:
    result: Tensor = reward(["p"] * len(completions), completions, {})
    return result.tolist()


def test_standardised_scores():
    # 1, 2, 3: mean 2, variance (1 + 0 + 1) / 3, so that 1 becomes -1 / sqrt(2/3) = -sqrt(1.5) = -1.224745
    reward = WeightedSum([Listed()], [1.0], normalize="batch")
    assert scores_of(reward, ["1", "2", "3"]) == pytest.approx([-1.224745, 0.0, 1.224745], abs=1e-6)
    # A scale and an offset change nothing: 1e6 and 1e6 + 1 are half a deviation's double apart.
    assert scores_of(reward, ["1000000", "1000001"]) == [-1.0, 1.0]


def test_weights_apply_to_standardised_scores():
    reward = WeightedSum([Listed(), Listed(-1000.0)], [2.0, 0.5], normalize="batch")
    assert scores_of(reward, ["5", "7"]) == [-1.5, 1.5]  # z = -1, 1 and 1, -1: 2 * -1 + 0.5 * 1 and 2 * 1 - 0.5 * 1


@pytest.mark.parametrize("completions", [["0.1", "0.1", "0.1"], ["3"], []])
def test_scores_without_a_deviation_become_0(completions: list[str]):
    assert scores_of(WeightedSum([Listed()], [5.0], normalize="batch"), completions) == [0.0] * len(completions)


def test_a_sum_says_whether_its_scores_depend_on_the_batch():
    plain, batch = WeightedSum([Listed()], [1.0]), WeightedSum([Listed()], [1.0], normalize="batch")
    assert not plain.depends_on_batch
    assert batch.depends_on_batch
    assert WeightedSum([batch], [1.0]).depends_on_batch
    assert plain.identity() != batch.identity()
    assert scores_of(plain, ["1", "2"]) == [1.0, 2.0]


def test_unknown_ways_to_normalize_are_refused():
    with pytest.raises(InputError, match=r"init_args\.normalize must be none or batch, but is 'global'"):
        WeightedSum([Listed()], [1.0], normalize="global")


def standardised_on(rank: int) -> list[float]:
    return scores_of(WeightedSum([Listed()], [1.0], normalize="batch"), [["1"], ["2", "3"]][rank])


def test_scores_are_standardised_over_all_processes():
    first, second = in_two(lambda rank, _: standardised_on(rank))
    assert [*first, *second] == pytest.approx([-1.224745, 0.0, 1.224745], abs=1e-6)


def guarded(rank: int, work: Callable[[], Any]) -> Any:
    """Do work as the module does, then once more without trouble: processes that fell out of step would fail then."""
    guard, outcome = Guard(max_skipped=1), None
    try:
        with guard.step() as step:
            outcome = work()
        outcome = None if step.is_skipped else outcome
    except (Exception, StopAsked) as error:
        outcome = f"{type(error).__name__}: {error}"
    with guard.step():
        again = standardised_on(rank)
    return outcome, again


def test_prediction_on_processes_that_may_have_different_numbers_of_batches_is_refused(
    make_module: Callable[..., XPOLightningModule], monkeypatch: pytest.MonkeyPatch
):
    module = make_module(reward=WeightedSum([PythonReward(longer_is_better)], [1.0], normalize="batch"))
    trainer = quiet_trainer()
    trainer.predict(module, loader(PROMPTS, 2))
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(InputError, match=r"model\.reward .*normalize: batch.* trainer\.devices to 1"):
        trainer.predict(module, loader(PROMPTS, 2))


def trouble_before_scoring(rank: int) -> Any:
    return guarded(rank, lambda: standardised_on(rank) if rank == 0 else 1 / 0)


def trouble_in_a_nested_sum(rank: int) -> Any:
    inner = WeightedSum([Listed()], [1.0], normalize="batch")
    outer = WeightedSum([Listed(), inner], [1.0, 1.0], normalize="batch")
    return guarded(rank, lambda: scores_of(outer, ["1", "two" if rank else "2"]))


def stopped_before_scoring(rank: int) -> Any:
    def stop() -> None:
        raise StopAsked(143)

    return guarded(rank, lambda: standardised_on(rank) if rank == 0 else stop())


def not_finite_before_scoring(rank: int) -> Any:
    def fail() -> None:
        raise NonFiniteError("a log-probability is nan", [0])

    return guarded(rank, lambda: standardised_on(rank) if rank == 0 else fail())


@pytest.mark.parametrize(
    ("work", "messages"),
    [
        (trouble_before_scoring, ["RuntimeError: process 1: division by zero", "ZeroDivisionError: division by zero"]),
        (trouble_in_a_nested_sum, ["InputError: process 1: reward ", "InputError: reward "]),
        (stopped_before_scoring, ["StopAsked: 143", "StopAsked: 143"]),
        (not_finite_before_scoring, [None, None]),  # left out on both, as `max_skipped` allows
    ],
)
def test_trouble_on_one_process_keeps_both_in_step(work: Callable[[int], Any], messages: list[str | None]):
    results = in_two(lambda rank, _: work(rank))
    for (outcome, _), message in zip(results, messages, strict=True):
        assert outcome is None if message is None else outcome.startswith(message)
    assert [*results[0][1], *results[1][1]] == pytest.approx([-1.224745, 0.0, 1.224745], abs=1e-6)
