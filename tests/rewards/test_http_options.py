"""Options of rewards over HTTP."""

import copy
import math
import pickle
from typing import Any

import jsonargparse
import pytest
from reward_server import (
    KEY,
    KEY_ENV,
    Request,
    Serve,
    always,
    judge_at,
    remote,
    scores,
    shown_by,
)

from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.base import Feedback
from xpo_lightning.rewards.http_judge import HTTPJudge
from xpo_lightning.rewards.remote import RemoteReward

pytestmark = pytest.mark.usefixtures("own_environment")


NO_URLS = [
    "",
    "localhost:8000",
    "ftp://h/x",
    "http://",
    "http:///x",
    "http://h:port/",
    "http://[::1/",
    "http://.h/x",
]


@pytest.mark.parametrize("url", [*NO_URLS, "http://h/#x", "http://h/ x", "http://h/\n"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"^model\.reward\.init_args\.url must "):
        RemoteReward(url)
    with pytest.raises(InputError, match=r"^model\.reward\.init_args\.url must "):
        HTTPJudge(url, "m")


@pytest.mark.parametrize("url", ["http://me:hunter2@h/", "me:hunter2@h", "https://hunter2@h?x", r"http://h\@hunter2"])
def test_a_password_in_a_url_is_refused_unseen(url: str) -> None:
    message = r"^model\.reward\.init_args\.url must not hold a user name or a password; set .*api_key_env"
    with pytest.raises(InputError, match=message) as caught:
        RemoteReward(url)
    assert "hunter2" not in shown_by(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("timeout", value) for value in (0.0, -1.0, math.nan, math.inf)),
        *(("backoff", value) for value in (-1.0, math.nan, math.inf)),
        ("retries", -1),
        ("concurrency", 0),
        ("max_bytes", 0),
    ],
)
def test_impossible_options_are_refused_by_name(option: str, value: float) -> None:
    for build in (lambda **o: RemoteReward("http://h", **o), lambda **o: HTTPJudge("http://h", "m", **o)):
        with pytest.raises(InputError, match=rf"^model\.reward\.init_args\.{option} must be .* but is {value}"):
            build(**{option: value})


def test_an_impossible_batch_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"^model\.reward\.init_args\.batch_size must be at least 1, but is 0"):
        RemoteReward("http://h", batch_size=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": " "}, r"model must be the name of a model"),
        ({"top_logprobs": 1}, r"top_logprobs must be at least 2"),
        ({"top_logprobs": 5, "logprobs": False}, r"top_logprobs needs .*logprobs to be true"),
        ({"min_probability": 0.5, "logprobs": False}, r"min_probability needs .*logprobs to be true"),
        ({"min_probability": 1.0}, r"min_probability must be at least 0 and below 1, but is 1\.0"),
        ({"min_probability": math.nan}, r"min_probability must be at least 0 and below 1, but is nan"),
        *(
            ({"extra_body": {name: 1}}, f"extra_body: '{name}' is taken")
            for name in ("model", "messages", "temperature", "max_tokens", "logprobs", "top_logprobs", "n", "stream")
        ),
        ({"extra_body": {"a": {1}}}, r"extra_body must be what JSON can hold"),
        ({"extra_body": {"a": math.nan}}, r"extra_body must be what JSON can hold"),
        ({"template": "{first}{second}"}, r"template must have \{prompt\}"),
        ({"invalid": "ignore"}, r"invalid must be skip, tie or error"),
    ],
)
def test_impossible_options_of_a_judge_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.reward\.init_args\.{message}"):
        HTTPJudge(**{"url": "http://h", "model": "m", **options})


@pytest.mark.parametrize("kind", [RemoteReward, HTTPJudge])
def test_every_option_is_explained_by_help(kind: type) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "reward")
    explained = parser.format_help().split("--reward.")[2:]
    undocumented = [text.split()[0] for text in explained if "(type:" in text and text.index("(type:") < 40]
    assert len(explained) >= 9
    assert undocumented == []


def test_they_are_built_from_yaml(serve: Serve) -> None:
    server = serve(Request.score)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Feedback)
    config = {
        "class_path": "xpo_lightning.rewards.remote.RemoteReward",
        "init_args": {"url": server.url, "api_key_env": KEY_ENV, "columns": []},
    }
    parsed = parser.parse_object({"reward": config})
    reward = parser.instantiate(parsed).reward
    assert reward(["p"], ["7"], {"answer": ["x"]}).tolist() == [7.0]
    assert server.seen[0].payload["columns"] == {}
    assert KEY not in parser.dump(parsed)


def test_identity_names_what_scores_depend_on() -> None:
    reward = RemoteReward("http://h:1/s", KEY_ENV, columns=["a"], timeout=1.0)
    assert reward.identity() == {
        "class": "xpo_lightning.rewards.remote.RemoteReward",
        "url": "http://h:1/s",
        "columns": ["a"],
    }
    options: dict[str, Any] = {"template": "{prompt}{first}{second}", "system": "be fair", "extra_body": {"seed": 1}}
    assert HTTPJudge("http://h/v1", "m", KEY_ENV, both_orders=True, invalid="tie", **options).identity() == {
        "class": "xpo_lightning.rewards.http_judge.HTTPJudge",
        "url": "http://h/v1",
        "model": "m",
        "both_orders": True,
        "invalid": "tie",
        "logprobs": True,
        "top_logprobs": 20,
        "min_probability": 0.1,
        **options,
    }


def test_copies_work_alike(serve: Serve) -> None:
    server = serve(Request.score)
    reward = remote(server, api_key_env=KEY_ENV)
    assert scores(reward, 2) == [0.0, 1.0]
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):  # noqa: S301
        assert scores(twin, 2) == [0.0, 1.0]
        assert twin.identity() == reward.identity()
    judge = judge_at(serve(always("A")))
    for judge_twin in (copy.deepcopy(judge), pickle.loads(pickle.dumps(judge))):  # noqa: S301
        assert judge_twin.ask(["q"]) == [1.0]
