"""Sends requests to the endpoints of a vLLM server."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import HTTPClient, RequestError
from xpo_lightning.core.http.connection import Response
from xpo_lightning.rollout.vllm.protocol import OPTIONS

T = TypeVar("T")
Check = Callable[[], None]
_MAX_BYTES = 2**26
_FAREWELL = 10.0  # timeout in seconds of requests whose outcome does not matter
_LONGEST_LOOK = 30.0  # timeout in seconds for the version and the models, which a server answers quickly
_SHORT_LOOK = 2.0  # timeout in seconds to find out whether a server that was left out is back
_MOST_LOOKS = 3  # retries for these; a wrong address should be reported soon


class VLLMServer:
    """Sends JSON requests to one vLLM server, with the retries of `HTTPClient`.

    Args:
        url: URL of the server, without a path; a final `/v1` is removed.
        api_key_env: Name of the environment variable that holds the API key, see `HTTPClient`; None sends none.
        timeout: How many seconds one try may take.
        retries: How often a failed request is tried again.
        backoff: Seconds before the first retry.
        concurrency: Maximum number of requests in flight.

    Raises:
        InputError: An option is invalid.
    """

    def __init__(
        self, url: str, api_key_env: str | None, timeout: float, retries: int, backoff: float, concurrency: int
    ) -> None:
        if "?" in url:
            raise InputError(f"{OPTIONS}.url must hold no '?', but is {url!r}; give the server's address alone")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._options: tuple[Any, ...] = (api_key_env, timeout, retries, backoff, concurrency, _MAX_BYTES)
        self._endpoint("")

    def look(self, path: str, read: Callable[[Any], T], check: Check, *, patient: bool = False) -> T:
        """Get a path, and return the answer as `read` parses it.

        Args:
            path: The path.
            read: Parses the answer.
            check: See `HTTPClient.post`.
            patient: Whether to try as often as a request for a completion, while a server is started anew.

        Raises:
            InputError: The request failed, or `read` refused the answer.
        """
        key, timeout, retries, *others = self._options
        options = (key, min(timeout, _LONGEST_LOOK), retries if patient else min(retries, _MOST_LOOKS), *others)
        with _naming_the_rollout():
            return _Endpoint(self.url + path, *options).get(read, check)

    def post(self, path: str, payloads: Sequence[Any], read: Callable[[Any], T], check: Check) -> list[T]:
        """Post to a path; see `HTTPClient.post`."""
        with _naming_the_rollout():
            return self._endpoint(path).post(payloads, read, check)

    def answers(self) -> bool:
        """Tell whether the server answers now; tries once, with a short timeout."""
        key, timeout, _, *others = self._options
        try:
            _Endpoint(self.url + "/version", key, min(timeout, _SHORT_LOOK), 0, *others).get(_ignore, lambda: None)
        except InputError:
            return False
        return True

    def tell(self, path: str, payload: Any) -> None:
        """Post a request whose outcome does not matter: once, with a short timeout, and ignoring errors."""
        key, timeout, _, *others = self._options
        with suppress(InputError):
            _Endpoint(self.url + path, key, min(timeout, _FAREWELL), 0, *others).post([payload], _ignore, lambda: None)

    def _endpoint(self, path: str) -> "_Endpoint":
        with _naming_the_rollout():
            return _Endpoint(self.url + path, *self._options)


class _Endpoint(HTTPClient):
    """Sends requests to one URL, whose answers need not be JSON."""

    def _result(self, reply: Response, read: Callable[[Any], T]) -> T:
        """Parse an answer; vLLM confirms the loading of an adapter with a sentence in place of JSON."""
        if 200 <= reply.status < 300 and reply.body.startswith(b"Success"):
            return read(reply.body.decode(errors="replace"))
        return super()._result(reply, read)


def _ignore(_: Any) -> None:
    """Read nothing of an answer."""


@contextmanager
def _naming_the_rollout() -> Iterator[None]:
    """Rewrite the client's error messages, which name options of the reward, to name those of the rollout."""
    try:
        yield
    except RequestError as error:
        raise RequestError(_renamed(error), error.status) from None
    except InputError as error:
        raise InputError(_renamed(error)) from None


def _renamed(error: InputError) -> str:
    return str(error).replace("model.reward.init_args", OPTIONS).replace("options of the reward", "server's log")
