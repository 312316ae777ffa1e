"""A reward that is a Python function: a rule, a checker, a call to a service."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from xpo_lightning.batch import RawPrompt
from xpo_lightning.errors import InputError
from xpo_lightning.identity import import_path
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.checks import as_scores


class PythonReward(Reward):
    """Scores completions with a function: `function(prompts=[...], completions=[...], columns={...}, **arguments)`.

    The function gets B prompts (text or chat messages), B completions as text and the rows' other columns, each a list
    of length B. It returns B finite numbers as a list, tensor or numpy array; True counts as 1 and False as 0.

    Args:
        function: The function; in YAML its import path, for example `my_rewards.exact_match`.
        arguments: Further keyword arguments of the function.

    Raises:
        InputError: The function cannot be called with these arguments.
    """

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.function = function
        self.arguments = dict(arguments or {})
        self.name = import_path(function)
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
            InputError: The function raised, or did not return B finite numbers. The message names the function.
        """
        lists = {name: list(values) for name, values in columns.items()}
        try:
            values = self.function(
                prompts=list(prompts), completions=list(completions), columns=lists, **self.arguments
            )
        except Exception as error:  # StopIteration too: unwrapped, it would end the training loop without a word
            raise InputError(f"reward function {self.name} raised {type(error).__name__}: {error}") from error
        return as_scores(values, len(completions), f"reward function {self.name}")

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
