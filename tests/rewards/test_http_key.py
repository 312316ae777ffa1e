"""The API key of rewards over HTTP, which is shown nowhere."""

import json
import logging
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reward_server import (
    KEY,
    KEY_ENV,
    Request,
    Serve,
    failing,
    hang_up,
    remote,
    scores,
    shown_by,
)

from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.base import Feedback
from xpo_lightning.rewards.http_judge import HTTPJudge
from xpo_lightning.rewards.remote import RemoteReward

pytestmark = pytest.mark.usefixtures("own_environment")


# --- the key


def echo_of(text: str) -> dict[str, Callable[[Request], None]]:
    """Name ways in which a server says the key back."""
    in_url = text.replace("/", "%2F").replace("+", "%2B")
    return {
        "401": failing(401, {"error": f"bad key {text}, or {in_url}"}),
        "401 with escapes": failing(401, f'{{"error": "{text}"}}'.replace("/", "\\/").encode()),
        "500": failing(500, ("x" * 288 + text).encode()),
        "redirect": failing(302, Location=f"http://127.0.0.1/{text}"),
        "redirect with a query": failing(302, Location=f"http://127.0.0.1/?key={in_url}"),
        "no JSON": lambda request: request.answer(f"<html>{text}".encode()),
        "no scores": lambda request: request.answer({"scores": [text]}),
        "no ids": lambda request: request.answer({"scores": [1.0], "ids": [text]}),
        "no HTTP": lambda request: request.wfile.write(f"{text}\r\n\r\n".encode()) and hang_up(request),
        "header": lambda request: request.answer({"scores": []}, X_Key=text, Retry_After=text),
        "hang": lambda request: request.wfile.write(f"HTTP/1.1 200 {text}\r\n".encode()) and request.hang(),
    }


@pytest.mark.parametrize("way", echo_of("").keys())
@pytest.mark.parametrize("kind", ["remote", "judge"])
def test_the_key_is_shown_nowhere(
    serve: Serve, kind: str, way: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(echo_of(KEY)[way])
    options: dict[str, Any] = {"backoff": 0.01, "retries": 1, "timeout": 0.15, "api_key_env": KEY_ENV}
    if kind == "remote":
        feedback: Feedback = RemoteReward(server.url, **options)
        arguments: Any = (["p"], ["c"], {})
    else:
        feedback, arguments = HTTPJudge(server.url, "m", **options), (["p"], ["c"], ["d"], {})
    feedback.load()
    with pytest.raises(InputError) as caught:
        feedback(*arguments)
    assert {request.headers["Authorization"] for request in server.seen} == {f"Bearer {KEY}"}
    elsewhere = [
        str([(name, text) for name, text in request.headers.items() if name != "Authorization"]) + request.path
        for request in server.seen
    ]
    assert caught.value.__context__ is None, "an error of the HTTP library holds the headers"
    with_locals = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    captured = capfd.readouterr()
    everything = [
        *elsewhere,
        json.dumps([request.payload for request in server.seen]),
        shown_by(caught.value),
        "".join(with_locals.format()),
        caplog.text,
        captured.out + captured.err,
        repr(feedback) + str(vars(feedback)),
        json.dumps(feedback.identity()),
        pickle.dumps(feedback).decode("latin-1"),
    ]
    for text in everything:
        assert "qzxwv" not in text
        assert "plughx" not in text


def test_a_redacted_key_leaves_the_rest_of_a_message(serve: Serve) -> None:
    server = serve(failing(401, {"error": f"bad key {KEY}, go away"}))
    with pytest.raises(InputError, match=r"bad key \[key\], go away.*check the API key in the environment"):
        scores(remote(server, api_key_env=KEY_ENV))


def test_a_key_that_comes_in_parts_is_redacted(serve: Serve) -> None:
    def behave(request: Request) -> None:
        request.start(401, Transfer_Encoding="chunked")
        for part in (KEY[:10], KEY[10:], ""):
            request.wfile.write(f"{len(part):x}\r\n{part}\r\n".encode())

    with pytest.raises(InputError, match=r"answered 401 \('\[key\]'\)"):
        scores(remote(serve(behave), api_key_env=KEY_ENV, max_bytes=4))


def test_a_short_key_does_no_harm_to_scores(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "1")
    assert scores(remote(serve(Request.score), api_key_env=KEY_ENV), 2) == [0.0, 1.0]


@pytest.mark.parametrize("key", [None, KEY])
def test_netrc_is_not_read(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str | None) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hidden\ndefault login me password hidden\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = serve(Request.score)
    scores(remote(server, api_key_env=None if key is None else KEY_ENV))
    assert server.seen[0].headers["Authorization"] == (None if key is None else f"Bearer {key}")


@pytest.mark.parametrize("value", [None, ""])
def test_a_key_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(KEY_ENV)
    if value is not None:
        monkeypatch.setenv(KEY_ENV, value)
    message = r"^model\.reward\.init_args\.api_key_env: the environment variable TEST_REWARD_KEY is not set"
    for feedback in (
        RemoteReward("http://localhost", api_key_env=KEY_ENV),
        HTTPJudge("http://localhost", "m", api_key_env=KEY_ENV),
    ):
        with pytest.raises(InputError, match=message):
            feedback.load()


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "clé"])
def test_what_cannot_be_a_key_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(KEY_ENV, key)
    with pytest.raises(InputError, match=r"variable TEST_REWARD_KEY holds a blank, a line break or") as caught:
        RemoteReward("http://localhost", api_key_env=KEY_ENV).load()
    assert key not in shown_by(caught.value)


@pytest.mark.parametrize("name", ["sk-proj-abc", "hf_AbCdEf", "my_key", "SK-1", "1A"])
def test_a_key_in_place_of_its_variables_name_is_refused_unseen(name: str) -> None:
    message = r"^model\.reward\.init_args\.api_key_env must be the name of an environment variable, in capitals"
    with pytest.raises(InputError, match=message) as caught:
        RemoteReward("http://localhost", api_key_env=name)
    assert name not in str(caught.value)
