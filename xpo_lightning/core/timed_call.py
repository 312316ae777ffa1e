"""Calls that may take only so long: they run in a thread of their own, and are given up when they do not return."""

import inspect
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from xpo_lightning.core.errors import InputError, describe_error
from xpo_lightning.core.fingerprint import import_path

_LONGEST_WAIT = 1.0  # seconds; where a signal does not end a wait at once, it is seen after this


@dataclass(eq=False)
class Call:
    """A call, and what came of it.

    Attributes:
        value: What it returned.
        error: What it raised: anything, `KeyboardInterrupt` and `SystemExit` included. None if it returned.
    """

    function: Callable[[], Any]
    device: int | None
    value: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class CallThread:
    """Runs calls in a thread of its own, one after the other, without gradients.

    The thread starts with the first call and serves all later ones, so that what a function keeps by thread, such as a
    database connection, lasts. It is a daemon: the process can exit although a call hangs. After a call was given up
    the next one gets a new thread. A copy of this object, also in another process, has a thread of its own.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type["CallThread"], tuple[()]]:
        """Let a copy begin anew; threads cannot be copied."""
        return CallThread, ()

    def run(self, function: Callable[[], Any], timeout: float | None, check: Callable[[], None] = lambda: None) -> Call:
        """Call a function, and wait for its end.

        Args:
            function: What to call.
            timeout: How many seconds to wait; None is for ever.
            check: Called about once a second while waiting; may raise, to wait no longer.

        Returns:
            The finished call. What the function raised is in it: what this method raises comes from elsewhere, such
            as `KeyboardInterrupt` when the user presses Ctrl-C.

        Raises:
            TimeoutError: The function has not returned in time. It is left alone, and what it returns is dropped.
        """
        # The device is one of the things that belong to a thread; a new thread would have that of number 0.
        call = Call(function, torch.cuda.current_device() if torch.cuda.is_initialized() else None)
        if self._thread is None or not self._thread.is_alive():  # A forked process has none of its parent's threads.
            self._start()
        self._calls.put(call)
        try:
            in_time = _wait(call.done, timeout, check)
        except BaseException:
            self._give_up()
            raise
        if not in_time:
            self._give_up()
            raise TimeoutError
        return call

    def _start(self) -> None:
        self._calls = SimpleQueue()
        self._end = weakref.finalize(self, self._calls.put, None)
        self._thread = threading.Thread(target=_serve, args=(self._calls,), name="user function", daemon=True)
        self._thread.start()

    def _give_up(self) -> None:
        self._end()
        self._thread = None


class TimedFunction:
    """A function that the config names, called by keyword, always in the same thread of its own.

    Args:
        kind: What it is, for errors, such as `reward function`.
        function: The function.
        given: Names of the keywords that each call gives.
        arguments: Further keyword arguments, the same in each call.
        timeout: How many seconds a call may take; None waits for ever.
        key: The option that takes the function, for errors.

    Attributes:
        name: The function's import path.
        who: Kind and name.

    Raises:
        InputError: The function cannot be called with these keywords, or `timeout` is not above 0.
    """

    def __init__(
        self,
        kind: str,
        function: Callable[..., Any],
        given: Collection[str],
        arguments: Mapping[str, Any] | None,
        timeout: float | None,
        key: str = "model.reward",
    ) -> None:
        self.key = f"{key}.init_args"
        if timeout is not None and not timeout > 0:
            raise InputError(f"{self.key}.timeout must be above 0 or null, but is {timeout}")
        self.function, self.arguments, self.timeout = function, dict(arguments or {}), timeout
        self.name = import_path(function)
        self.who = f"{kind} {self.name}"
        self._thread = CallThread()
        self._check_signature(given)

    def __call__(self, check: Callable[[], None], **keywords: Any) -> Any:
        """Call the function in its thread; so Ctrl-C, which comes here, is not taken for something it raised.

        Args:
            check: Called about once a second meanwhile; may raise, to wait no longer.
            keywords: The keywords of this call.

        Returns:
            What the function returned.

        Raises:
            InputError: It raised something, or did not return in time. The message names the function.
        """
        try:
            call = self._thread.run(partial(self.function, **keywords, **self.arguments), self.timeout, check)
        except TimeoutError:
            raise InputError(
                f"{self.who} has not returned after {self.timeout:g} seconds; if it needs longer, "
                f"raise {self.key}.timeout (null waits for ever)"
            ) from None
        if isinstance(call.error, InputError):
            raise call.error
        if call.error is not None:
            raise InputError(f"{self.who} {describe_error(call.error)}") from call.error
        return call.value

    def _check_signature(self, given: Collection[str]) -> None:
        taken = sorted(set(given) & self.arguments.keys())
        if taken:
            raise InputError(f"{self.key}.arguments: '{taken[0]}' is taken; the function gets it anyway")
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # some builtins have none
            return
        try:
            signature.bind(**dict.fromkeys(given), **self.arguments)
        except TypeError as error:
            raise InputError(
                f"{self.key}.function: {self.name}{signature} cannot be called with the keywords "
                f"{', '.join([*given, *self.arguments])} ({error})"
            ) from error


def _serve(calls: "SimpleQueue[Call | None]") -> None:
    """Run calls until told to end. Gradients are off, because whether they are on belongs to a thread as well."""
    with torch.no_grad():
        while (call := calls.get()) is not None:
            try:
                if call.device is not None:
                    torch.cuda.set_device(call.device)
                call.value = call.function()
            except BaseException as error:
                call.error = error
            call.done.set()
            del call  # Its value may be large, and the next call may be long in coming.


def _wait(done: threading.Event, timeout: float | None, check: Callable[[], None]) -> bool:
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _LONGEST_WAIT if deadline is None else deadline - time.monotonic()
        if done.wait(min(max(left, 0.0), _LONGEST_WAIT)):
            return True
        if left <= 0:
            return False
        check()
