"""A reward that is a Python function: a rule, a checker, a call to a service."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from xpo_lightning.batch import RawPrompt
from xpo_lightning.identity import import_path
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.calls import UserFunction
from xpo_lightning.rewards.checks import as_scores

_GIVEN = ("prompts", "completions", "columns")


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
        self.function = UserFunction("reward function", function, _GIVEN, arguments, timeout)

    @property
    def timeout(self) -> float | None:
        """How many seconds a call may take; None waits for ever."""
        return self.function.timeout

    def identity(self) -> dict[str, Any]:
        """Name the function and its arguments; the function's code is not looked at."""
        return {"class": import_path(type(self)), "function": self.function.name, "arguments": self.function.arguments}

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
        values = self.function(self.check, prompts=list(prompts), completions=list(completions), columns=lists)
        return as_scores(values, len(completions), self.function.who)
