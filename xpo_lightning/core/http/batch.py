"""Many HTTP requests, some at once and some again, while one thread waits and looks up now and then."""

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
_LONGEST_WAIT = 1.0  # seconds between two looks at whether the run is to stop
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
    """How requests are made; see `HTTPClient`."""

    url: str
    timeout: float
    retries: int
    backoff: float
    concurrency: int
    max_bytes: int


@dataclass(eq=False)
class _Try:
    """A request on its way.

    Attributes:
        row: Which of the requests it is.
        number: Which of its tries, from 1.
        deadline: When it is given up.
        outcome: What came of it, once something has.
    """

    row: int
    number: int
    line: Connection
    deadline: float
    outcome: Response | TryError | None = None


class RequestBatch(Generic[T]):
    """Requests that are sent together.

    Each try runs in a daemon thread of its own, which nobody waits for: one that hangs is cut off at its deadline, and
    could not keep the process alive either. Connections are kept between the tries of a batch, not longer: they are
    never found closed by the server during the step in between, and never shared with a forked process.

    Args:
        terms: How they are made.
        key: The API key.
        bodies: N bodies, JSON; None for a request that has none.
        accept: Turns an answer into a result; raises `TryError` where it is of no use.
        check: Called at least about once a second; may raise, to wait no longer.
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
        self._waiting = [(0.0, row, 1) for row in range(len(bodies))]  # a heap: when, which request, which try
        self._under_way: set[_Try] = set()
        self._idle: list[Connection] = []
        self._ended: SimpleQueue[_Try] = SimpleQueue()

    def run(self) -> list[T]:
        """Send all requests.

        Returns:
            The results in the order of the bodies. Length N.

        Raises:
            RequestError: One of them failed for good; the others are broken off.
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
        """Send what is due, as far as the limit on concurrency allows."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now and len(self._under_way) < self._terms.concurrency:
            _, row, number = heapq.heappop(self._waiting)
            line = self._idle.pop() if self._idle else Connection(self._key)
            one = _Try(row, number, line, now + self._terms.timeout)
            self._under_way.add(one)
            threading.Thread(target=self._send, args=(one,), name="reward request", daemon=True).start()

    def _send(self, one: _Try) -> None:
        """Make one try, in its thread."""
        try:
            one.outcome = one.line.ask(
                self._terms.url, self._bodies[one.row], self._terms.timeout, self._terms.max_bytes
            )
        except TryError as failure:
            one.outcome = failure
        self._ended.put(one)

    def _next(self) -> list[_Try]:
        """Wait until a try has ended or is late, or another one is due; return those that have ended or are late."""
        moments = [one.deadline for one in self._under_way]
        if self._waiting and len(self._under_way) < self._terms.concurrency:
            moments.append(self._waiting[0][0])
        try:
            one = self._ended.get(timeout=min(max(min(moments) - time.monotonic(), 0.0), _LONGEST_WAIT))
            return [one] if one in self._under_way else []  # not one that was given up
        except Empty:
            return [one for one in self._under_way if one.deadline <= time.monotonic()]

    def _settle(self, one: _Try) -> None:
        """Keep the result of a try, or have another one made.

        Raises:
            RequestError: There is no result, and there are no more tries.
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
        # Raised out here, with nothing behind it: what is behind the failure has the key in its attributes.
        if not failure.again or one.number > self._terms.retries:
            raise self._error(failure, one.number)
        backoff = min(self._terms.backoff * 2 ** min(one.number - 1, 30), _LONGEST_BACKOFF)
        wait = max(backoff, min(failure.wait, _LONGEST_RETRY_AFTER))
        heapq.heappush(self._waiting, (time.monotonic() + wait, one.row, one.number + 1))

    def _error(self, failure: TryError, tries: int) -> RequestError:
        often = "once" if tries == 1 else f"{tries} times"
        message = f"model.reward.init_args.url: {self._terms.url} {failure.what}, tried {often}; {failure.advice}"
        return RequestError(message, failure.status)
