"""Judges: what they are asked and in which order, what their verdict means, and each way in which that goes wrong."""

import inspect
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jsonargparse
import pytest
from judging import BAD, GOOD, PROMPTS, SHORT, ask
from torch import Tensor

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.base import Judge
from xpo_lightning.rewards.human_judge import HumanJudge
from xpo_lightning.rewards.llm_judge import PromptedJudge, is_exchanged
from xpo_lightning.rewards.local_judge import LocalJudge
from xpo_lightning.rewards.python import PythonJudge
from xpo_lightning.rewards.weighted_sum import WeightedSum


class Stub(PromptedJudge):
    """Answers each question by a rule, and keeps what it was asked."""

    def __init__(self, rule: Callable[[str], float | None], template: str = SHORT, **options: Any) -> None:
        super().__init__(template, **options)
        self.rule = rule
        self.asked: list[str] = []

    def ask(self, questions: Sequence[str]) -> list[float | None]:
        self.asked += questions
        return [self.rule(question) for question in questions]


class Says(Judge):
    """Gives always the same answers."""

    def __init__(self, answers: Any, **options: Any) -> None:
        super().__init__(**options)
        self.answers, self.pairs = answers, 0

    def compare(
        self,
        prompts: Sequence[RawPrompt],
        firsts: Sequence[str],
        seconds: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        self.pairs += len(prompts)
        return self.answers


def good_is_better(question: str) -> float:
    _, first, _ = question.split("|")
    return float("good" in first)


# ---- any judge ----


def test_texts_that_are_the_same_are_a_tie_and_not_asked_about():
    judge = Says([1.0])
    assert ask(judge, ["p", "q", "r"], ["a", "b", "c"], ["a", "x", "c"]) == [0.5, 1.0, 0.5]
    assert judge.pairs == 1
    assert ask(Says(None), ["p"], ["a"], ["a"]) == [0.5]


def test_columns_are_those_of_the_pairs_that_are_asked_about():
    seen = []

    def look(columns: dict[str, list[Any]], **_: Any) -> list[float]:
        seen.append(columns)
        return [0.0]

    PythonJudge(look)(["p", "q"], ["a", "b"], ["a", "c"], {"key": [1, 2]})
    assert seen == [{"key": [2]}]


@pytest.mark.parametrize("invalid", ["skip", "tie"])
@pytest.mark.parametrize("nothing", [None, math.nan])
def test_no_answer_stays_nan(invalid: Any, nothing: float | None):
    said = ask(Says([nothing, 0.25], invalid=invalid), ["p", "q"], ["a", "b"], ["x", "y"])
    assert math.isnan(said[0])
    assert said[1] == 0.25


def test_no_answer_ends_the_run_where_that_is_wanted():
    with pytest.raises(InputError, match=r"Says gave no usable answer for 1 of 2 pairs; set model\.reward\.init_args"):
        ask(Says([None, 1.0], invalid="error"), ["p", "q", "r"], ["a", "b", "c"], ["x", "y", "c"])


@pytest.mark.parametrize("wrong", [1.2, -0.1, math.inf])
def test_what_is_no_probability_is_refused(wrong: float):
    with pytest.raises(InputError, match=rf"^judge .*Says gave {wrong} for row 1; .* must be between 0 and 1$"):
        ask(Says([1.0, wrong]), ["p", "q"], ["a", "b"], ["x", "y"])


def test_unknown_rule_for_invalid_answers_is_refused():
    with pytest.raises(InputError, match=r"init_args\.invalid must be skip, tie or error, but is 'maybe'"):
        Says([], invalid="maybe")


# ---- judges that are language models ----


def test_the_order_that_was_shown_is_taken_out_of_the_verdict():
    judge = Stub(good_is_better)
    assert ask(judge, PROMPTS, GOOD, BAD) == [1.0] * 200
    assert ask(judge, PROMPTS, BAD, GOOD) == [0.0] * 200
    shown_first = sum("good" in question.split("|")[1] for question in judge.asked[:200])
    assert shown_first == sum(not is_exchanged(*pair) for pair in zip(PROMPTS, GOOD, BAD, strict=True))
    assert 70 <= shown_first <= 130  # 200 fair coins: 100, and 30 is more than four standard deviations of 7.07


def test_a_judge_that_likes_the_first_favours_neither_side():
    always_a = Stub(lambda _: 0.9)
    said = ask(always_a, PROMPTS, GOOD, BAD)
    assert {round(one, 6) for one in said} == {0.9, 0.1}
    assert sum(said) / 200 == pytest.approx(0.5, abs=0.12)  # 0.4 times the mean of 200 signs, whose deviation is 0.07


def test_both_orders_take_all_liking_of_a_place_away():
    judge = Stub(lambda _: 0.9, both_orders=True)
    assert ask(judge, PROMPTS, GOOD, BAD) == [0.5] * 200
    assert len(judge.asked) == 400
    sure = Stub(good_is_better, both_orders=True)
    assert ask(sure, PROMPTS, GOOD, BAD) == [1.0] * 200


def test_a_pair_without_an_answer_in_one_order_has_none():
    def silent_where_good_is_first(question: str) -> float | None:
        return None if good_is_better(question) else 0.0

    assert all(math.isnan(one) for one in ask(Stub(silent_where_good_is_first, both_orders=True), PROMPTS, GOOD, BAD))


def test_the_order_is_that_of_the_texts_alone():
    judge, other = Stub(lambda _: 0.9), Stub(lambda _: 0.9)
    together = ask(judge, PROMPTS, GOOD, BAD)
    assert [ask(other, [PROMPTS[row]], [GOOD[row]], [BAD[row]])[0] for row in range(20)] == together[:20]


def test_the_question_holds_the_texts_as_they_are():
    judge = Stub(lambda _: 0.5, template="<{prompt}> {first} / {second} {other}")
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say {first}."}]
    ask(judge, [prompt], ["{second}"], ["x{prompt}\\1"])
    texts = ["{second}", "x{prompt}\\1"]
    first, second = texts[::-1] if is_exchanged(prompt, *texts) else texts
    assert judge.asked == [f"<system: Be kind.\n\nuser: Say {{first}}.> {first} / {second} {{other}}"]


@pytest.mark.parametrize("missing", ["prompt", "first", "second"])
def test_a_template_without_a_place_is_refused(missing: str):
    with pytest.raises(InputError, match=rf"init_args\.template must have \{{{missing}\}} in it"):
        Stub(lambda _: 0.5, template=SHORT.replace(f"{{{missing}}}", ""))


# ---- a function ----


def shorter(prompts: list[Any], firsts: list[str], seconds: list[str], columns: dict[str, list[Any]]) -> list[bool]:
    return [len(first) < len(second) for first, second in zip(firsts, seconds, strict=True)]


def test_a_functions_verdict_is_about_the_side_that_it_was_shown():
    shorts, longs = [f"{number}" for number in range(50)], [f"longer {number}" for number in range(50)]
    assert ask(PythonJudge(shorter), PROMPTS[:50], shorts, longs) == [1.0] * 50
    assert ask(PythonJudge(shorter), PROMPTS[:50], longs, shorts) == [0.0] * 50


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_of_a_functions_pairs_is_shuffled_where_that_is_wanted(shuffle: bool):
    seen: list[str] = []

    def first(firsts: list[str], **_: Any) -> list[float]:
        seen.extend(firsts)
        return [0.75] * len(firsts)

    said = ask(PythonJudge(first, shuffle=shuffle), PROMPTS, GOOD, BAD)
    swapped = [shuffle and is_exchanged(*pair) for pair in zip(PROMPTS, GOOD, BAD, strict=True)]
    assert seen == [bad if swap else good for good, bad, swap in zip(GOOD, BAD, swapped, strict=True)]
    assert said == [0.25 if swap else 0.75 for swap in swapped]
    assert (0 < sum(swapped) < 200) is shuffle


def test_a_function_gets_lists_and_its_arguments_and_may_have_no_answer():
    def check(
        prompts: list[Any], firsts: list[str], seconds: list[str], columns: dict[str, list[Any]], bonus: float
    ) -> list[float | None]:
        assert all(isinstance(some, list) for some in (prompts, firsts, seconds, columns["key"]))
        return [None if key == "none" else bonus for key in columns["key"]]

    judge = PythonJudge(check, {"bonus": 0.5})
    said = judge(("p", "q"), ("a", "b"), ("x", "y"), {"key": ("none", "some")})
    assert math.isnan(said[0])
    assert said[1] == 0.5
    assert judge.identity()["arguments"] == {"bonus": 0.5}


def test_a_judge_that_hangs_ends_the_run():
    def hang(**_: Any) -> list[float]:
        time.sleep(30)
        return [0.5]

    with pytest.raises(InputError, match=r"^judge function .*hang has not returned after 0\.1 seconds; .*timeout"):
        ask(PythonJudge(hang, timeout=0.1), ["p"], ["a"], ["b"])


def test_a_judge_function_that_fails_is_named():
    def broken(**_: Any) -> list[float]:
        raise KeyError("grade")

    with pytest.raises(InputError, match=r"^judge function .*broken raised KeyError: 'grade'$"):
        ask(PythonJudge(broken), ["p"], ["a"], ["b"])
    with pytest.raises(InputError, match=r"^judge function .* gave 1\.2 for row 0; .* between 0 and 1$"):
        ask(PythonJudge(lambda **_: [1.2]), ["p"], ["a"], ["b"])
    with pytest.raises(InputError, match=r"^judge function .* returned a list of length 2; expected 1 numbers"):
        ask(PythonJudge(lambda **_: [0.5, 0.5]), ["p"], ["a"], ["b"])


def test_a_function_that_cannot_be_a_judge_is_refused():
    def reward(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        return []

    with pytest.raises(InputError, match=r"init_args\.function: .*reward.* prompts, firsts, seconds, columns \("):
        PythonJudge(reward)
    with pytest.raises(InputError, match=r"init_args\.arguments: 'firsts' is taken"):
        PythonJudge(shorter, {"firsts": []})
    with pytest.raises(InputError, match=r"init_args\.timeout must be above 0 or null, but is nan"):
        PythonJudge(shorter, timeout=math.nan)


# ---- configuration ----


@pytest.mark.parametrize("kind", [LocalJudge, PythonJudge, HumanJudge, WeightedSum])
def test_every_option_is_explained_by_help(kind: type):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "judge")
    described = [re.split(r"\((?:required,\s+)?type:", text) for text in parser.format_help().split("--judge.")]
    options = [parts[0].split() for parts in described if len(parts) > 1]  # [name, kind, words of the description]
    assert len(options) == len(inspect.signature(kind).parameters)
    assert [words for words in options if len(words) < 6] == []


def test_judges_from_yaml():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--judge", type=Judge)
    local = {"path": "some/judge", "both_orders": True, "truncate": "error", "min_probability": 0.5}
    for name, init_args in (
        ("LocalJudge", local),
        ("PythonJudge", {"function": f"{__name__}.shorter", "shuffle": False, "timeout": None}),
        ("HumanJudge", {"invalid": "tie"}),
    ):
        config = {"class_path": f"xpo_lightning.rewards.{name}", "init_args": init_args}
        judge = parser.instantiate(parser.parse_object({"judge": config})).judge
        assert type(judge).__name__ == name
        told = judge.identity()
        assert {option: told[option] for option in init_args if option not in ("function", "timeout")} == {
            option: value for option, value in init_args.items() if option not in ("function", "timeout")
        }
