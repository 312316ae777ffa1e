"""Weighted sums, rewards of one's own, and rewards by name in a config."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from scoring import COMPLETIONS, PROMPTS, assert_same, by_length, ids_of, score, score_alone
from torch import Tensor

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.errors import InputError, NonFiniteError
from xpo_lightning.rewards import PythonReward, Reward, SequenceClassifierReward, WeightedSum

# --- weighted sums


class Constant(Reward):
    """Gives every completion the same score, once loaded."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.loads = 0

    def load(self) -> None:
        self.loads += 1

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        return torch.full((len(completions),), self.value)


def test_a_weighted_sum_adds_up() -> None:
    parts: list[Reward] = [Constant(10.0), PythonReward(by_length), Constant(1.0)]
    reward = WeightedSum(parts, [0.5, 2, -3.0])
    reward.load()
    assert score(reward, ["p", "q"], ["abc", ""]).tolist() == [8.0, 2.0]  # 5 + 2 * 3 - 3 and 5 + 0 - 3
    assert [part.loads for part in parts if isinstance(part, Constant)] == [1, 1]


def test_a_weighted_sum_scores_with_models(llama: str) -> None:
    reward = WeightedSum([SequenceClassifierReward(llama), Constant(1.0)], [2.0, 1.0])
    reward.load()
    rows = [ids_of(p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert_same(score(reward, PROMPTS, COMPLETIONS), 2 * score_alone(llama, rows) + 1)


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([], [], "rewards: give at least one reward"),
        ([1.0], [1.0, 2.0], "weights: expected 1 weights, one for each reward, but got 2"),
        ([1.0], [float("nan")], "weights: every weight must be a finite number"),
    ],
)
def test_weights_must_fit_the_rewards(values: list[float], weights: list[float], message: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.reward\.init_args\.{message}"):
        WeightedSum([Constant(value) for value in values], weights)


def test_a_broken_part_of_a_sum_is_named() -> None:
    with pytest.raises(NonFiniteError, match=r"^Constant gave nan for row 0") as caught:
        score(WeightedSum([Constant(float("nan"))], [1.0]), ["p", "q"], ["c", "d"])
    assert caught.value.rows == [0, 1]
    with pytest.raises(NonFiniteError, match=r"^WeightedSum gave inf for row 0"):
        score(WeightedSum([Constant(1e38)], [100.0]), ["p"], ["c"])
    with pytest.raises(InputError, match=r"^reward (\w+\.)+Failing raised KeyError: 'grade'"):
        score(WeightedSum([Constant(1.0), Failing(KeyError("grade"))], [1.0, 1.0]), ["p"], ["c"])


class Failing(Reward):
    """Raises in place of scoring."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("no grade"), StopIteration("no grade"), RuntimeError("no grade")])
def test_what_a_reward_of_ones_own_raises_names_its_class(error: Exception) -> None:
    with pytest.raises(
        InputError, match=rf"^reward (\w+\.)+Failing raised {type(error).__name__}: no grade$"
    ) as caught:
        score(Failing(error), ["p"], ["c"])
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [InputError("row 3 has no answer"), NonFiniteError("nan", [3]), KeyboardInterrupt()])
def test_bad_input_and_ctrl_c_pass_a_reward_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        score(WeightedSum([Failing(error)], [1.0]), ["p"], ["c"])
    assert caught.value is error


# --- configuration


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the name of an importable module with a reward function."""
    code = """
        def matches(prompts, completions, columns, bonus=0.0):
            return [float(a == b) + bonus for a, b in zip(completions, columns["answer"], strict=True)]
    """
    (tmp_path / "user_rewards_for_test.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    return "user_rewards_for_test"


def build(config: dict[str, Any]) -> Reward:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    parsed = parser.parse_object({"reward": config})
    reward = parser.instantiate(parsed).reward
    assert isinstance(reward, Reward)
    return reward


@pytest.mark.parametrize("prefix", ["", "xpo_lightning.rewards."])
def test_a_function_from_yaml(user_module: str, prefix: str) -> None:
    init_args = {"function": f"{user_module}.matches", "arguments": {"bonus": 0.5}}
    reward = build({"class_path": f"{prefix}PythonReward", "init_args": init_args})
    assert score(reward, ["p", "q"], ["yes", "no"], answer=["yes", "yes"]).tolist() == [1.5, 0.5]


@pytest.mark.parametrize("prefix", ["", "xpo_lightning.rewards."])
def test_nested_rewards_from_yaml(user_module: str, llama: str, prefix: str) -> None:
    function = {"class_path": f"{prefix}PythonReward", "init_args": {"function": f"{user_module}.matches"}}
    classifier = {"class_path": f"{prefix}SequenceClassifierReward", "init_args": {"path": llama, "truncate": "right"}}
    init_args = {"rewards": [function, classifier], "weights": [100, 1]}
    reward = build({"class_path": f"{prefix}WeightedSum", "init_args": init_args})
    reward.load()
    expected = torch.tensor([100.0, 0.0]) + score_alone(llama, [ids_of("the cat"), ids_of("the dog")])
    assert_same(score(reward, ["the", "the"], [" cat", " dog"], answer=[" cat", "no"]), expected)


def test_every_option_of_the_classifier_is_explained_by_help() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SequenceClassifierReward, "reward")
    explained = parser.format_help().split("--reward.")[2:]
    undocumented = [text.split()[0] for text in explained if "(type:" in text and text.index("(type:") < 40]
    assert len(explained) >= 12
    assert undocumented == []


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ({"path": "x", "truncate": "middle"}, "middle"),
        ({"path": "x", "no_such_option": 1}, "no_such_option"),
        ({}, "path"),
    ],
)
def test_wrong_yaml_is_refused_by_name(init_args: dict[str, Any], message: str) -> None:
    with pytest.raises(jsonargparse.ArgumentError, match=message):
        build({"class_path": "SequenceClassifierReward", "init_args": init_args})


def test_identities_keep_the_names_that_reference_caches_know(model_folder: Callable[..., str]):
    """Reward classes may move inside the package, and caches that were written before must stay valid."""
    assert PythonReward(by_length).identity()["class"] == "xpo_lightning.rewards.function.PythonReward"
    classifier = SequenceClassifierReward(model_folder("llama"), allow_untrained_head=True)
    classifier.load()
    assert classifier.identity()["class"] == "xpo_lightning.rewards.classifier.SequenceClassifierReward"
    both = WeightedSum([PythonReward(by_length), PythonReward(by_length)], [1.0, 1.0])
    assert both.identity()["class"] == "xpo_lightning.rewards.weighted.WeightedSum"
