"""Sends requests to the endpoints of a vLLM server."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import HTTPClient
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
        key: Key of the config that the URL is under, for messages.

    Raises:
        InputError: An option is invalid.
    """

    def __init__(
        self,
        url: str,
        api_key_env: str | None,
        timeout: float,
        retries: int,
        backoff: float,
        concurrency: int,
        key: str = f"{OPTIONS}.url",
    ) -> None:
        if "?" in url:
            raise InputError(f"{key} must hold no '?', but is {url!r}; give the server's address alone")
        self.url, self.key = url.rstrip("/").removesuffix("/v1"), key
        self._timeout, self._retries, self._others = timeout, retries, (api_key_env, backoff, concurrency)
        self._endpoint("", timeout, retries)

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
        retries = self._retries if patient else min(self._retries, _MOST_LOOKS)
        return self._endpoint(path, min(self._timeout, _LONGEST_LOOK), retries).get(read, check)

    def post(self, path: str, payloads: Sequence[Any], read: Callable[[Any], T], check: Check) -> list[T]:
        """Post to a path; see `HTTPClient.post`."""
        return self._endpoint(path, self._timeout, self._retries).post(payloads, read, check)

    def answers(self) -> bool:
        """Tell whether the server answers now; tries once, with a short timeout."""
        try:
            self._endpoint("/version", min(self._timeout, _SHORT_LOOK), 0).get(_ignore, lambda: None)
        except InputError:
            return False
        return True

    def tell(self, path: str, payload: Any) -> None:
        """Post a request whose outcome does not matter: once, with a short timeout, and ignoring errors."""
        with suppress(InputError):
            self._endpoint(path, min(self._timeout, _FAREWELL), 0).post([payload], _ignore, lambda: None)

    def _endpoint(self, path: str, timeout: float, retries: int) -> HTTPClient:
        api_key_env, backoff, concurrency = self._others
        limits = (timeout, retries, backoff, concurrency, _MAX_BYTES)
        return HTTPClient(self.url + path, api_key_env, *limits, options=OPTIONS, url_key=self.key, loads=_loads)


def _ignore(_: Any) -> None:
    """Read nothing of an answer."""


def _loads(body: bytes) -> Any:
    """Parse an answer; vLLM confirms the loading of an adapter with a sentence in place of JSON."""
    return body.decode(errors="replace") if body.startswith(b"Success") else json.loads(body)
