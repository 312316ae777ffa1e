"""Sends many HTTP requests concurrently, with retries, while the calling thread waits and checks for a stop."""

import heapq
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.connection import Connection, Response, TryError, timeout_error

T = TypeVar("T")
_LONGEST_WAIT = 1.0  # seconds between two checks whether the run is to stop
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


@dataclass(eq=False)
class _Try:
    """One try of a request.

    Attributes:
        row: Index of the request.
        number: Number of the try, from 1.
        deadline: When the try is given up.
        outcome: The response or failure, once there is one.
    """

    row: int
    number: int
    line: Connection
    deadline: float
    outcome: Response | TryError | None = None


class RequestBatch(Generic[T]):
    """Requests that are sent together.

    Each try runs in its own daemon thread, which is never joined: a try that hangs is cut off at its deadline, and
    cannot keep the process alive. Connections are reused between the tries of a batch, but not longer: so the server
    cannot have closed them during the step in between, and no forked process shares them.

    Args:
        terms: Where and how to send the requests.
        key: The API key.
        bodies: N bodies, JSON; None for a request without a body.
        accept: Turns an answer into a result; raises `TryError` if the answer is unusable.
        check: Called at least about once a second; may raise an error to end the wait.
    """

    def __init__(
        self,
        terms: RetryPolicy,
        key: str | None,
        bodies: Sequence[bytes | None],
        accept: Callable[[Response], T],
        check: Callable[[], None],
    ) -> None:
        self._terms, self._key, self._bodies, self._accept, self._check = terms, key, bodies, accept, check
        self._results: dict[int, T] = {}
        self._waiting = [(0.0, row, 1) for row in range(len(bodies))]  # a heap: time, request, try
        self._under_way: set[_Try] = set()
        self._idle: list[Connection] = []
        self._ended: SimpleQueue[_Try] = SimpleQueue()

    def run(self) -> list[T]:
        """Send all requests.

        Returns:
            The results in the order of the bodies. Length N.

        Raises:
            RequestError: One of them failed for good; the others are cut off.
        """
        try:
            while len(self._results) < len(self._bodies):
                self._check()
                self._start()
                for one in self._next():
                    self._under_way.remove(one)
                    self._settle(one)
            return [self._results[row] for row in range(len(self._bodies))]
        finally:
            for one in self._under_way:
                one.line.cut()
            for line in self._idle:
                line.close()

    def _start(self) -> None:
        """Start the tries that are due, as far as the limit on concurrency allows."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now and len(self._under_way) < self._terms.concurrency:
            _, row, number = heapq.heappop(self._waiting)
            line = self._idle.pop() if self._idle else Connection(self._key)
            one = _Try(row, number, line, now + self._terms.timeout)
            self._under_way.add(one)
            threading.Thread(target=self._send, args=(one,), name="reward request", daemon=True).start()

    def _send(self, one: _Try) -> None:
        """Run one try, in its thread."""
        try:
            one.outcome = one.line.ask(
                self._terms.url, self._bodies[one.row], self._terms.timeout, self._terms.max_bytes
            )
        except TryError as failure:
            one.outcome = failure
        self._ended.put(one)

    def _next(self) -> list[_Try]:
        """Wait until a try ends or is late, or another is due; return the tries that have ended or are late."""
        moments = [one.deadline for one in self._under_way]
        if self._waiting and len(self._under_way) < self._terms.concurrency:
            moments.append(self._waiting[0][0])
        try:
            one = self._ended.get(timeout=min(max(min(moments) - time.monotonic(), 0.0), _LONGEST_WAIT))
            return [one] if one in self._under_way else []  # not one that was given up
        except Empty:
            return [one for one in self._under_way if one.deadline <= time.monotonic()]

    def _settle(self, one: _Try) -> None:
        """Keep the result of a try, or schedule the next one.

        Raises:
            RequestError: There is no result, and no further try is allowed.
        """
        outcome = one.outcome
        if outcome is None:
            one.line.cut()
            outcome = timeout_error(self._terms.timeout)
        try:
            if isinstance(outcome, TryError):
                raise outcome
            self._idle.append(one.line)
            self._results[one.row] = self._accept(outcome)
            return
        except TryError as error:
            failure = error
        # Raised outside the handler, without a context: the errors behind the failure hold the key in attributes.
        if not failure.again or one.number > self._terms.retries:
            raise self._error(failure, one.number)
        backoff = min(self._terms.backoff * 2 ** min(one.number - 1, 30), _LONGEST_BACKOFF)
        wait = max(backoff, min(failure.wait, _LONGEST_RETRY_AFTER))
        heapq.heappush(self._waiting, (time.monotonic() + wait, one.row, one.number + 1))

    def _error(self, failure: TryError, tries: int) -> RequestError:
        often = "once" if tries == 1 else f"{tries} times"
        message = f"model.reward.init_args.url: {self._terms.url} {failure.what}, tried {often}; {failure.advice}"
        return RequestError(message, failure.status)
