"""Requests over HTTP that hang, are broken off, are answered with too much, or are redirected."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import thread as executors

import pytest
from reward_server import (
    KEY_ENV,
    QUICK,
    Request,
    Serve,
    drip,
    dripping_body,
    endless,
    failing,
    first,
    remote,
    scores,
    sending_threads,
    silent,
    wait_until,
)

from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.remote import RemoteReward

pytestmark = pytest.mark.usefixtures("own_environment")


# --- requests that hang


def dripping_body_of_an_old_server(request: Request) -> None:
    request.start(Connection="close")
    drip(request)


def dripping_headers(request: Request) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    drip(request)


def dripping_redirect(request: Request) -> None:
    request.start(302, Content_Length="100000")
    drip(request)


HANGING = [silent, dripping_body, dripping_body_of_an_old_server, dripping_headers, dripping_redirect]


@pytest.mark.parametrize("behave", HANGING)
def test_a_request_takes_only_so_long(serve: Serve, behave: Callable[[Request], None]) -> None:
    server = serve(behave)
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        scores(remote(server, timeout=0.15, retries=1))
    assert 0.3 <= time.monotonic() - start < 5
    assert str(caught.value) == (
        f"model.reward.init_args.url: {server.url} has not answered in full after 0.15 seconds, tried 2 times; raise "
        f"model.reward.init_args.timeout, or lower model.reward.init_args.concurrency if the server is busy"
    )
    assert wait_until(lambda: not sending_threads()), "no thread is left behind"
    assert behave is silent or server.hung_up.wait(2), "the server is told, by a closed connection"


@pytest.mark.parametrize("behave", [silent, dripping_body])
def test_one_request_that_hangs_holds_up_no_other(serve: Serve, behave: Callable[[Request], None]) -> None:
    server = serve(first(behave))
    assert scores(remote(server, timeout=1.0, concurrency=2), 8) == list(range(8))
    assert len(server.seen) == 9


class Stopped(SystemExit):
    pass


def test_a_run_that_is_asked_to_stop_does_not_wait(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xpo_lightning.core.timed_call._LONGEST_WAIT", 0.05)
    server = serve(silent)
    reward = remote(server, timeout=60.0)
    asked = threading.Event()

    def check() -> None:
        assert all(thread.daemon for thread in sending_threads())
        if asked.is_set():
            raise Stopped

    reward.set_check(check)
    threading.Timer(0.1, asked.set).start()
    start = time.monotonic()
    with pytest.raises(Stopped):
        scores(reward)
    assert time.monotonic() - start < 2
    assert wait_until(lambda: not sending_threads()), "what was under way is broken off"


def test_a_run_that_is_asked_to_stop_does_not_wait_for_the_next_try(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xpo_lightning.core.timed_call._LONGEST_WAIT", 0.1)
    server = serve(failing(503, Retry_After="50"))
    reward, end = remote(server), time.monotonic() + 0.2

    def check() -> None:
        if time.monotonic() > end:
            raise Stopped

    reward.set_check(check)
    with pytest.raises(Stopped):
        scores(reward)
    assert time.monotonic() - end < 5


def test_ctrl_c_ends_a_wait_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xpo_lightning.core.timed_call._LONGEST_WAIT", 60.0)

    def press(request: Request) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        request.hang()

    server = serve(press)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        scores(remote(server, timeout=60.0))
    assert time.monotonic() - start < 5


def test_the_first_final_failure_breaks_the_other_requests_off(serve: Serve) -> None:
    def behave(request: Request) -> None:
        if request.payload["completions"] == ["3"]:
            request.answer("no", 404)
        else:
            request.hang()

    server = serve(behave)
    start = time.monotonic()
    with pytest.raises(InputError, match="answered 404"):
        scores(remote(server, timeout=60.0, concurrency=4), 8)
    assert time.monotonic() - start < 5
    assert len(server.seen) <= 4
    assert wait_until(lambda: not sending_threads())


def test_a_host_that_cannot_be_looked_up_in_time_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(20) and [])
    before = set(threading.enumerate())
    start = time.monotonic()
    try:
        with pytest.raises(InputError, match=r"has not answered in full after 0\.1 seconds, tried 2 times"):
            scores(RemoteReward("http://rewards.invalid", **{**QUICK, "timeout": 0.1, "retries": 1}))
        assert time.monotonic() - start < 5
        left = set(threading.enumerate()) - before
        assert left, "the look-ups still hang, or the test shows nothing"
        waited_for = {thread for thread in left if not thread.daemon} | left & set(executors._threads_queues)
        assert not waited_for, "the process would wait for them at its end"
    finally:
        answered.set()


def test_a_notebook_with_an_event_loop_of_its_own_can_score(serve: Serve) -> None:
    server = serve(Request.score)

    async def cell() -> list[float]:
        return scores(remote(server), 3)

    assert asyncio.run(cell()) == [0.0, 1.0, 2.0]


def test_neither_threads_nor_files_are_left_open(serve: Serve) -> None:
    reward = remote(serve(Request.score))
    scores(reward)
    assert wait_until(lambda: not sending_threads())
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        scores(reward, 4)
    assert wait_until(lambda: not sending_threads())
    # The server's half of a connection takes a moment longer to close.
    assert wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)


# --- answers that are too large, and redirects


def test_an_answer_may_be_only_so_large(serve: Serve) -> None:
    server = serve(endless)
    with pytest.raises(InputError, match=r"answered more than 1000 bytes, tried once; .*raise .*init_args\.max_bytes"):
        scores(remote(server, max_bytes=1000))
    assert server.hung_up.wait(2)


def test_an_answer_of_just_the_limit_is_read(serve: Serve) -> None:
    body = b'{"scores": [1.0]}'
    server = serve(lambda request: request.answer(body))
    assert scores(remote(server, max_bytes=len(body))) == [1.0]
    with pytest.raises(InputError, match=f"more than {len(body) - 1} bytes"):
        scores(remote(server, max_bytes=len(body) - 1))


def test_an_error_of_any_size_keeps_its_status(serve: Serve) -> None:
    server = serve(lambda request: endless(request, 404))
    with pytest.raises(InputError, match="answered 404, tried once"):
        scores(remote(server, max_bytes=10))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(serve: Serve, status: int) -> None:
    other = serve(Request.score)
    server = serve(lambda request: endless(request, status, Location=f"{other.url}?session=1"))
    with pytest.raises(InputError, match=rf"answered {status}, a redirect to '{other.url}', .*set .*init_args\.url to"):
        scores(remote(server, api_key_env=KEY_ENV))
    assert len(server.seen) == 1
    assert other.seen == []
