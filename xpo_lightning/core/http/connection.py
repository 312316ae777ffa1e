"""One HTTP request: where it may go, how much may come back, and how another thread breaks it off."""

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
# Without compression, so that the limit on what is read is one on what is held.
_HEADERS = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}


class TryError(Exception):
    """A try of a request that brought nothing of use.

    Args:
        what: What happened, to follow the URL in a sentence.
        advice: What the user can do.
        again: Whether another try may do better.
        wait: Seconds that the server asks to wait for before it.
        status: Status of the answer, where there is one.
    """

    def __init__(
        self, what: str, advice: str, again: bool = True, wait: float = 0.0, status: int | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.advice, self.again, self.wait, self.status = what, advice, again, wait, status


@dataclass(frozen=True)
class Response:
    """What a server answered.

    Attributes:
        status: The status.
        body: The body as it came; it may hold the key.
        excerpt: The beginning of the body for a message, without the key; empty where there is no body.
        location: Where a redirect leads to, without the key.
        retry_after: The header of this name.
    """

    status: int
    body: bytes
    excerpt: str
    location: str
    retry_after: str


class Connection:
    """A connection to a server, for one request at a time; another thread may cut it.

    Proxies and certificates are those of the environment, as the requests library reads it. Redirects are not followed,
    and `.netrc` is not read: the key goes to the one URL, and nothing else goes into the `Authorization` header.

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
            url: Where to.
            body: JSON, which is posted; None gets what is there.
            timeout: How many seconds the server may be silent. One that keeps on sending takes longer: who waits for
                the answer cuts the line then.
            max_bytes: How large an answer may be.

        Returns:
            The answer, whatever its status. Of the body of an error only the beginning is read.

        Raises:
            TryError: There is no whole answer, or it is too large.
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
        except Exception as error:  # urllib3 and the standard library let some of their own through
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
        """Break off a request that is under way in another thread; it fails there."""
        self._adapter.cut()

    def close(self) -> None:
        """Close the connection; no request may be under way."""
        self._session.close()

    def _shown(self, text: str) -> str:
        """Make a text fit for a message: short, on one line, without the key, however a server may have written it."""
        if self._key is not None:
            quoted = json.dumps(self._key)[1:-1]
            forms = {self._key, quoted, quoted.replace("/", "\\/"), quote(self._key, safe="")}
            for form in sorted(forms, key=len, reverse=True):
                text = text.replace(form, "[key]")
        text = " ".join(text.split())
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def timeout_error(timeout: float) -> TryError:
    """Return the failure of a request that was not answered in time."""
    return TryError(
        f"has not answered in full after {timeout:g} seconds",
        "raise model.reward.init_args.timeout, or lower model.reward.init_args.concurrency if the server is busy",
    )


class _Bearer(AuthBase):
    """Sends the key. Without one it does nothing, but keeps the session from looking for one in `.netrc`."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """Know of no redirect; requests reads the body of one, however large, even if it is not to follow it."""


class _Adapter(HTTPAdapter):
    """Holds on to the socket of its one connection, because a response has it in a place that depends on the server."""

    def __init__(self) -> None:
        super().__init__(pool_connections=1, pool_maxsize=1)
        self._socket: Any = None
        self._is_cut = False

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        """Return the pool that connections come from; each one tells its socket."""
        pool = super().get_connection_with_tls_context(*args, **options)
        if "ConnectionCls" not in vars(pool):
            vars(pool)["ConnectionCls"] = lambda *a, kind=pool.ConnectionCls, **k: self._watched(kind(*a, **k))
        return pool

    def cut(self) -> None:
        """Shut the socket down, so that who reads from it reads no more."""
        self._is_cut = True
        if self._socket is not None:
            with suppress(OSError, TypeError):  # closed by now; or, behind a proxy of the TLS kind, no socket
                # Not the method of a TLS socket, which is not made for a second thread.
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
    """Name the innermost error: those around it repeat the URL and say little else."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}"
