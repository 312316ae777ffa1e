"""Rewards over HTTP, against a real server that misbehaves in every way that servers do."""

import copy
import json
import logging
import math
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch

from xpo_lightning.core.errors import InputError, NonFiniteError
from xpo_lightning.rewards.base import Feedback
from xpo_lightning.rewards.http_judge import HTTPJudge
from xpo_lightning.rewards.remote import RemoteReward

KEY = "sk-qzxwv/plughx+123"
KEY_ENV = "TEST_REWARD_KEY"
QUICK: dict[str, Any] = {"backoff": 0.01, "retries": 2, "timeout": 5.0}


class Request(BaseHTTPRequestHandler):
    """One request, as the server of a test sees it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def do_POST(self) -> None:
        server = self.server
        self.payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            self.number, self.time = len(server.seen) + 1, time.monotonic()
            server.seen.append(copy.copy(self))  # one handler serves all requests of a connection
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            server.behave(self)
        except OSError:  # the client has hung up
            self.close_connection = True
            server.hung_up.set()
        finally:
            with server.lock:
                server.in_flight -= 1

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        """Answer with JSON, or with bytes as they are."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.start(status, **{"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def start(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()

    def score(self) -> None:
        """Score each completion by the number that it is."""
        self.answer({"scores": [float(text) for text in self.payload["completions"]]})

    def hang(self) -> None:
        self.server.release.wait(60)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A server that does with each request what a test says; it keeps the requests in their order."""

    request_queue_size = 64

    def __init__(self, behave: Callable[[Request], None]) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.behave = behave
        self.lock, self.release, self.hung_up = threading.Lock(), threading.Event(), threading.Event()
        self.seen: list[Request] = []
        self.in_flight = self.most_in_flight = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/score"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True).start()

    @property
    def gaps(self) -> list[float]:
        """Seconds from each request to the next."""
        return [after.time - before.time for before, after in zip(self.seen, self.seen[1:], strict=False)]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no proxy or `.netrc` of the machine in, and set the key."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv(KEY_ENV, KEY)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Request], None]], Server]]:
    """Give a function that starts a server."""
    servers: list[Server] = []

    def start(behave: Callable[[Request], None]) -> Server:
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.release.set()
        server.shutdown()
        server.server_close()


Serve = Callable[[Callable[[Request], None]], Server]


def remote(server: Server, **options: Any) -> RemoteReward:
    return RemoteReward(server.url, **{**QUICK, "batch_size": 1, **options})


def scores(reward: RemoteReward, count: int = 1) -> list[float]:
    """Score the completions 0, 1, 2, ..., which the server scores 0, 1, 2, ..."""
    result: list[float] = reward(["p"] * count, [str(number) for number in range(count)], {}).tolist()
    return result


def first(behave: Callable[[Request], None], count: int = 1) -> Callable[[Request], None]:
    """Misbehave on the first requests, and score after that."""
    return lambda request: behave(request) if request.number <= count else request.score()


def failing(status: int, body: Any = "broken", **headers: str) -> Callable[[Request], None]:
    return lambda request: request.answer(body, status, **headers)


def sending_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reward request"]


def wait_until(true: Callable[[], bool], seconds: float = 2.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


# --- requests that go well


def test_a_remote_reward_gets_its_protocol(serve: Serve) -> None:
    server = serve(lambda request: request.answer({"scores": [0.5] * len(request.payload["ids"])}))
    chat = [{"role": "user", "content": "hi"}]
    reward = RemoteReward(server.url, batch_size=2, concurrency=1)
    reward.load()
    given = reward(["p", chat, "q"], ["a", "b", "c"], {"answer": ["4", None, "é"], "level": [1, 2, 3]})
    assert given.tolist() == [0.5, 0.5, 0.5]
    assert given.dtype == torch.float32
    assert [request.payload for request in server.seen] == [
        {
            "ids": [0, 1],
            "prompts": ["p", chat],
            "completions": ["a", "b"],
            "columns": {"answer": ["4", None], "level": [1, 2]},
        },
        {"ids": [0], "prompts": ["q"], "completions": ["c"], "columns": {"answer": ["é"], "level": [3]}},
    ]
    assert {request.headers["Content-Type"] for request in server.seen} == {"application/json"}
    assert {request.path for request in server.seen} == {"/score"}


def test_no_completions_are_no_request(serve: Serve) -> None:
    server = serve(Request.score)
    assert scores(remote(server), 0) == []
    assert server.seen == []


def test_scores_may_be_a_bare_list_and_truth_values(serve: Serve) -> None:
    server = serve(lambda request: request.answer([True, False, 2]))
    assert scores(remote(server, batch_size=3), 3) == [1.0, 0.0, 2.0]


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


def hang_up(request: Request) -> None:
    request.close_connection = True


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


# --- requests that hang


def silent(request: Request) -> None:
    request.hang()


def dripping_body(request: Request) -> None:
    request.start(Content_Length="100000")
    drip(request)


def dripping_body_of_an_old_server(request: Request) -> None:
    request.start(Connection="close")
    drip(request)


def dripping_headers(request: Request) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    drip(request)


def dripping_redirect(request: Request) -> None:
    request.start(302, Content_Length="100000")
    drip(request)


def drip(request: Request) -> None:
    while not request.server.release.wait(0.02):
        request.wfile.write(b" ")
        request.wfile.flush()


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
    assert scores(remote(server, timeout=0.4, concurrency=2), 8) == list(range(8))
    assert len(server.seen) == 9


class Stopped(SystemExit):
    pass


def test_a_run_that_is_asked_to_stop_does_not_wait(serve: Serve) -> None:
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


# --- answers that are too large, and redirects


def endless(request: Request, status: int = 200, **headers: str) -> None:
    request.start(status, Connection="close", **headers)
    while not request.server.release.is_set():
        request.wfile.write(b" " * 65536)


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


def shown_by(error: BaseException | None) -> str:
    """Return what an error shows, with all that is behind it."""
    if error is None:
        return ""
    return f"{error} {error!r} {vars(error)} {shown_by(error.__cause__)} {shown_by(error.__context__)}"


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
    captured = capfd.readouterr()
    everything = [
        *elsewhere,
        json.dumps([request.payload for request in server.seen]),
        shown_by(caught.value),
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


def test_a_proxy_of_the_environment_is_used(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(Request.score)
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/score"))
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/score"))
    assert scores(RemoteReward("http://rewards.invalid/score", **QUICK)) == [0.0]
    assert proxy.seen[0].path == "http://rewards.invalid/score"


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


# --- options


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


# --- scores of a remote reward


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_scores_is_named(serve: Serve, count: int) -> None:
    server = serve(lambda request: request.answer({"scores": [1.0] * count}))
    with pytest.raises(InputError, match=rf"^reward server {server.url} gave {count} scores for 3 completions"):
        scores(remote(server, batch_size=3), 3)
    assert len(server.seen) == 1


def test_wrong_numbers_of_two_requests_do_not_make_up_for_each_other(serve: Serve) -> None:
    server = serve(lambda request: request.answer({"scores": [1.0] * (1 if request.number == 1 else 3)}))
    with pytest.raises(InputError, match="gave 1 scores for 2 completions"):
        scores(remote(server, batch_size=2, concurrency=1), 4)


def test_ids_put_scores_into_order(serve: Serve) -> None:
    def backwards(request: Request) -> None:
        numbers = [float(text) for text in request.payload["completions"]]
        request.answer({"ids": request.payload["ids"][::-1], "scores": numbers[::-1]})

    assert scores(remote(serve(backwards), batch_size=3), 7) == list(range(7))


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 1], [1, 2, 3], [0, 1, "2"], [0, 1, 2.0], [False, True, 2]])
def test_ids_that_are_not_those_of_the_request_are_refused(serve: Serve, ids: list[Any]) -> None:
    server = serve(lambda request: request.answer({"ids": ids, "scores": [1, 2, 3]}))
    with pytest.raises(InputError, match=rf"^reward server {server.url} gave ids that are not .*, 0 to 2, each once"):
        scores(remote(server, batch_size=3), 3)
    assert len(server.seen) == 1


def test_scores_that_are_not_finite_have_their_rows(serve: Serve) -> None:
    odd = {"2": math.nan, "5": 1e39}
    server = serve(lambda request: request.answer([odd.get(text, 0.0) for text in request.payload["completions"]]))
    with pytest.raises(NonFiniteError, match=r"gave nan for row 2 and 1e\+39 for row 5") as caught:
        scores(remote(server, batch_size=2), 6)
    assert caught.value.rows == [2, 5]


def test_a_score_that_is_missing_is_named(serve: Serve) -> None:
    with pytest.raises(InputError, match=r"reward server .* gave None for row 1; a score must be a number"):
        scores(remote(serve(lambda request: request.answer([0.5, None])), batch_size=2), 2)


def test_only_the_named_columns_are_sent(serve: Serve) -> None:
    server = serve(lambda request: request.answer([1]))
    reward = remote(server, columns=["answer"])
    reward(["p"], ["c"], {"answer": ["x"], "image": [object()]})
    assert server.seen[0].payload["columns"] == {"answer": ["x"]}
    with pytest.raises(InputError, match=r"init_args\.columns: the rows have no column 'answer', but \['image'\]"):
        reward(["p"], ["c"], {"image": [1]})


@pytest.mark.parametrize("value", [object(), torch.tensor(1.0), b"x", math.nan, {(1, 2): 3}])
def test_a_column_that_json_cannot_hold_is_refused(serve: Serve, value: Any) -> None:
    server = serve(Request.score)
    with pytest.raises(InputError, match=r"column 'image' cannot be sent as JSON \(.*\); name the columns to send in"):
        remote(server)(["p"], ["c"], {"answer": ["x"], "image": [value]})
    assert server.seen == []


def test_a_prompt_that_json_cannot_hold_is_refused(serve: Serve) -> None:
    server = serve(Request.score)
    with pytest.raises(InputError, match=r"the prompts cannot be sent as JSON \(.*\); write the images"):
        remote(server)([[{"role": "user", "content": object()}]], ["c"], {})
    assert server.seen == []


# --- the judge


PLAIN = "P:{prompt}|{first}|{second}"


def completion(text: Any, tops: Any = None) -> dict[str, Any]:
    """Write a chat completion; `tops` are the likeliest first tokens and their probabilities."""
    logprobs = None
    if tops is not None:
        listed = [{"token": token, "logprob": math.log(p) if p else -9999.0, "bytes": []} for token, p in tops]
        logprobs = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": listed}]}
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}]}


def always(text: Any, tops: Any = None) -> Callable[[Request], None]:
    return lambda request: request.answer(completion(text, tops))


def judge_at(server: Server, **options: Any) -> HTTPJudge:
    return HTTPJudge(server.url, "m", **{**QUICK, "template": PLAIN, **options})


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
