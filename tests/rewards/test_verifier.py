"""`VerifierReward`: answers that are right, wrong, missing, hostile; and what ends the process that looks at them."""

import copy
import os
import signal
import time
from typing import Any

import pytest

from xpo_lightning import InputError, VerifierReward


def scores(reward: VerifierReward, answer: Any, *completions: str, **columns: Any) -> list[float]:
    rows = {
        "answer": [answer] * len(completions),
        **{name: [value] * len(completions) for name, value in columns.items()},
    }
    return reward([""] * len(completions), list(completions), rows).tolist()


@pytest.fixture(scope="module")
def math() -> VerifierReward:
    return VerifierReward("math", timeout=1.0)


def test_answers_are_compared_by_their_value(math: VerifierReward):
    right = ["so it is 0.5", r"\boxed{\frac{1}{2}}", "first 3, then $1/2$", "The final answer is $0.50$."]
    assert scores(math, r"\frac12", *right) == [1.0] * len(right)
    assert scores(math, r"\frac12", "0.6", "", "no number", r"\boxed{2}") == [0.0] * 4
    assert scores(math, 12, "12", "12.0", "13") == [1.0, 1.0, 0.0]
    assert scores(math, r"\sqrt{8}", r"$2\sqrt{2}$", "2") == [1.0, 0.0]


def test_rows_are_scored_by_their_own_answers(math: VerifierReward):
    assert math(["", ""], ["1", "1"], {"answer": ["1", "2"]}).tolist() == [1.0, 0.0]


@pytest.mark.filterwarnings("ignore:.*gave no verdict")
@pytest.mark.parametrize(
    "bomb",
    [
        "$9^{9^{9^{9^{9}}}}$",
        "$" + "(" * 300 + "1" + ")" * 300 + "$",
        "$" + r"\frac{" * 2000,
        "{" * 5000,
        "1" * 20_000,
        "x" * 100_000,
        "\0\ud83d \u202e\n\r",
    ],
    ids=["power tower", "parentheses", "fractions", "braces", "digits", "letters", "odd characters"],
)
def test_hostile_completion_is_wrong_within_its_time_and_the_next_is_verified(math: VerifierReward, bomb: str):
    begun = time.monotonic()
    assert scores(math, "4", bomb) == [0.0]
    assert time.monotonic() - begun < 10, "a second for the verdict, some for starting the process again"
    assert scores(math, "4", "4") == [1.0]


def test_an_answer_without_a_verdict_is_warned_of_once():
    reward = VerifierReward("math", timeout=0.5)
    with pytest.warns(UserWarning, match=r"gave no verdict on '\$9\^.*within 0\.5 seconds.*counts as wrong"):
        scores(reward, "4", "$9^{9^{9^{9^{9}}}}$")
    scores(reward, "4", "$9^{9^{9^{9^{8}}}}$")  # a second warning would be an error


def test_pattern_finds_the_answer_and_its_format_counts():
    reward = VerifierReward("exact", pattern="<answer>(.*?)</answer>", format_score=0.25)
    completions = ["<answer> a\n</answer>", "<answer>b</answer> no: <answer>a</answer>", "<answer>b</answer>", "a"]
    assert scores(reward, "a", *completions) == [1.25, 1.25, 0.25, 0.0]


def test_scorers_of_reasoning_gym_see_the_task_of_the_row():
    gym = pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    reward = VerifierReward("reasoning_gym")
    for task in ("chain_sum", "countdown"):
        entry = gym.create_dataset(task, size=1, seed=1)[0]
        columns = {"metadata": entry["metadata"]}
        found = scores(reward, entry["answer"], entry["answer"], "7 bananas", **columns)
        assert found == pytest.approx([1.0, gym.get_score_answer_fn(task)("7 bananas", entry)])
        assert found[1] < 1


def test_a_verifier_that_is_killed_is_started_again_and_a_copy_has_its_own():
    reward = VerifierReward("exact")
    assert scores(reward, "a", "a") == [1.0]
    other = copy.deepcopy(reward)
    process = reward._process._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="gave no verdict"):
        scores(reward, "a", "a")
    assert scores(reward, "a", "a", "b") == [1.0, 0.0]
    assert scores(other, "a", "a") == [1.0]


def test_no_process_outlives_its_reward():
    reward = VerifierReward("exact")
    scores(reward, "a", "a")
    process = reward._process._process
    assert process is not None
    del reward
    assert process.poll() is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verifier": "none"}, "verifier must be one of math, reasoning_gym, exact, but is 'none'"),
        ({"pattern": "(a"}, "is no regular expression"),
        ({"pattern": "a"}, "has no group; put parentheses around the answer"),
        ({"format_score": 1.0}, "format_score is for completions that match .*pattern, which is null"),
        ({"timeout": 0}, "init_args.timeout"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        VerifierReward(**options)


def test_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("xpo_lightning.rewards.verifier.reward.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package math-verify; run: pip install math-verify"):
        VerifierReward("math")


def test_rows_without_an_answer_are_refused():
    with pytest.raises(InputError, match="answer_column=answer: the rows have no such column, but reply"):
        VerifierReward("exact")(["a"], ["a"], {"reply": ["a"]})
    with pytest.raises(InputError, match="answer_column=answer: row 2 of a batch has none"):
        VerifierReward("exact")(["a", "b"], ["a", "b"], {"answer": ["a", None]})
