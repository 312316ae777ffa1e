"""A server that misbehaves in every way that servers do, and what tests of rewards over HTTP share."""

import copy
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from xpo_lightning.rewards.http_judge import HTTPJudge
from xpo_lightning.rewards.remote import RemoteReward

KEY = "sk-qzxwv/plughx+123"
KEY_ENV = "TEST_REWARD_KEY"
PLAIN = "P:{prompt}|{first}|{second}"
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


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no `.netrc` or certificates of the machine in, and set the key."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
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


def hang_up(request: Request) -> None:
    request.close_connection = True


def silent(request: Request) -> None:
    request.hang()


def dripping_body(request: Request) -> None:
    request.start(Content_Length="100000")
    drip(request)


def drip(request: Request) -> None:
    while not request.server.release.wait(0.02):
        request.wfile.write(b" ")
        request.wfile.flush()


def endless(request: Request, status: int = 200, **headers: str) -> None:
    request.start(status, Connection="close", **headers)
    while not request.server.release.is_set():
        request.wfile.write(b" " * 65536)


def shown_by(error: BaseException | None) -> str:
    """Return what an error shows, with all that is behind it."""
    if error is None:
        return ""
    return f"{error} {error!r} {vars(error)} {shown_by(error.__cause__)} {shown_by(error.__context__)}"


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
