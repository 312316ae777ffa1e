"""Spreads requests over servers that hold the same model; leaves out those that fail until they answer again."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from threading import Event
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import RequestError
from xpo_lightning.rollout.vllm.client import Check, VLLMServer
from xpo_lightning.rollout.vllm.protocol import OPTIONS

P = TypeVar("P")
T = TypeVar("T")
RETRIES_OF_SEVERAL = 2
"""How often a request is tried again on one of several servers, before the others have it."""
_BETWEEN_CHECKS = 0.5  # seconds
_LONGEST_BACKOFF = 30.0  # seconds


class ServerPool:
    """Servers that hold the same model, and so can each write any of its completions.

    Args:
        urls: The URL of each server, at least one.
        api_key_env: See `VLLMServer`; it and those below hold for each server.
        timeout: How many seconds one try may take.
        retries: How often a failed request is tried again; of several servers each is left out after a few tries, and
            with none left, this is how often the run waits for one of them.
        backoff: Seconds before the first retry.
        concurrency: Maximum number of requests in flight at each server.
        key: Key of the config that the URLs are under, for messages.

    Raises:
        InputError: An option is invalid.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key_env: str | None,
        timeout: float,
        retries: int,
        backoff: float,
        concurrency: int,
        key: str = f"{OPTIONS}.url",
    ) -> None:
        each = min(retries, RETRIES_OF_SEVERAL) if len(urls) > 1 else retries
        self.servers = [VLLMServer(url, api_key_env, timeout, each, backoff, concurrency, key) for url in urls]
        if len({server.url for server in self.servers}) != len(urls) or not urls:
            raise InputError(f"{key} must be one URL, or a list of different ones, but is {list(urls)!r:.200}")
        self.retries, self.backoff = retries, backoff
        self._left_out: list[VLLMServer] = []

    @property
    def living(self) -> list[VLLMServer]:
        """The servers that requests go to."""
        return [server for server in self.servers if server not in self._left_out]

    @property
    def urls(self) -> str:
        """The URLs of all servers, for messages."""
        return ", ".join(server.url for server in self.servers)

    def take_back(self) -> None:
        """Let requests go again to those of the servers left out that answer now."""
        for server in [server for server in self._left_out if server.answers()]:
            self._left_out.remove(server)
            rank_zero_warn(f"model.rollout: the server at {server.url} answers again, and has requests again")

    def on_each(self, task: Callable[[VLLMServer, Check], None], check: Check) -> None:
        """Run a task on each living server at the same time; a server on which it fails is left out.

        Args:
            task: What to do, with the server and the function to call while waiting.
            check: See `HTTPClient.post`.

        Raises:
            RequestError: A server refuses it, or none is left.
        """
        done: list[VLLMServer] = []
        while not done:
            servers = self.living
            outcomes = run_together([partial(task, server) for server in servers], check)
            for server, outcome in zip(servers, outcomes, strict=True):
                if isinstance(outcome, RequestError):
                    self._leave_out(server, outcome, check)
                else:
                    done.append(server)

    def spread(
        self, requests: Sequence[P], ask: Callable[[VLLMServer, list[P], Check], list[T]], check: Check
    ) -> list[T]:
        """Spread requests over the living servers; what a failing server had to answer goes to the others.

        Args:
            requests: N requests.
            ask: Asks one server for some of them.
            check: See `HTTPClient.post`.

        Returns:
            The answers, in the order of the requests. Length N.

        Raises:
            RequestError: A server refuses a request, or none is left.
        """
        answers: dict[int, T] = {}
        while len(answers) < len(requests):
            waiting = [row for row in range(len(requests)) if row not in answers]
            servers = self.living[: len(waiting)]
            shares = [waiting[place :: len(servers)] for place in range(len(servers))]
            tasks = [
                partial(ask, server, [requests[row] for row in rows])
                for server, rows in zip(servers, shares, strict=True)
            ]
            for server, rows, outcome in zip(servers, shares, run_together(tasks, check), strict=True):
                if isinstance(outcome, RequestError):
                    self._leave_out(server, outcome, check)
                else:
                    answers.update(zip(rows, outcome, strict=True))
        return [answers[row] for row in range(len(requests))]

    def _leave_out(self, server: VLLMServer, error: RequestError, check: Check) -> None:
        """Leave a server out that has failed, and wait for one to answer if none is left.

        Raises:
            RequestError: The server has refused the request, is the only one, or none of them answers.
        """
        has_failed = error.status is None or error.status >= 500
        if not has_failed or len(self.servers) == 1:
            raise error
        self._left_out.append(server)
        rank_zero_warn(f"{error}; the other servers have its requests until it answers again")
        for number in range(self.retries):
            if self.living:
                return
            end = time.monotonic() + min(self.backoff * 2 ** min(number, 30), _LONGEST_BACKOFF)
            while time.monotonic() < end:
                check()
                time.sleep(min(_BETWEEN_CHECKS, max(0.0, end - time.monotonic())))
            self.take_back()
        if not self.living:
            raise error


class _EndedError(Exception):
    """Another task has failed, or the run is to stop."""


def run_together(tasks: Sequence[Callable[[Check], T]], check: Check) -> list[T | RequestError]:
    """Run tasks at the same time; a request that fails for good is an outcome, any other error ends all of them.

    Args:
        tasks: What to do, each with the function to call while waiting.
        check: Called about twice a second; may raise an error to end all tasks.

    Returns:
        The result of each task, or its failed request.
    """

    def outcome(task: Callable[[Check], T], check: Check) -> T | RequestError:
        try:
            return task(check)
        except RequestError as error:
            return error

    if len(tasks) == 1:
        return [outcome(tasks[0], check)]
    has_ended = Event()

    def check_ended() -> None:
        if has_ended.is_set():
            raise _EndedError

    with ThreadPoolExecutor(max(1, len(tasks)), "vllm servers") as pool:
        futures = [pool.submit(outcome, task, check_ended) for task in tasks]
        try:
            while any(not future.done() for future in futures):
                done, _ = wait(futures, _BETWEEN_CHECKS, FIRST_EXCEPTION)
                check()
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        finally:
            has_ended.set()
