"""Sends one HTTP request with httpx2: without redirects, with a size limit, and without the key in any message."""

import json
import logging
from dataclasses import dataclass
from urllib.parse import quote

import httpx2

from xpo_lightning.core.http.environment import proxy_of, tls_context

THREAD = "reward request"
"""Name of the threads that send requests."""
_CHUNK = 65536
_SHOWN = 300  # characters of a body that a message shows
# Without compression, so that the limit on bytes read also limits memory.
_HEADERS = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}

for _name in ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "proxy", "socks"))):
    # They log the headers and the status line of an answer, in which a server may repeat the key.
    logging.getLogger(_name).addFilter(lambda record: record.threadName != THREAD)


class TryError(Exception):
    """A try of a request without a usable answer.

    Args:
        what: What happened, to follow the URL in a sentence.
        advice: What the user can do.
        again: Whether another try may succeed.
        wait: Seconds that the server asks to wait before the next try.
        status: Status of the answer, if there was one.
    """

    def __init__(
        self, what: str, advice: str, again: bool = True, wait: float = 0.0, status: int | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.advice, self.again, self.wait, self.status = what, advice, again, wait, status


@dataclass(frozen=True)
class Response:
    """A server's answer.

    Attributes:
        status: The HTTP status.
        body: The body as received, or the beginning of one that is too large; it may hold the key.
        excerpt: The beginning of the body for messages, without the key; empty if there is no body.
        location: The target of a redirect, without the key.
        retry_after: The `Retry-After` header.
    """

    status: int
    body: bytes
    excerpt: str
    location: str
    retry_after: str


class Connection:
    """Connections to the server of one URL, which requests share.

    Redirects are not followed and `.netrc` is not read: the key goes to the one URL only, and nothing else goes into
    the `Authorization` header.

    Args:
        url: The URL.
        key: The API key; None sends none.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._url, self._key = url, key
        self._client: httpx2.AsyncClient | None = None

    async def close(self) -> None:
        """Close the connections; no request may be under way."""
        if self._client is not None:
            await self._client.aclose()

    async def ask(self, body: bytes | None, max_bytes: int) -> Response:
        """Send a request and read its answer.

        Args:
            body: JSON to post; None sends a GET request.
            max_bytes: Bytes after which to stop reading.

        Returns:
            The answer, whatever its status. If the status is an error, only the beginning of the body is read.

        Raises:
            TryError: The answer is incomplete or missing.
        """
        read = bytearray()
        try:
            self._client = client = self._client or self._connect()
            async with client.stream("GET" if body is None else "POST", self._url, content=body) as response:
                limit = max_bytes if response.is_success else _CHUNK
                async for chunk in response.aiter_bytes():
                    read += chunk
                    if len(read) > limit:
                        break
        except Exception as error:
            raise TryError(
                f"could not be reached, or broke off ({self._shown(_cause(error))})",
                "check that the server runs, and that the URL is right",
            ) from None
        location, retry_after = (response.headers.get(name, "") for name in ("Location", "Retry-After"))
        excerpt = self._shown(read.decode(errors="replace"))
        return Response(
            response.status_code, bytes(read), excerpt, self._shown(location.partition("?")[0]), retry_after
        )

    def _connect(self) -> httpx2.AsyncClient:
        proxy = proxy_of(self._url)
        proxy_tls = tls_context(proxy) if proxy and proxy.startswith("https://") else None
        return httpx2.AsyncClient(
            headers=_HEADERS if self._key is None else {**_HEADERS, "Authorization": f"Bearer {self._key}"},
            verify=tls_context(self._url),
            proxy=httpx2.Proxy(proxy, ssl_context=proxy_tls) if proxy else None,
            limits=httpx2.Limits(),
            timeout=None,
            trust_env=False,
        )

    def _shown(self, text: str) -> str:
        """Format a text for a message: short, on one line, and without the key in any form that a server may write."""
        if self._key is not None:
            quoted = json.dumps(self._key)[1:-1]
            forms = {self._key, quoted, quoted.replace("/", "\\/"), quote(self._key, safe="")}
            for form in sorted(forms, key=len, reverse=True):
                text = text.replace(form, "[key]")
        text = " ".join(text.split())
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _cause(error: BaseException) -> str:
    """Describe the innermost error; those around it add little."""
    while True:
        inner = error.exceptions[-1] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__
        if inner is None:
            return f"{type(error).__name__}: {error}"
        error = inner
