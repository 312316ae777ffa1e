"""The addresses of a vLLM server, and how they are asked."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import requests

from xpo_lightning.errors import InputError
from xpo_lightning.rewards.http import HTTPClient, RequestError, UnusableError
from xpo_lightning.rewards.http_line import Reply, TryError, late
from xpo_lightning.rollout.vllm_protocol import OPTIONS

T = TypeVar("T")
Check = Callable[[], None]
_MAX_BYTES = 2**26
_CHUNK = 65536
_FAREWELL = 10.0  # seconds for what nothing depends on
_ADVICE = "check that a vLLM server runs there"
_LONGEST_LOOK = 30.0  # seconds for the version and the models, which a server has at hand
_LONGEST_BACKOFF = 30.0  # seconds


class VLLMServer:
    """Asks one vLLM server for JSON; each request is tried again and given up as `HTTPClient` says.

    Args:
        url: Of the server, without a path.
        api_key_env: See `HTTPClient`, as for the others.
        timeout: Seconds.
        retries: How often a request is tried again.
        backoff: Seconds before the second try.
        concurrency: Most requests under way at once.

    Raises:
        InputError: An option is of no use.
    """

    def __init__(
        self, url: str, api_key_env: str | None, timeout: float, retries: int, backoff: float, concurrency: int
    ) -> None:
        if "?" in url:
            raise InputError(f"{OPTIONS}.url must hold no '?', but is {url!r}; give the server's address alone")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._options: tuple[Any, ...] = (api_key_env, timeout, retries, backoff, concurrency, _MAX_BYTES)
        self._endpoint("")

    def look(self, path: str, read: Callable[[Any], T], check: Check) -> T:
        """Read what is at a path.

        Raises:
            InputError: It cannot be read, or `read` has refused it.
        """
        with _naming_the_rollout():
            return self._endpoint(path).look(read, check)

    def post(self, path: str, payloads: Sequence[Any], read: Callable[[Any], T], check: Check) -> list[T]:
        """Post to a path; see `HTTPClient.post`."""
        with _naming_the_rollout():
            return self._endpoint(path).post(payloads, read, check)

    def tell(self, path: str, payload: Any) -> None:
        """Post what nothing depends on: once, with little patience, and whatever comes of it."""
        key, timeout, _, *others = self._options
        with suppress(InputError):
            _Endpoint(self.url + path, key, min(timeout, _FAREWELL), 0, *others).post(
                [payload], lambda _: None, lambda: None
            )

    def _endpoint(self, path: str) -> "_Endpoint":
        with _naming_the_rollout():
            return _Endpoint(self.url + path, *self._options)


class _Endpoint(HTTPClient):
    """One address. It can be looked at as well, and what it answers need not be JSON."""

    def look(self, read: Callable[[Any], T], check: Check) -> T:
        """Get JSON and read it."""
        terms, wait = self.terms, self.terms.backoff
        for left in range(terms.retries, -1, -1):
            try:
                return read(self._looked(min(terms.timeout, _LONGEST_LOOK), check))
            except TryError as error:
                failure = error
            if left:
                _sleep(min(wait, _LONGEST_BACKOFF), check)
                wait *= 2
        often = f"{terms.retries + 1} times" if terms.retries else "once"
        raise RequestError(f"{OPTIONS}.url: {terms.url} {failure.what}, tried {often}; {_ADVICE}", failure.status)

    def _looked(self, timeout: float, check: Check) -> Any:
        """Get JSON once; the thread that waits for it is left alone when its time is over."""
        ended: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._get, args=(self._key(), timeout, ended), name="vllm look", daemon=True).start()
        end = time.monotonic() + timeout
        while True:
            check()
            left = end - time.monotonic()
            if left <= 0:
                raise late(timeout)
            try:
                outcome = ended.get(timeout=min(left, 1.0))
            except Empty:
                continue
            if isinstance(outcome, TryError):
                raise outcome
            return _parsed(outcome)

    def _get(self, key: str | None, timeout: float, ended: "SimpleQueue[Any]") -> None:
        def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if key is not None:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        try:
            with requests.get(
                self.terms.url, auth=sign, timeout=timeout, stream=True, allow_redirects=False
            ) as response:
                body = bytearray()
                for chunk in response.iter_content(_CHUNK):
                    body += chunk
                    if len(body) > self.terms.max_bytes:
                        break
            status = response.status_code
            ended.put(bytes(body) if status == 200 else TryError(f"answered {status}", _ADVICE, status=status))
        except Exception as error:  # urllib3 and the standard library let some of their own through
            what = f"could not be reached, or broke off ({type(error).__name__})"
            ended.put(TryError(what, _ADVICE))

    def _result(self, reply: Reply, read: Callable[[Any], T]) -> T:
        """Read an answer; where adapters are loaded a sentence is one."""
        if 200 <= reply.status < 300 and reply.body.startswith(b"Success"):
            return read(reply.body.decode(errors="replace"))
        return super()._result(reply, read)


def _sleep(seconds: float, check: Check) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, 1.0))


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise UnusableError("is not JSON") from None


@contextmanager
def _naming_the_rollout() -> Iterator[None]:
    """Let the client, which speaks of the reward that it was made for, speak of the rollout."""
    try:
        yield
    except RequestError as error:
        raise RequestError(_renamed(error), error.status) from None
    except InputError as error:
        raise InputError(_renamed(error)) from None


def _renamed(error: InputError) -> str:
    return str(error).replace("model.reward.init_args", OPTIONS).replace("options of the reward", "server's log")
