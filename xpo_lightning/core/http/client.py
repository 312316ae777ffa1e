"""JSON over HTTP: sends many requests to one URL, which may be slow, busy or broken, and never hangs."""

import json
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.batch import RequestBatch, RequestError, RetryPolicy
from xpo_lightning.core.http.connection import Response, TryError

__all__ = ["HTTPClient", "RequestError", "UnusableError", "checked_url"]

T = TypeVar("T")
_OPTIONS = "model.reward.init_args"
_MAX_TIMEOUT = 86400.0  # seconds


class UnusableError(TryError):
    """A response body that does not hold what was asked for; another try may succeed.

    Args:
        why: What is wrong with the body, to follow "a body that".
    """

    def __init__(self, why: str) -> None:
        super().__init__(f"answered with a body that {why}", "check the URL, and look at the server's log")
        self.why = why


class HTTPClient:
    """Sends POST or GET requests to one URL and reads JSON answers.

    A request is tried again if it could not connect, was cut off, took too long, or was answered with status 408, 429
    or 5xx, or with an unusable body. It waits `backoff` seconds before the second try and twice as long before each
    later one, up to 30 seconds; if the server's `Retry-After` is longer, it waits for that, up to 60 seconds.

    Each call of `post` or `get` reads the key from the environment. No attribute, message or copy of the client holds
    it.

    Args:
        url: The URL, http or https. It is shown in messages, so it must hold no secret.
        api_key_env: Name of the environment variable that holds the API key.
        timeout: How many seconds one try may take, from connecting to the last byte of the answer.
        retries: How often a request is tried again.
        backoff: Seconds before the second try.
        concurrency: Most requests under way at once.
        max_bytes: Largest answer, in bytes.
        options: Key of the config that these options are under, for messages.
        url_key: Key of the config that the URL is under; None is `url` among the options.
        loads: Parses the body of an answer; raises `ValueError` if it is not JSON.

    Raises:
        InputError: An option has an invalid value.
    """

    def __init__(
        self,
        url: str,
        api_key_env: str | None,
        timeout: float,
        retries: int,
        backoff: float,
        concurrency: int,
        max_bytes: int,
        options: str = _OPTIONS,
        url_key: str | None = None,
        loads: Callable[[bytes], Any] = json.loads,
    ) -> None:
        if api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", api_key_env):
            # The message does not show the value: it may be the key itself.
            raise InputError(
                f"{options}.api_key_env must be the name of an environment variable, in capitals, such as "
                f"OPENAI_API_KEY; the key itself belongs into that variable"
            )
        if not 0 < timeout <= _MAX_TIMEOUT:
            raise InputError(
                f"{options}.timeout must be above 0 and at most {_MAX_TIMEOUT:g} seconds, but is {timeout}"
            )
        if not 0 <= backoff <= _MAX_TIMEOUT:
            raise InputError(
                f"{options}.backoff must be at least 0 and at most {_MAX_TIMEOUT:g} seconds, but is {backoff}"
            )
        for name, number, least in (
            ("retries", retries, 0),
            ("concurrency", concurrency, 1),
            ("max_bytes", max_bytes, 1),
        ):
            check_range(f"{options}.{name}", number, least=least)
        url_key = url_key or f"{options}.url"
        checked_url(url, options, url_key)
        self.terms = RetryPolicy(url, timeout, retries, backoff, concurrency, max_bytes, options, url_key)
        self.api_key_env, self._loads = api_key_env, loads

    def load(self) -> None:
        """Check that the environment holds the key, if one is needed.

        Raises:
            InputError: The environment variable is not set, or its value cannot be a key.
        """
        self._key()

    def post(self, payloads: Sequence[Any], read: Callable[[Any], T], check: Callable[[], None]) -> list[T]:
        """Post payloads and read the answers.

        Args:
            payloads: N values that JSON can hold, one per request.
            read: Turns an answer's JSON into a result; raises `UnusableError` if the JSON is not what was asked for.
                Called in the thread that sends, in the order in which answers come.
            check: Called about once a second while waiting; may raise an error to end the wait.

        Returns:
            The results, in the order of the payloads. Length N.

        Raises:
            RequestError: A request failed for good. The message has the URL, what happened last and how often it was
                tried, and not the key.
        """
        bodies = [json.dumps(payload, allow_nan=False).encode() for payload in payloads]
        return RequestBatch(self.terms, self._key(), lambda reply: self._result(reply, read)).run(bodies, check)

    def get(self, read: Callable[[Any], T], check: Callable[[], None]) -> T:
        """Send one GET request and read the answer; arguments and retries are those of `post`."""
        return RequestBatch(self.terms, self._key(), lambda reply: self._result(reply, read)).run([None], check)[0]

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "")
        where = f"{self.terms.options}.api_key_env: the environment variable {self.api_key_env}"
        if not key:
            raise InputError(f"{where} is not set; set it to the API key for {self.terms.url}")
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise InputError(
                f"{where} holds a blank, a line break or another character that a key cannot have; set it to the API "
                f"key alone"
            )
        return key

    def _result(self, reply: Response, read: Callable[[Any], T]) -> T:
        if not 200 <= reply.status < 300:
            raise self._refusal(reply)
        if len(reply.body) > self.terms.max_bytes:
            advice = f"check the URL, or raise {self.terms.options}.max_bytes"
            raise TryError(f"answered more than {self.terms.max_bytes} bytes", advice, again=False)
        try:
            value = self._loads(reply.body)
        except (ValueError, RecursionError):
            raise UnusableError(f"is not JSON ({reply.excerpt!r})") from None
        try:
            return read(value)
        except UnusableError as failure:
            raise UnusableError(f"{failure.why} ({reply.excerpt!r})") from None

    def _refusal(self, reply: Response) -> TryError:
        status, options = reply.status, self.terms.options
        busy = status in (408, 429)
        what = f"answered {status}" + (f" ({reply.excerpt!r})" if reply.excerpt else "")
        if 300 <= status < 400:
            what = f"answered {status}, a redirect to {reply.location!r}, and redirects are not followed"
            advice = f"set {self.terms.url_key} to where the service really is"
        elif status in (401, 403):
            advice = self._advice_on_key()
        elif status == 404:
            advice = "check the URL, and the name of the model if there is one"
        elif busy:
            advice = f"lower {options}.concurrency, or raise {options}.retries"
        else:
            advice = "look at the server's log" if status >= 500 else f"check the options of {options}"
        return TryError(what, advice, busy or status >= 500, _seconds(reply.retry_after), status)

    def _advice_on_key(self) -> str:
        if self.api_key_env is None:
            return (
                f"set {self.terms.options}.api_key_env to the name of the environment variable that holds the API key"
            )
        return f"check the API key in the environment variable {self.api_key_env}"


def checked_url(url: str, options: str = _OPTIONS, url_key: str | None = None) -> str:
    """Check a URL and return it.

    Args:
        url: The URL.
        options: Key of the config that its options are under.
        url_key: Its own key; None is `url` among the options.

    Raises:
        InputError: It is not one of http or https, or holds a user name, a fragment or blanks.
    """
    where = url_key or f"{options}.url"
    authority = re.split(r"[/?#]", url.partition("://")[2] or url, maxsplit=1)[0]
    if "@" in authority:  # not shown: it may hold a password
        raise InputError(f"{where} must not hold a user name or a password; set {options}.api_key_env instead")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{where} must start with http:// or https://, but is {url!r}")
    if "#" in url or not url.isprintable() or " " in url:
        raise InputError(f"{where} must not hold a '#', a blank or a line break, but is {url!r}")
    try:
        host = httpx2.URL(url).host
        if not re.fullmatch(r"[\w.-]+|.*:.*", host) or urlsplit(url).port == 0:
            raise ValueError("no host or port")
        host.encode("idna")
    except (ValueError, httpx2.InvalidURL) as error:
        raise InputError(f"{where} must be a URL such as http://localhost:8000/v1, but is {url!r} ({error})") from None
    return url


def _seconds(retry_after: str) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date; 0 if it holds neither."""
    try:
        if retry_after.isdigit():
            return float(retry_after)
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return 0.0
