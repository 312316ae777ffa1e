"""Calls functions with a time limit: they run in their own thread, and are abandoned if they do not return in time."""

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
from xpo_lightning.core.importing import import_function

_LONGEST_WAIT = 1.0  # seconds until a signal is noticed, if it does not end the wait at once


@dataclass(eq=False)
class Call:
    """A call and its outcome.

    Attributes:
        value: Its return value.
        error: The exception that it raised, `KeyboardInterrupt` and `SystemExit` included. None if it returned.
    """

    function: Callable[[], Any]
    device: int | None
    value: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self, check: Callable[[], None]) -> None:
        """Wait for its end.

        Args:
            check: Called about once a second while waiting; may raise an error to end the wait.
        """
        _wait(self.done, None, check)

    def result(self) -> Any:
        """Return the value of a call that has ended, or raise its error."""
        if self.error is not None:
            raise self.error
        return self.value


class CallThread:
    """Runs calls in its own thread, one after the other, without gradients.

    The thread starts with the first call and serves all later ones, so that thread-local state of a function, such as a
    database connection, persists. It is a daemon: the process can exit although a call hangs. After an abandoned call,
    the next one gets a new thread. A copy of this object, also in another process, has its own thread.

    Args:
        name: Name of the thread.
    """

    def __init__(self, name: str = "user function") -> None:
        self._name = name
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type["CallThread"], tuple[str]]:
        """Copy as a new object; threads cannot be copied."""
        return CallThread, (self._name,)

    def run(self, function: Callable[[], Any], timeout: float | None, check: Callable[[], None] = lambda: None) -> Call:
        """Call a function, and wait for its end.

        Args:
            function: The function, called without arguments.
            timeout: How many seconds to wait; None waits for ever.
            check: Called about once a second while waiting; may raise an error to end the wait.

        Returns:
            The finished call, which holds any error of the function. Errors that this method itself raises come from
            elsewhere, such as `KeyboardInterrupt` when the user presses Ctrl-C.

        Raises:
            TimeoutError: The function has not returned in time. It is abandoned, and its return value is dropped.
        """
        call = self.begin(function)
        try:
            in_time = _wait(call.done, timeout, check)
        except BaseException:
            self.give_up()
            raise
        if not in_time:
            self.give_up()
            raise TimeoutError
        return call

    def begin(self, function: Callable[[], Any]) -> Call:
        """Begin a call without waiting for its end."""
        # The current device is thread-local; a new thread would start with device 0.
        call = Call(function, torch.cuda.current_device() if torch.cuda.is_initialized() else None)
        if self._thread is None or not self._thread.is_alive():  # A forked process does not inherit threads.
            self._start()
        self._calls.put(call)
        return call

    def give_up(self) -> None:
        """Abandon the calls under way: the next one gets a new thread."""
        if self._thread is not None:
            self._end()
            self._thread = None

    def _start(self) -> None:
        self._calls = SimpleQueue()
        self._end = weakref.finalize(self, self._calls.put, None)
        self._thread = threading.Thread(target=_serve, args=(self._calls,), name=self._name, daemon=True)
        self._thread.start()


class TimedFunction:
    """A function from the config, called with keywords, always in the same thread of its own.

    Args:
        kind: The kind of function, for errors, such as `reward function`.
        function: The function.
        given: Names of the keywords that each call passes.
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
        function: Callable[..., Any] | str,
        given: Collection[str],
        arguments: Mapping[str, Any] | None,
        timeout: float | None,
        key: str = "model.reward",
    ) -> None:
        self.key = f"{key}.init_args"
        if timeout is not None and not timeout > 0:
            raise InputError(f"{self.key}.timeout must be above 0 or null, but is {timeout}")
        self.function: Callable[..., Any] = (
            import_function(function, f"{self.key}.function") if isinstance(function, str) else function
        )
        self.arguments, self.timeout = dict(arguments or {}), timeout
        self.name = import_path(self.function)
        self.who = f"{kind} {self.name}"
        self._thread = CallThread()
        self._check_signature(given)

    def __call__(self, check: Callable[[], None], **keywords: Any) -> Any:
        """Call the function in its thread; so Ctrl-C, which is raised here, is not taken for an error of the function.

        Args:
            check: Called about once a second meanwhile; may raise an error to end the wait.
            keywords: The keywords of this call.

        Returns:
            The function's return value.

        Raises:
            InputError: The function raised an error, or did not return in time. The message names the function.
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
    """Run calls until the queue yields None, without gradients: a new thread would start with gradients enabled."""
    with torch.no_grad():
        while (call := calls.get()) is not None:
            try:
                if call.device is not None:
                    torch.cuda.set_device(call.device)
                call.value = call.function()
            except BaseException as error:
                call.error = error
            call.done.set()
            del call  # Its value may be large, and the next call may come much later.


def _wait(done: threading.Event, timeout: float | None, check: Callable[[], None]) -> bool:
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _LONGEST_WAIT if deadline is None else deadline - time.monotonic()
        if done.wait(min(max(left, 0.0), _LONGEST_WAIT)):
            return True
        if left <= 0:
            return False
        check()
