"""A judge over HTTP: what it asks, and what it makes of the answers."""

import math
from typing import Any

import pytest
import torch
from reward_server import (
    Request,
    Serve,
    always,
    completion,
    failing,
    judge_at,
)

from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.http_judge import HTTPJudge

pytestmark = pytest.mark.usefixtures("own_environment")


def test_a_judge_asks_as_it_is_told(serve: Serve) -> None:
    server = serve(always("A"))
    judge = HTTPJudge(f"{server.url}/?version=1", "m", system="be fair", top_logprobs=5, extra_body={"seed": 1})
    judge.ask(["which?"])
    assert server.seen[0].path == "/score/chat/completions?version=1"
    assert server.seen[0].payload == {
        "model": "m",
        "messages": [{"role": "system", "content": "be fair"}, {"role": "user", "content": "which?"}],
        "temperature": 0,
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 5,
        "seed": 1,
    }
    judge_at(server, logprobs=False).ask(["which?"])
    assert server.seen[1].path == "/score/chat/completions"
    assert server.seen[1].payload == {
        "model": "m",
        "messages": [{"role": "user", "content": "which?"}],
        "temperature": 0,
        "max_tokens": 8,
    }


@pytest.mark.parametrize(
    ("text", "tops", "expected"),
    [
        ("A", [("A", 0.6), (" A", 0.15), ("B", 0.25)], 0.75),  # (0.6 + 0.15) / (0.6 + 0.15 + 0.25)
        ("A", [("A", 0.2), ("B", 0.2), ("The", 0.6)], 0.5),  # what is neither does not count
        ("B", [("B", 0.3), ("▁B", 0.1), ("ĠB", 0.2), ("A", 0.2)], 0.25),  # 0.2 / (0.2 + 0.3 + 0.1 + 0.2)
        ("A", [("A", 0.9), ("The", 0.1)], 1.0),  # B is less likely than all that are listed
        ("B", [("B", 1.0), ("A", 0.0)], 0.0),
        ("A", [("AB", 0.7), ("a", 0.1), ("B", 0.2)], 0.0),  # neither token is the letter A
        (None, [("A", 0.3), ("B", 0.1)], 0.75),
        ("**B**", [("**", 0.95), ("A", 0.03), ("B", 0.02)], 0.0),  # too little for A and B: the text counts
        ("The better", [("The", 0.99), ("A", 0.01)], None),  # an article, not a verdict
        ("A", [], 1.0),
        ("B", None, 0.0),
    ],
)
def test_verdicts_by_log_probabilities(serve: Serve, text: Any, tops: Any, expected: float | None) -> None:
    (said,) = judge_at(serve(always(text, tops))).ask(["q"])
    assert said == (expected if expected is None else pytest.approx(expected, abs=1e-12))


def test_the_least_probability_of_a_verdict_can_be_set(serve: Serve) -> None:
    server = serve(always("The", [("The", 0.94), ("A", 0.03), ("B", 0.01)]))
    assert judge_at(server).ask(["q"]) == [None]
    assert judge_at(server, min_probability=0.05).ask(["q"]) == [None]
    assert judge_at(server, min_probability=0.03).ask(["q"]) == [pytest.approx(0.75)]
    server = serve(always("The", [("The", 1.0)]))
    assert judge_at(server, min_probability=0.0).ask(["q"]) == [None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("A", 1.0), (" B.", 0.0), ("A)", 1.0), ("(B)", 0.0), ("**A**", 1.0), ("_B_", 0.0), ("\nA\n", 1.0)),
        *(("", None), (None, None), ("C", None), ("a", None), ("A or B", None), ("AB", None), ("A dog", None)),
        *(("Neither", None), ("A, B", None), ([{"type": "text"}], None), (1, None)),
    ],
)
def test_verdicts_by_text(serve: Serve, text: Any, expected: float | None) -> None:
    server = serve(always(text, [("B", 0.9), ("A", 0.1)]))  # listed although nobody asked
    assert judge_at(server, logprobs=False).ask(["q"]) == [expected]
    assert len(server.seen) == 1, "an answer that is of no use is not asked for again"


NO_COMPLETIONS: list[Any] = [
    *(b"<html>", {}, [], None, {"error": "x"}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": "A"}]}),
    {"choices": [{"message": {"content": "A"}, "logprobs": "x"}]},
    {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": [{"token": "A"}]}]}}]},
    *(
        {"choices": [{"message": {}, "logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": p}]}]}}]}
        for p in (math.nan, 5.0, "x", None)
    ),
]


@pytest.mark.parametrize("body", NO_COMPLETIONS, ids=str)
def test_what_is_no_chat_completion_is_tried_again_and_refused_in_the_end(serve: Serve, body: Any) -> None:
    judge = judge_at(serve(lambda request: always("B")(request) if request.number == 3 else request.answer(body)))
    assert judge.ask(["q"]) == [0.0]
    with pytest.raises(InputError, match=r"answered with a body that is (not JSON|no chat completion) .*tried 3 times"):
        judge_at(serve(lambda request: request.answer(body))).ask(["q"])


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_log_probabilities_is_understood(serve: Serve, status: int) -> None:
    server = serve(failing(status, {"error": "logprobs is not supported"}))
    message = r"logprobs is not supported.*tried once; .*set model\.reward\.init_args\.logprobs to false"
    with pytest.raises(InputError, match=message):
        judge_at(server).ask(["q"])
    with pytest.raises(InputError) as caught:
        judge_at(server, logprobs=False).ask(["q"])
    assert "init_args.logprobs" not in str(caught.value)


def test_unusable_answers_become_what_invalid_says(serve: Serve) -> None:
    def behave(request: Request) -> None:
        unsure = "odd" in request.payload["messages"][0]["content"]
        request.answer(completion("I cannot say" if unsure else "A"))

    server = serve(behave)
    arguments: Any = (["even", "odd", "odd"], ["a", "a", "same"], ["b", "b", "same"], {})
    said = judge_at(server)(*arguments)
    assert said[0] in (0.0, 1.0)
    assert said[1].isnan()
    assert said[2] == 0.5
    with pytest.raises(InputError, match=r"judge .*HTTPJudge gave no usable answer for 1 of 2 pairs"):
        judge_at(server, invalid="error")(*arguments)


PAIRS = 100
TEXTS: list[list[str]] = [
    [f"prompt {row}" for row in range(PAIRS)],
    ["good" if row % 2 else "bad" for row in range(PAIRS)],
    ["bad" if row % 2 else "good" for row in range(PAIRS)],
]
FIRST_IS_GOOD = torch.tensor([float(row % 2) for row in range(PAIRS)])


def prefer_good(request: Request) -> None:
    """Prefer the completion that is "good", with a probability of 0.98."""
    _, first_shown, _ = request.payload["messages"][0]["content"].split("|")
    p = 0.98 if first_shown == "good" else 0.02
    request.answer(completion("A" if p > 0.5 else "B", [("A", p), ("B", 1 - p)]))


@pytest.mark.parametrize("both_orders", [False, True])
def test_the_order_in_which_completions_are_shown_does_not_matter(serve: Serve, both_orders: bool) -> None:
    server = serve(prefer_good)
    said = judge_at(server, both_orders=both_orders)(*TEXTS, {})
    torch.testing.assert_close(said, 0.02 + 0.96 * FIRST_IS_GOOD)
    asked = [request.payload["messages"][0]["content"] for request in server.seen]
    assert len(asked) == (2 if both_orders else 1) * PAIRS
    exchanged = sum(f"P:{p}|{b}|{a}" in asked for p, a, b in zip(*TEXTS, strict=True))
    kept = sum(f"P:{p}|{a}|{b}" in asked for p, a, b in zip(*TEXTS, strict=True))
    assert kept + exchanged == len(asked)
    assert exchanged == PAIRS if both_orders else 30 < exchanged < 70


def test_a_judge_that_always_says_a_favours_neither_side(serve: Serve) -> None:
    server = serve(always("A"))
    assert 0.3 < float(judge_at(server)(*TEXTS, {}).mean()) < 0.7
    assert judge_at(server, both_orders=True)(*TEXTS, {}).tolist() == [0.5] * PAIRS
