"""Sends many HTTP requests concurrently, with retries, while the calling thread waits and checks for a stop."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.connection import THREAD, Connection, Response, TryError
from xpo_lightning.core.timed_call import CallThread

T = TypeVar("T")
_LONGEST_BACKOFF = 30.0  # seconds
_LONGEST_RETRY_AFTER = 60.0  # seconds


class RequestError(InputError):
    """A request that failed for good.

    Attributes:
        status: Status of the last answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class RetryPolicy:
    """Where and how to send requests; the fields are options of `HTTPClient`."""

    url: str
    timeout: float
    retries: int
    backoff: float
    concurrency: int
    max_bytes: int
    options: str
    url_key: str


class RequestBatch(Generic[T]):
    """Requests that are sent together.

    They run on an event loop in a daemon thread, which is never joined: so a request that hangs cannot keep the process
    alive. Connections are reused within a batch, but not longer: so the server cannot have closed them during the step
    in between, and no forked process shares them.

    Args:
        terms: Where and how to send the requests.
        key: The API key.
        accept: Turns an answer into a result, in the thread of the batch; raises `TryError` if the answer is unusable.
    """

    def __init__(self, terms: RetryPolicy, key: str | None, accept: Callable[[Response], T]) -> None:
        self._terms, self._accept = terms, accept
        self._connection, self._slots = Connection(terms.url, key), asyncio.Semaphore(terms.concurrency)

    def run(self, bodies: Sequence[bytes | None], check: Callable[[], None]) -> list[T]:
        """Send all requests.

        Args:
            bodies: N bodies, JSON; None for a request without a body.
            check: Called at least about once a second; may raise an error to end the wait.

        Returns:
            The results in the order of the bodies. Length N.

        Raises:
            RequestError: One of them failed for good; the others are cut off.
        """
        check()
        loop = asyncio.new_event_loop()
        loop.set_default_executor(_Lookups())
        task = loop.create_task(self._send_all(bodies))
        try:
            call = CallThread(THREAD).run(partial(_finish, loop, task), None, check)
        except BaseException:
            with suppress(RuntimeError):  # The loop has just been closed.
                loop.call_soon_threadsafe(task.cancel)
            raise
        if call.error is not None:
            raise call.error
        results: list[T] = call.value
        return results

    async def _send_all(self, bodies: Sequence[bytes | None]) -> list[T]:
        tasks = [asyncio.create_task(self._send(body)) for body in bodies]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._connection.close()

    async def _send(self, body: bytes | None) -> T:
        """Send one request until it has a result.

        Raises:
            RequestError: There is no result, and no further try is allowed.
        """
        number = 0
        while True:
            number += 1
            await self._slots.acquire()
            try:
                result = self._accept(await self._try(body))
                self._slots.release()
                return result
            except TryError as error:
                failure = error
            # Raised outside the handler, without a context: the errors behind the failure hold the key in attributes.
            # The slot stays taken, so that no further request starts.
            if not failure.again or number > self._terms.retries:
                raise self._error(failure, number)
            self._slots.release()
            backoff = min(self._terms.backoff * 2 ** min(number - 1, 30), _LONGEST_BACKOFF)
            await asyncio.sleep(max(backoff, min(failure.wait, _LONGEST_RETRY_AFTER)))

    async def _try(self, body: bytes | None) -> Response:
        terms = self._terms
        try:
            async with asyncio.timeout(terms.timeout):
                return await self._connection.ask(body, terms.max_bytes)
        except TimeoutError:
            raise TryError(
                f"has not answered in full after {terms.timeout:g} seconds",
                f"raise {terms.options}.timeout, or lower {terms.options}.concurrency if the server is busy",
            ) from None

    def _error(self, failure: TryError, tries: int) -> RequestError:
        often = "once" if tries == 1 else f"{tries} times"
        message = f"{self._terms.url_key}: {self._terms.url} {failure.what}, tried {often}; {failure.advice}"
        return RequestError(message, failure.status)


class _Lookups(ThreadPoolExecutor):
    """Looks up each host in a daemon thread; asyncio's own threads would keep the process alive if one hung."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a function in a new thread."""
        future: Future[Any] = Future()
        threading.Thread(target=_resolve, args=(future, partial(fn, *args, **kwargs)), name=THREAD, daemon=True).start()
        return future


def _resolve(future: Future[Any], look_up: Callable[[], Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(look_up())
        except Exception as error:
            future.set_exception(error)


def _finish(loop: asyncio.AbstractEventLoop, task: asyncio.Task[T]) -> T:
    try:
        return loop.run_until_complete(task)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
