"""The addresses of a vLLM server, and how they are asked."""

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
_FAREWELL = 10.0  # seconds for what nothing depends on
_LONGEST_LOOK = 30.0  # seconds for the version and the models, which a server has at hand
_MOST_LOOKS = 3  # An address that is wrong is to be told soon.


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
        key, timeout, retries, *others = self._options
        options = (key, min(timeout, _LONGEST_LOOK), min(retries, _MOST_LOOKS), *others)
        with _naming_the_rollout():
            return _Endpoint(self.url + path, *options).get(read, check)

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
    """One address. What it answers need not be JSON."""

    def _result(self, reply: Response, read: Callable[[Any], T]) -> T:
        """Read an answer; where adapters are loaded a sentence is one."""
        if 200 <= reply.status < 300 and reply.body.startswith(b"Success"):
            return read(reply.body.decode(errors="replace"))
        return super()._result(reply, read)


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
