"""A reward that is a Python function: a rule, a checker, a call to a service."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from xpo_lightning.batch import RawPrompt
from xpo_lightning.errors import InputError
from xpo_lightning.identity import import_path
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.calls import CallThread
from xpo_lightning.rewards.checks import as_scores, raised


class PythonReward(Reward):
    """Scores completions with a function: `function(prompts=[...], completions=[...], columns={...}, **arguments)`.

    The function gets B prompts (text or chat messages), B completions as text and the rows' other columns, each a list
    of length B. It returns B finite numbers as a list, tensor or numpy array; True counts as 1 and False as 0.

    It runs in a thread of its own, always the same one, so that a call that hangs ends the run and not the patience
    of whoever waits for it.

    Args:
        function: The function; in YAML its import path, for example `my_rewards.exact_match`.
        arguments: Further keyword arguments of the function.
        timeout: How many seconds a call may take before the run ends with an error; null waits for ever.

    Raises:
        InputError: The function cannot be called with these arguments, or `timeout` is not above 0.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: dict[str, Any] | None = None, timeout: float | None = 1800
    ) -> None:
        super().__init__()
        if timeout is not None and not timeout > 0:
            raise InputError(f"model.reward.init_args.timeout must be above 0 or null, but is {timeout}")
        self.function = function
        self.arguments = dict(arguments or {})
        self.timeout = timeout
        self.name = import_path(function)
        self._thread = CallThread()
        self._check_signature()

    def identity(self) -> dict[str, Any]:
        """Name the function and its arguments; the function's code is not looked at."""
        return {"class": import_path(type(self)), "function": self.name, "arguments": self.arguments}

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Call the function.

        Args:
            prompts: B prompts, text or chat messages.
            completions: B completions.
            columns: The rows' other columns, each of length B.

        Returns:
            The scores, float32. (B,)

        Raises:
            InputError: The function raised, did not return in time, or did not return B finite numbers. The message
                names the function.
        """
        lists = {name: list(values) for name, values in columns.items()}
        values = self._call(prompts=list(prompts), completions=list(completions), columns=lists, **self.arguments)
        return as_scores(values, len(completions), f"reward function {self.name}")

    def _call(self, **keywords: Any) -> Any:
        """Call the function in its thread; so Ctrl-C, which comes here, is not taken for something it raised."""
        try:
            call = self._thread.run(partial(self.function, **keywords), self.timeout, self.check)
        except TimeoutError:
            raise InputError(
                f"reward function {self.name} has not returned after {self.timeout:g} seconds; if it needs longer, "
                f"raise model.reward.init_args.timeout (null waits for ever)"
            ) from None
        if isinstance(call.error, InputError):
            raise call.error
        if call.error is not None:
            raise InputError(f"reward function {self.name} {raised(call.error)}") from call.error
        return call.value

    def _check_signature(self) -> None:
        taken = sorted({"prompts", "completions", "columns"} & self.arguments.keys())
        if taken:
            raise InputError(f"model.reward.init_args.arguments: '{taken[0]}' is taken; the function gets it anyway")
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # some builtins have none
            return
        try:
            signature.bind(prompts=[], completions=[], columns={}, **self.arguments)
        except TypeError as error:
            raise InputError(
                f"model.reward.init_args.function: {self.name}{signature} cannot be called with the keywords "
                f"{', '.join(['prompts', 'completions', 'columns', *self.arguments])} ({error})"
            ) from error
