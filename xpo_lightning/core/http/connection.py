"""Sends one HTTP request at a time: without redirects, with a size limit, and so that another thread can cut it off."""

import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase

_CHUNK = 65536
_SHOWN = 300  # characters of a body that a message shows
# Without compression, so that the limit on bytes read also limits memory.
_HEADERS = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}


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
        body: The body as received; it may hold the key.
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
    """A connection to a server, for one request at a time; another thread may cut it.

    Proxies and certificates come from the environment, as the requests library reads it. Redirects are not followed and
    `.netrc` is not read: the key goes to the one URL only, and nothing else goes into the `Authorization` header.

    Args:
        key: The API key; None sends none.
    """

    def __init__(self, key: str | None) -> None:
        self._key = key
        self._adapter = _Adapter()
        self._session = _Session()
        self._session.auth = _Bearer(key)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, self._adapter)

    def ask(self, url: str, body: bytes | None, timeout: float, max_bytes: int) -> Response:
        """Send a request and read its answer.

        Args:
            url: The URL.
            body: JSON to post; None sends a GET request.
            timeout: How many seconds the server may be silent. A server that keeps on sending may take longer; the
                caller must then cut the connection.
            max_bytes: Largest answer, in bytes.

        Returns:
            The answer, whatever its status. If the status is an error, only the beginning of the body is read.

        Raises:
            TryError: The answer is incomplete, missing or too large.
        """
        try:
            with self._session.request(
                "GET" if body is None else "POST",
                url,
                data=body,
                headers=_HEADERS,
                timeout=timeout,
                stream=True,
                allow_redirects=False,
            ) as response:
                well = 200 <= response.status_code < 300
                limit = max_bytes if well else _CHUNK
                read = bytearray()
                for chunk in response.iter_content(_CHUNK):
                    read += chunk
                    if len(read) > limit:
                        break
        except requests.Timeout:
            raise timeout_error(timeout) from None
        except Exception as error:  # some errors of urllib3 and the standard library come through
            raise TryError(
                f"could not be reached, or broke off ({self._shown(_cause(error))})",
                "check that the server runs, and that the URL is right",
            ) from None
        if well and len(read) > max_bytes:
            advice = "check the URL, or raise model.reward.init_args.max_bytes"
            raise TryError(f"answered more than {max_bytes} bytes", advice, again=False)
        location, retry_after = (response.headers.get(name, "") for name in ("Location", "Retry-After"))
        excerpt = self._shown(read.decode(errors="replace"))
        return Response(
            response.status_code, bytes(read), excerpt, self._shown(location.partition("?")[0]), retry_after
        )

    def cut(self) -> None:
        """Cut off a request that is under way in another thread; it fails there."""
        self._adapter.cut()

    def close(self) -> None:
        """Close the connection; no request may be under way."""
        self._session.close()

    def _shown(self, text: str) -> str:
        """Format a text for a message: short, on one line, and without the key in any form that a server may write."""
        if self._key is not None:
            quoted = json.dumps(self._key)[1:-1]
            forms = {self._key, quoted, quoted.replace("/", "\\/"), quote(self._key, safe="")}
            for form in sorted(forms, key=len, reverse=True):
                text = text.replace(form, "[key]")
        text = " ".join(text.split())
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def timeout_error(timeout: float) -> TryError:
    """Return the error for a request that was not answered in time."""
    return TryError(
        f"has not answered in full after {timeout:g} seconds",
        "raise model.reward.init_args.timeout, or lower model.reward.init_args.concurrency if the server is busy",
    )


class _Bearer(AuthBase):
    """Sends the key as a bearer token; without a key, only keeps the session from reading one from `.netrc`."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return no target: requests would read a redirect's body, however large, even without following it."""


class _Adapter(HTTPAdapter):
    """Keeps the socket of its one connection; where a response holds it depends on the server."""

    def __init__(self) -> None:
        super().__init__(pool_connections=1, pool_maxsize=1)
        self._socket: Any = None
        self._is_cut = False

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        """Return the connection pool, changed so that each new connection records its socket here."""
        pool = super().get_connection_with_tls_context(*args, **options)
        if "ConnectionCls" not in vars(pool):
            vars(pool)["ConnectionCls"] = lambda *a, kind=pool.ConnectionCls, **k: self._watched(kind(*a, **k))
        return pool

    def cut(self) -> None:
        """Shut the socket down, so that a blocked read ends."""
        self._is_cut = True
        if self._socket is not None:
            with suppress(OSError, TypeError):  # closed already; or, behind a TLS proxy, no socket
                # Bypass a TLS socket's own method, which is not safe to call from a second thread.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _watched(self, connection: Any) -> Any:
        connect = connection.connect

        def connect_and_tell() -> None:
            connect()
            self._socket = connection.sock
            if self._is_cut:  # while it was connecting
                self.cut()

        connection.connect = connect_and_tell
        return connection


def _cause(error: BaseException) -> str:
    """Describe the innermost error; those around it repeat the URL and add little."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}"
