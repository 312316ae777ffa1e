"""Requests over HTTP that go well, and those that fail and are tried again."""

import socket
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest
from reward_server import (
    QUICK,
    Request,
    Serve,
    failing,
    first,
    hang_up,
    remote,
    scores,
)

from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.remote import RemoteReward

pytestmark = pytest.mark.usefixtures("own_environment")


# --- requests that go well


def test_results_keep_the_order_of_the_completions_when_answers_come_in_reverse(serve: Serve) -> None:
    together = 4
    answered = [threading.Event() for _ in range(3 * together + 1)]

    def reversed_by_fours(request: Request) -> None:
        if request.number % together:
            answered[request.number].wait(5)  # until the one that came after this one is answered
        request.score()
        answered[request.number - 1].set()

    server = serve(reversed_by_fours)
    assert scores(remote(server, concurrency=together), 12) == list(range(12))
    assert server.most_in_flight == together


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(serve: Serve, limit: int) -> None:
    def slowly(request: Request) -> None:
        time.sleep(0.03)
        if request.number in (2, 5):
            request.answer("busy", 503)
        else:
            request.score()

    server = serve(slowly)
    assert scores(remote(server, concurrency=limit), 9) == list(range(9))
    assert server.most_in_flight == limit
    assert len(server.seen) == 11


def test_a_connection_serves_several_requests(serve: Serve) -> None:
    server = serve(Request.score)
    assert scores(remote(server, concurrency=1), 5) == list(range(5))
    assert len({request.client_address for request in server.seen}) == 1


# --- requests that fail, and are tried again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_busy_or_broken_server_is_tried_again(serve: Serve, status: int) -> None:
    server = serve(first(failing(status), 2))
    assert scores(remote(server)) == [0.0]
    assert len(server.seen) == 3


def test_tries_end(serve: Serve) -> None:
    server = serve(failing(500, {"error": "out of\nmemory"}))
    with pytest.raises(InputError) as caught:
        scores(remote(server, retries=3))
    assert len(server.seen) == 4
    assert str(caught.value) == (
        f'model.reward.init_args.url: {server.url} answered 500 (\'{{"error": "out of\\\\nmemory"}}\'), '
        f"tried 4 times; look at the server's log"
    )


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (400, "check the options"),
        (401, r"set model\.reward\.init_args\.api_key_env to the name"),
        (404, "check the URL"),
        (422, "check the options"),
    ],
)
def test_a_refusal_is_final(serve: Serve, status: int, advice: str) -> None:
    server = serve(failing(status))
    with pytest.raises(InputError, match=rf"answered {status} \('\"broken\"'\), tried once; {advice}"):
        scores(remote(server))
    assert len(server.seen) == 1


def test_waits_double_from_try_to_try(serve: Serve) -> None:
    server = serve(first(failing(500), 3))
    scores(remote(server, retries=3, backoff=0.05))
    for gap, least in zip(server.gaps, [0.05, 0.1, 0.2], strict=True):
        assert least <= gap < least + 1


def test_waits_have_a_limit(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xpo_lightning.core.http.batch._LONGEST_BACKOFF", 0.05)
    server = serve(first(failing(500), 2))
    scores(remote(server, backoff=3600))
    assert all(0.05 <= gap < 2 for gap in server.gaps)


def test_a_server_says_how_long_to_wait(serve: Serve) -> None:
    server = serve(first(failing(429, Retry_After="1")))
    assert scores(remote(server)) == [0.0]
    assert 1.0 <= server.gaps[0] < 1.5


@pytest.mark.parametrize("text", ["3600", "9" * 5000, formatdate(4e9, usegmt=True)])
def test_a_server_may_not_ask_for_any_wait(serve: Serve, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("xpo_lightning.core.http.batch._LONGEST_RETRY_AFTER", 0.1)
    server = serve(first(failing(503, Retry_After=text)))
    assert scores(remote(server)) == [0.0]
    assert 0.1 <= server.gaps[0] < 2


@pytest.mark.parametrize("text", ["soon", "-5", "²", formatdate(0, usegmt=True)])
def test_a_wait_that_makes_no_sense_is_not_kept(serve: Serve, text: str) -> None:
    server = serve(first(lambda request: request.answer("", 503, Retry_After=text.encode().decode("latin-1"))))
    assert scores(remote(server)) == [0.0]
    assert server.gaps[0] < 4


def break_off(request: Request) -> None:
    request.start(Content_Length="100")
    request.wfile.write(b'{"scores": ')
    request.close_connection = True


def break_off_a_chunk(request: Request) -> None:
    request.start(Transfer_Encoding="chunked")
    request.wfile.write(b'40\r\n{"scores": ')
    request.close_connection = True


def end_without_length(request: Request) -> None:
    request.start(Connection="close")
    request.wfile.write(b'{"scores": ')


def no_http(request: Request) -> None:
    request.wfile.write(b"good morning\r\n\r\n")
    request.close_connection = True


BROKEN = [hang_up, break_off, break_off_a_chunk, end_without_length, no_http]


@pytest.mark.parametrize("behave", BROKEN)
def test_a_broken_connection_is_tried_again(serve: Serve, behave: Callable[[Request], None]) -> None:
    server = serve(first(behave, 2))
    assert scores(remote(server)) == [0.0]
    assert len(server.seen) == 3


@pytest.mark.parametrize("behave", BROKEN)
def test_broken_connections_end_with_an_error(serve: Serve, behave: Callable[[Request], None]) -> None:
    server = serve(behave)
    with pytest.raises(InputError, match=rf"^model\.reward\.init_args\.url: {server.url} .*, tried 3 times; check"):
        scores(remote(server))
    assert len(server.seen) == 3


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and no listen
        port = nobody.getsockname()[1]
        url = f"http://127.0.0.1:{port}/"
        with pytest.raises(InputError) as caught:
            scores(RemoteReward(url, **QUICK))
    assert str(caught.value) == (
        f"model.reward.init_args.url: {url} could not be reached, or broke off (ConnectionRefusedError: [Errno 111] "
        f"Connect call failed ('127.0.0.1', {port})), tried 3 times; check that the server runs, and that the URL is "
        f"right"
    )


GARBAGE: list[Any] = [b"", b"<html>", b'{"scores"', b"\xff", b"[" * 100000, {"score": [1]}, {"scores": ["x"]}, "x", 3]


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_tried_again_and_quoted_in_the_end(serve: Serve, body: Any) -> None:
    server = serve(first(lambda request: request.answer(body), 2))
    assert scores(remote(server)) == [0.0]
    server = serve(lambda request: request.answer(body))
    with pytest.raises(InputError, match=r"a body that (is not JSON|has no list of scores) \('.*'\), tried 3 times"):
        scores(remote(server))
